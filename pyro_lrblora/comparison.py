"""One table over several posteriors on the same data."""

from __future__ import annotations

import html
import time
from collections.abc import Iterable, Iterator, Mapping

import pandas as pd
from tqdm.auto import tqdm

from . import metrics
from .adapters.lora import lora_parameters
from .adapters.targets import weight_shape
from .data import as_batches, in_one_order
from .evidence import check_fitted_rows, importance, psis_loo, why_no_density
from .guides.draws import DrawsGuide
from .guides.ensemble import EnsembleGuide
from .guides.mixture import MixtureGuide
from .infer.chains import R_HAT
from .posterior import Posterior
from .predictions import Prediction
from .predictive import predict
from .provenance import other_rows

_EVIDENCE = ["ELBO per row", "ELBO per row SE", "LOO per row", "LOO per row SE", "high k-hat"]
_COSTS = ["parameters", "head", "total", "of LoRA r=8", "training s", "s/step", "s/1000 predictions"]
_SUFFIXES = (", mean", ", linearised", ", temperature")
_WITHOUT = {
    "train": "no training NLL, ELBO or LOO, which lb.compare has with train=",
    "validation": "no temperature scaling, which lb.compare has with validation=",
}
_SEPARABLE = "no temperature: every validation row is right, so that the best is as low as can be"
_NOT_CONVERGED = f"chains that have not reached one distribution (R-hat above {R_HAT:g}): these draws are no posterior"
_OTHER_ROWS = (
    "train= holds other rows than were fitted, or in another order, by their hash: its ELBO and LOO are no evidence"
)


def compare(
    posteriors: Mapping[str, Posterior],
    test,
    *,
    train=None,
    validation=None,
    draws: int = 10,
    evidence_draws: int = 50,
    bins: int = 15,
    seed: int = 0,
    progress: bool = True,
    tokenizer=None,
) -> Comparison:
    """Score posteriors on the same rows, with what the fitted rows say for each and what each costs.

    Args:
        posteriors: name -> what a fit returned.
        test: the rows that are scored.
        train: the rows that were fitted: adds the evidence, and their NLL, far below the test rows' where a fit is
            overconfident.
        validation: the rows the temperature is fitted on: adds the rows ", temperature".
        draws: S of the predictions; of an ensemble of points one for each member.
        evidence_draws: S of ELBO and LOO; k-hat needs at least 25.
        bins: of the ECE, equal width.
        seed: of the draws.
        progress: show a progress bar over the posteriors, where there are several, and over long passes over the data.
        tokenizer: for a datasets.Dataset, where a model has none.

    Returns:
        A row per posterior, one for its mean alone (not of a point, nor where there are several modes), for a Laplace
        approximation of classes one with the linearised predictive, one for each of them after temperature scaling.
        Columns: accuracy, NLL (nats), ECE with its bins, Brier (of numbers RMSE, NLL, CRPS and the share inside the
        90% interval, of texts NLL per token and perplexity); differences of those that are means over rows from the
        row with the best NLL, with standard errors of the paired difference over test rows; temperature, of classes;
        training NLL; ELBO and PSIS-LOO, both in nats per training row, with standard errors (of the ELBO over draws,
        of LOO over rows; stored draws have LOO alone), and "high k-hat", the share of training rows whose k-hat is
        above min(1 - 1 / log10(S), 0.7), 0.41 for 50 draws, see pyro_lrblora.evidence.k_hat_threshold;
        parameters of the posterior, of the head, of both, and the posterior's as a share of LoRA r=8 on the same
        modules; seconds of the epochs (or chains) in the history, per step, and per 1000 test rows in this call.
        What is left out, and why, is in attrs["notes"].

    Raises:
        ValueError: before any prediction: no posteriors, different numbers of classes, no labels, or training rows
            that are not as many as were fitted.
    """
    given = {"test": test, "validation": validation, "train": train}
    data = _checked(posteriors, {role: rows for role, rows in given.items() if rows is not None}, tokenizer)
    rows, losses, notes = {}, {}, {note: [] for role, note in _WITHOUT.items() if given[role] is None}
    if not all(posterior.model.predicts_classes for posterior in posteriors.values()):
        notes.pop(_WITHOUT["validation"], None)
    silent = not progress or len(posteriors) == 1
    bar = tqdm(posteriors.items(), desc="compare", unit="posterior", leave=False, disable=silent)
    for name, posterior in bar:
        bar.set_postfix_str(name)
        batches = data[name]
        if train is not None and other_rows(posterior.settings, train, batches["train"]):
            notes.setdefault(_OTHER_ROWS, []).append(name)
        if not posterior.settings.get("r_hat", 1.0) <= R_HAT:
            notes.setdefault(_NOT_CONVERGED, []).append(name)
        evidence = (
            _evidence(name, posterior, batches["train"], evidence_draws, seed, notes, progress)
            if train is not None
            else {}
        )
        for label, at in _versions(name, posterior, notes):
            begun = time.perf_counter()
            how = {"draws": posterior.balanced_draws(draws), "seed": seed, "progress": progress}
            how |= {"at": "mean"} if at == "mean" else {"method": at} if at else {}
            found = {"test": predict(posterior, batches["test"], **how)}
            seconds = 1000 * (time.perf_counter() - begun) / batches["test"].rows
            found |= {role: predict(posterior, batches[role], **how) for role in batches.keys() - {"test"}}
            costs = _costs(posterior) | {"s/1000 predictions": seconds}
            rows[label], losses[label] = _scores(found, bins) | costs, found["test"].losses()
            held = found.get("validation")
            if isinstance(held, Prediction) and metrics.separable(held.log_probs, held.labels):
                notes.setdefault(_SEPARABLE, []).append(label)
            elif isinstance(held, Prediction):
                temperature = metrics.fit_temperature(held.log_probs, held.labels)
                scaled = {role: each.tempered(temperature) for role, each in found.items()}
                row = f"{label}, temperature"
                rows[row] = _scores(scaled, bins) | {"temperature": temperature} | costs
                losses[row] = scaled["test"].losses()
            if at is None:
                rows[label] |= evidence
    table = pd.DataFrame.from_dict(rows, orient="index")
    best = table["NLL"].idxmin()
    for name in losses[best]:
        differences = {row: each[name] - losses[best][name] for row, each in losses.items()}
        table[f"{name} - best"] = {row: each.mean() for row, each in differences.items()}
        table[f"{name} - best SE"] = {row: metrics.standard_error(each) for row, each in differences.items()}
    table = Comparison(table[_ordered(table)])
    table.attrs["notes"] = [f"{', '.join(names)}: {note}" if names else note for note, names in notes.items()]
    return table


