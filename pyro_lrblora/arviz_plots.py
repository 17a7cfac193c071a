"""ArviZ's plots of a posterior. This file and arviz_io.py are the only two that know ArviZ 0.x from 1.x.

On 1.x the functions live in arviz_plots and return a PlotCollection. Here each gives a matplotlib Figure on both lines,
which pyplot has let go of: write it with figure.savefig(path).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap

import numpy as np
import torch

from .arviz_io import arviz_1, elpd_data, from_groups, posterior_draws, psis, to_arviz
from .data import as_batches
from .evidence import LOO, check_fitted_rows, importance, psis_loo
from .guides.draws import DrawsGuide
from .posterior import Posterior
from .predictive import predict

_CHUNK = 32  # draws whose updates are in memory together


def forest(posterior: Posterior, draws: int | None = None, seed: int = 0):
    """A row per adapted module: median and intervals of the Frobenius norm of W - W0 over draws.

    Args:
        posterior: any.
        draws: S; None is 100, or all stored ones.
        seed: of the draws.
    """
    samples, chains = posterior_draws(posterior, draws, seed)
    norms = weight_norms(posterior.model, samples)
    modules = list(norms)
    values = torch.stack(list(norms.values()), dim=-1).unflatten(0, (chains, -1)).numpy()
    data = from_groups({"posterior": {"|W - W0|": values}}, {"|W - W0|": ["module"]}, {"module": modules})
    height = 1.0 + 0.28 * len(modules)
    if arviz_1():
        from arviz_plots import plot_forest

        # The modules' names need room beside the intervals.
        shares = {"figsize": (7, height), "width_ratios": [max(map(len, modules)), 40]}
        figure = _figure(
            plot_forest(
                data, combined=True, labels=["module"], point_estimate="median", ci_kind="hdi", ci_probs=(0.5, 0.94),
                figure_kwargs=shares,
            ),
            8,
        )  # fmt: skip
        figure.axes[0].set_axis_off()
    else:
        import arviz as az

        (axes,) = az.plot_forest(data, combined=True, hdi_prob=0.94, figsize=(7, height), textsize=8)
        axes.set_yticks(axes.get_yticks(), modules[::-1])
        axes.set_title("")
        figure = _figure(axes, 8)
    figure.axes[-1].set_xlabel("|W - W0|: median, 50% and 94% intervals", fontsize=8)
    return figure


def pair(posterior: Posterior, latents: Sequence[int] | None = None, draws: int | None = None, seed: int = 0):
    """Scatter of every two of some latents over draws, with their marginals.

    Args:
        posterior: with some spread.
        latents: places in the flat latent vector, the order of posterior.model.sites; None takes the three with the
            largest standard deviations.
        draws: S; None is 400, or all stored ones.
        seed: of the draws.

    Raises:
        ValueError: fewer than two different latents, or one that is out of range.
        TypeError: a point posterior.
    """
    size = posterior.model.sites.size
    chosen = None if latents is None else [int(place) for place in latents]
    if min(size, 2 if chosen is None else len(set(chosen))) < 2 or not all(0 <= each < size for each in chosen or ()):
        raise ValueError(f"expected two or more different latents from 0 to {size - 1}, got {latents}")
    if posterior.is_point:
        raise TypeError(f"expected a posterior with spread, got {posterior.guide_spec!r}, a point")
    stored = isinstance(posterior.guide, DrawsGuide)
    samples, chains = posterior_draws(posterior, draws if stored or draws else 400, seed)
    flat = posterior.model.sites.join(samples).cpu()
    if chosen is None:
        chosen = flat.std(0).topk(min(3, size)).indices.sort().values.tolist()
    names = latent_names(posterior.model)
    values = flat[:, chosen].unflatten(0, (chains, -1)).numpy()
    data = from_groups({"posterior": {names[k]: values[..., i] for i, k in enumerate(chosen)}}, {}, {})
    side = 1.0 + 2.1 * len(chosen)
    if arviz_1():
        from arviz_plots import plot_pair

        return _figure(plot_pair(data, visuals={"scatter": {"alpha": 0.3}}, figure_kwargs={"figsize": (side, side)}), 7)
    import arviz as az

    options = {"kind": "scatter", "marginals": True, "textsize": 8, "scatter_kwargs": {"alpha": 0.3}}
    return _figure(az.plot_pair(data, figsize=(side, side), **options), 7)


def k_hat(loo: LOO):
    """Pareto k-hat of every row's leave-one-out weights, and the threshold that its draws allow, `loo.threshold`.

    Args:
        loo: what evidence.psis_loo returned; rows whose k-hat is unknown have no point.

    Raises:
        ValueError: no row's k-hat is known.
    """
    if not bool(loo.k_hat.isfinite().any()):
        raise ValueError(f"expected a k-hat in some row, got none: {loo.note}; take 100 draws or more")
    data = elpd_data(loo)
    if arviz_1():
        from arviz_plots import plot_khat

        plot = plot_khat(data, visuals={"hlines": {}}, figure_kwargs={"figsize": (6, 3)})
    else:
        import arviz as az

        plot = az.plot_khat(data, show_hlines=True, figsize=(6, 3), textsize=9)
    figure = _figure(plot, 9)
    figure.axes[0].set(xlabel="row", ylabel="k-hat")
    return figure


def loo_pit(posterior: Posterior, train, draws: int | None = None, seed: int = 0):
    """Distribution of the leave-one-out probability integral transform, as its ECDF minus the uniform one's.

    See loo_pit_values. Near zero throughout, the labels are as random as the posterior says; a curve on one side of it
    is biased in the order of the classes. ArviZ 0.x draws a simultaneous band, which takes the rows for independent;
    1.x a test that does not, with its p-value and the suspicious points.

    Args, Raises: as loo_pit_values.
    """
    values = loo_pit_values(posterior, train, draws, seed)
    if arviz_1():
        from arviz_plots import plot_ecdf_pit

        data = from_groups({"prior_sbc": {"LOO-PIT": values[None]}}, {}, {})
        figure = _figure(plot_ecdf_pit(data, figure_kwargs={"figsize": (6, 3)}), 9)
    else:
        import arviz as az
        from scipy.stats import uniform

        axes = az.plot_ecdf(
            values, cdf=uniform.cdf, rvs=uniform.rvs, eval_points=np.linspace(0.01, 0.99, 99), difference=True,
            confidence_bands=True, random_state=seed, figsize=(6, 3),
        )  # fmt: skip
        figure = _figure(axes, 9)
    figure.axes[0].set(xlabel="LOO-PIT", ylabel="ECDF minus uniform", title="")
    return figure


def loo_pit_values(posterior: Posterior, train, draws: int | None = None, seed: int = 0) -> np.ndarray:
    """Randomised leave-one-out probability integral transform of every row's class, (N,): uniform if calibrated.

    ArviZ's own takes labels for ordered numbers and jitters or smooths draws of them. Here the leave-one-out
    probabilities p of all classes are computed from PSIS weights, and u is uniform on the step of the cumulative
    distribution that belongs to the label y: P(Y < y) + V p(y) (Brockwell 2007; Czado et al. 2009). That holds for any
    fixed order of the classes, but its power against a fault does depend on the order where C > 2.

    Args:
        posterior: with a density, or stored draws.
        train: the N rows that were fitted, with class labels.
        draws: S; None is 200, or all stored ones.
        seed: of the draws and of V.

    Raises:
        TypeError: no density and no stored draws; says why.
        ValueError: no class labels, or not as many rows as were fitted.
    """
    stored = isinstance(posterior.guide, DrawsGuide)
    draws = draws or (posterior.guide.total if stored else 200)
    batches = as_batches(train, posterior.model.tokenizer, batch_size=64, by_length=True)
    check_fitted_rows(posterior, batches)
    if batches.labels.dim() != 1 or batches.labels.is_floating_point():
        raise ValueError(f"expected class labels (N,) for a PIT of classes, got {tuple(batches.labels.shape)} numbers")
    weights = None if stored else importance(posterior, batches, draws, seed).log_weights  # refuses before predicting
    prediction = predict(posterior, batches, draws=draws, seed=seed, antithetic=False)
    log_probs = prediction.logits.double().log_softmax(-1)
    labels = prediction.labels.long()
    log_likelihood = log_probs.gather(-1, labels.expand(draws, -1)[..., None])[..., 0]  # (S, N)
    if not torch.allclose(prediction.log_likelihood.double(), log_likelihood, atol=1e-4):
        raise TypeError(
            "expected a likelihood that gives labels the probabilities of the classes that predict shows, got "
            f"{posterior.model.likelihood!r}"
        )
    log_weights = (-log_likelihood if stored else weights[:, None] - log_likelihood).T.contiguous()
    smoothed = torch.as_tensor(psis(log_weights.numpy())[0])
    probs = torch.einsum("ns,snc->nc", smoothed.exp(), log_probs.exp()).numpy()
    cumulative = np.cumsum(probs, axis=1)
    rows, label = np.arange(len(probs)), labels.numpy()
    step = probs[rows, label]
    return np.clip(cumulative[rows, label] - step * np.random.default_rng(seed).uniform(size=len(step)), 0, 1)


def compare(posteriors: Mapping[str, Posterior], train, draws: int | None = None, seed: int = 0):
    """Leave-one-out predictive densities (ELPD) of several posteriors of the same rows, best first, with errors.

    Args:
        posteriors: name -> posterior, each with a density or stored draws.
        train: the N rows that all were fitted to, with labels.
        draws: S; None is 200, or all stored ones where there are fewer.
        seed: of the draws.

    Raises:
        TypeError: a posterior without density or stored draws; says why.
        ValueError: fewer than two posteriors, no labels, or not as many rows as were fitted.
    """
    import arviz as az

    if len(posteriors) < 2:
        raise ValueError(f"expected two or more posteriors to compare, got {len(posteriors)}")
    for posterior in posteriors.values():
        check_fitted_rows(posterior, as_batches(train, posterior.model.tokenizer, batch_size=64, by_length=True))
    loos = {name: psis_loo(posterior, train, draws or 200, seed) for name, posterior in posteriors.items()}
    table = {name: elpd_data(loo) for name, loo in loos.items()}
    height = 1.0 + 0.35 * len(posteriors)
    if arviz_1():
        from arviz_plots import plot_compare

        rounded = az.compare(table, round_to="none")
        options = {"relative_scale": False, "figure_kwargs": {"figsize": (6, height)}}
        figure = _figure(plot_compare(rounded, **options), 9)
    else:
        figure = _figure(az.plot_compare(az.compare(table), figsize=(6, height), textsize=9, title=False), 9)
    figure.axes[0].margins(y=0.5 / len(posteriors))
    figure.axes[0].set(title="", ylabel="")
    figure.axes[0].set_xlabel("ELPD by PSIS-LOO (nats, more is better)")
    return figure


def pava(posterior: Posterior, data, draws: int = 200, seed: int = 0):
    """Calibration of every class against the others by isotonic regression (Dimitriadis et al. 2021, arXiv 2008.03033).

    Args:
        posterior: any.
        data: rows with class labels.
        draws: S; a label is drawn at each, so probabilities are known to 1 / S.
        seed: of the draws.

    Raises:
        NotImplementedError: ArviZ 0.x has no such plot.
        ValueError: no labels.
    """
    if not arviz_1():
        import arviz as az

        raise NotImplementedError(
            f"expected ArviZ 1.x (Python 3.12 or later) for PAVA calibration, got {az.__version__}; write "
            "pyro_lrblora.plots.reliability_diagram({...})"
        )
    from arviz_plots import plot_ppc_pava

    batches = as_batches(data, posterior.model.tokenizer, batch_size=64, by_length=True)
    posterior.model.check_labels(batches, "data")
    kind = "binary" if posterior.model.classes == 2 else "categorical"
    return _figure(plot_ppc_pava(to_arviz(posterior, batches, draws, seed), data_type=kind), 9)


def summary(posterior: Posterior, draws: int | None = None, seed: int = 0):
    """ArviZ's table of every entry of every site; R-hat, ESS and Monte Carlo errors of stored chains only.

    Args:
        posterior: any.
        draws: S; None is 1000, or all stored ones.
        seed: of the draws.

    Returns:
        A DataFrame of numbers, with mean, sd and interval as ArviZ names them on each of its lines.
    """
    import arviz as az

    stored = isinstance(posterior.guide, DrawsGuide)
    data = to_arviz(posterior, draws=draws if stored or draws else 1000, seed=seed)
    return az.summary(data, kind="all" if stored else "stats", round_to="none").astype(float)


def weight_norms(model, samples: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Frobenius norms of W - W0 per module, (S,) each.

    Args:
        model: a BayesianLoRA.
        samples: by site, (S, site shape).
    """
    latents = {name: samples[name].float() for name in model.sites.shapes}
    pieces: dict[str, list] = {name: [] for name in model.modules}
    for start in range(0, len(next(iter(latents.values()))), _CHUNK):
        chunk = model.adapted.per_module({name: value[start : start + _CHUNK] for name, value in latents.items()})
        for name, latent in chunk.items():
            left, right = model.adapted.low_rank_factors(name, latent)
            # |L R|^2 = tr(L'L R R'): r x r throughout.
            square = ((left.mT @ left) * (right @ right.mT)).sum((-2, -1))
            pieces[name].append(square.clamp(min=0).sqrt().cpu())
    return {name: torch.cat(parts) for name, parts in pieces.items()}


def latent_names(model) -> list[str]:
    """What the D entries of the flat latent vector are: site, row and column, and below them the module."""
    names = []
    for site, (_, rows, columns) in model.sites.shapes.items():
        for module in model.adapted.members[site]:
            lines = "\n".join(wrap(module.replace(".", ". "), 24)).replace(". ", ".")
            names += [f"{site}[{row}, {column}]\n{lines}" for row in range(rows) for column in range(columns)]
    return names


def _figure(plot, size: float):
    """The matplotlib Figure of whatever ArviZ returned, its text no larger than `size` points."""
    from matplotlib import pyplot
    from matplotlib.text import Text

    figure = plot.viz["figure"].item() if arviz_1() else np.ravel(plot)[0].figure
    pyplot.close(figure)
    figure.set_layout_engine("constrained")
    for text in figure.findobj(Text):
        text.set_fontsize(min(size, text.get_fontsize()))
    return figure