class Comparison(pd.DataFrame):
    """What `compare` returns: a DataFrame that prints in blocks, a value with its standard error as one column.

    A selection of it, and everything else that pandas makes of it, is a plain DataFrame.
    """

    def _repr_html_(self) -> str:
        """What a notebook shows: the same blocks and notes."""
        return f"<pre>{html.escape(repr(self))}</pre>"

    def __repr__(self) -> str:
        blocks = {
            "On test rows:": [name for name in self if name not in _EVIDENCE + _COSTS],
            "Evidence, in nats per training row:": [name for name in _EVIDENCE if name in self],
            "Costs (a row after temperature scaling costs what it scales):": [name for name in _COSTS if name in self],
        }
        parts = []
        for title, names in blocks.items():
            block = pd.DataFrame(self[names]).dropna(how="all")
            if title.startswith("Costs"):
                block = block.drop_duplicates()
            if len(block) and names:
                cells = _cells(block).set_axis(_indented(block.index))
                parts.append(f"{title}\n{cells.to_string(line_width=120)}")
        notes = self.attrs.get("notes", [])
        return "\n\n".join(parts + (["\n".join(f"- {note}" for note in notes)] if notes else []))


def _cells(block: pd.DataFrame) -> pd.DataFrame:
    """The block as text."""
    text = block.map(lambda value: "" if pd.isna(value) else f"{value:.3f}" if isinstance(value, float) else str(value))
    for name in [name for name in block if f"{name} SE" in block]:
        errors = text.pop(f"{name} SE")
        text[name] = text[name].where(errors == "", text[name] + " ± " + errors)
    return text.rename(columns={"temperature": "T"})  # of all headers the widest over the narrowest figures


def _indented(rows: Iterable[str]) -> list[str]:
    """Row names, those that belong to the one above without its name: tables fit a terminal."""
    owner, names = None, []
    for row in map(str, rows):
        if owner is not None and row.startswith(f"{owner}, ") and row.endswith(_SUFFIXES):
            names.append("  " + row.removeprefix(f"{owner}, "))
        else:
            owner = row
            names.append(row)
    return names


def _ordered(table: pd.DataFrame) -> list[str]:
    """The scores, each followed by its difference from the best, then the evidence, then the costs."""
    last = ["temperature", "train NLL", *_EVIDENCE, *_COSTS]
    scores = [name for name in table if name not in last and " - best" not in name]
    columns = [name + part for name in scores for part in ("", " - best", " - best SE")] + last
    return [name for name in columns if name in table]


def check_named(posteriors) -> None:
    """Raise a TypeError unless the posteriors come by name."""
    if not isinstance(posteriors, Mapping):
        raise TypeError(f"expected posteriors by name, got {type(posteriors).__name__}; write {{'name': posterior}}")
    for name, posterior in posteriors.items():
        if not (isinstance(name, str) and isinstance(posterior, Posterior)):
            raise TypeError(
                f"expected posteriors by name, got {name!r}: {type(posterior).__name__}; write {{'name': lb.fit(...)}}"
            )


def check_comparable(posteriors) -> None:
    """Raise a TypeError or ValueError unless the posteriors come by name and predict the same kind of thing."""
    check_named(posteriors)
    if not posteriors:
        raise ValueError("expected at least one posterior, got none; write {'name': posterior}")
    classes = {name: posterior.model.classes for name, posterior in posteriors.items()}
    if len(set(classes.values())) > 1:
        raise ValueError(f"expected posteriors over the same classes, got these numbers of classes: {classes}")
    if len({posterior.model.predicts_classes for posterior in posteriors.values()}) > 1:
        kinds = {name: repr(posterior.model.likelihood) for name, posterior in posteriors.items()}
        raise ValueError(f"expected posteriors that predict the same kind of thing, got the likelihoods {kinds}")
    taken = [name for name in posteriors if name.endswith(_SUFFIXES)]
    if taken:
        raise ValueError(
            f"expected names that do not end in ', mean', ', linearised' or ', temperature' as rows do, got {taken}"
        )


def _checked(posteriors: Mapping[str, Posterior], given: Mapping, tokenizer) -> dict[str, dict]:
    """The batches of every role for every posterior, all of it checked."""
    check_comparable(posteriors)
    shared, data, given = {}, {}, {role: in_one_order(rows) for role, rows in given.items()}
    for name, posterior in posteriors.items():
        tok = tokenizer or posterior.model.tokenizer
        if id(tok) not in shared:
            shared[id(tok)] = {
                role: as_batches(rows, tok, batch_size=64, by_length=True) for role, rows in given.items()
            }
        data[name] = shared[id(tok)]
        for role, batches in data[name].items():
            posterior.model.check_labels(batches, f"{role} data")
        if "train" in given:
            check_fitted_rows(posterior, data[name]["train"])
    return data


def _versions(name: str, posterior: Posterior, notes: dict[str, list[str]]) -> Iterator[tuple[str, str | None]]:
    """The posterior, its mean where that is another prediction and means something, and a Laplace one linearised."""
    yield name, None
    if isinstance(posterior.guide, EnsembleGuide | MixtureGuide):
        notes.setdefault("no row for its mean, which lies between modes", []).append(name)
    elif not posterior.is_point:
        yield f"{name}, mean", "mean"
    if posterior.settings.get("method") == "laplace" and posterior.model.predicts_classes:
        # Away from the mode the network is not the one whose curvature was taken.
        yield f"{name}, linearised", "linearised"


def _scores(predictions: Mapping, bins: int) -> dict[str, float]:
    row = predictions["test"].scores(bins)
    if "train" in predictions:
        row["train NLL"] = predictions["train"].nll
    return row


def _evidence(
    name: str, posterior: Posterior, train, draws: int, seed: int, notes: dict[str, list[str]], progress: bool
) -> dict[str, float]:
    reason, row = why_no_density(posterior), {}
    if isinstance(posterior.guide, DrawsGuide):
        notes.setdefault("no ELBO: stored draws have no density", []).append(name)
        loo = psis_loo(posterior, train, draws, seed, progress=progress)
    elif reason:
        notes.setdefault(f"no ELBO or LOO: {reason}", []).append(name)
        return {}
    else:
        pieces = importance(posterior, train, draws, seed, progress=progress)
        elbo, loo = pieces.elbo, pieces.loo
        row = {"ELBO per row": elbo.value / train.rows, "ELBO per row SE": elbo.standard_error / train.rows}
    if posterior.model.point_head is not None:
        notes.setdefault("ELBO and LOO are conditional on the point head", []).append(name)
    if loo.note:
        notes.setdefault(loo.note, []).append(name)
    else:
        notes.setdefault(f"k-hat is high above {loo.threshold:.2f}, with {loo.draws} draws", []).append(name)
    total = loo.total
    row |= {"LOO per row": total.value / train.rows, "LOO per row SE": total.standard_error / train.rows}
    return row | {"high k-hat": loo.share_above()}


def _costs(posterior: Posterior) -> dict[str, float]:
    counts, history = posterior.parameter_counts(), posterior.history
    lora = lora_parameters(map(weight_shape, posterior.model.modules.values()))
    seconds = sum(row.get("seconds", 0.0) for row in history)
    # Every member of an ensemble counts its steps from one.
    steps = sum({row.get("member"): row.get("step", 0) for row in history}.values())
    return {
        "parameters": counts["posterior"],
        "head": counts["head"],
        "total": counts["posterior"] + counts["head"],
        "of LoRA r=8": counts["posterior"] / lora,
        "training s": seconds if history else float("nan"),
        "s/step": seconds / steps if steps else float("nan"),
    }
