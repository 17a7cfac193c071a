"""The shared suite's table: every family and method against exact posteriors and NUTS.

make truth        # writes docs/results/truth.md
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from truth import (  # noqa: E402
    CASES,
    best_diagonal,
    fit,
    fitted_kl,
    shared_target,
    two_layer_problem,
)

import pyro_lrblora as lb  # noqa: E402
from pyro_lrblora.diagnostics.reference import against_reference  # noqa: E402

G = lb.guides


def gaussian_rows() -> pd.DataFrame:
    """KL to the exact posterior reached by every family and Laplace structure, beside the best of its family."""
    problem, rows = shared_target(), {}
    for case in CASES:
        posterior = fit(problem, case.guide, **case.options)
        rows[repr(case)] = {
            "KL reached (nats)": fitted_kl(problem, posterior),
            "best of the family": case.best(problem, posterior) if case.best else None,
            "parameters": posterior.parameter_counts()["posterior"],
        }
    point = fit(problem, G.Delta(), epochs=4000)
    for structure in ("diagonal", "kron", "low_rank", "full"):
        posterior = lb.infer.laplace(problem.model, [problem.batch], structure=structure, rank=18, init=point)
        rows[f"laplace({structure})"] = {
            "KL reached (nats)": fitted_kl(problem, posterior),
            "best of the family": best_diagonal(problem)
            if structure == "diagonal"
            else 0
            if structure == "full"
            else None,
            "log evidence - exact": posterior.settings["log_evidence"] - problem.log_evidence,
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def sampler_rows() -> pd.DataFrame:
    """Mean and sd of the sampling methods on the same target, whose posterior is known."""
    problem, rows = shared_target(), {}
    sd = torch.linalg.inv(problem.precision).diagonal().sqrt()
    point = fit(problem, G.Delta(), epochs=4000)
    runs = {
        "nuts": lambda: lb.infer.nuts(problem.model, [problem.batch], draws=500, warmup=500, chains=2, progress=False),
        "sgld": lambda: lb.infer.sgld(
            problem.model, [problem.batch], draws=2000, burn_in=2000, thin=10, init=point, progress=False
        ),
        "sghmc": lambda: lb.infer.sghmc(
            problem.model, [problem.batch], draws=2000, burn_in=2000, thin=10, init=point, progress=False
        ),
        "swag": lambda: lb.infer.swag(
            problem.model, problem.batches(8), init=point, burn_in=0, snapshots=100, columns=10, progress=False
        ),
        "ensemble": lambda: lb.infer.ensemble(
            problem.model, [problem.batch], members=5, steps=300, spread=1.0, progress=False
        ),
        "mc_dropout": lambda: lb.infer.mc_dropout(problem.model, [problem.batch], steps=2000, progress=False),
    }
    for name, run in runs.items():
        posterior = run()
        draws = problem.model.sites.join(posterior.sample(2000, seed=0)).double()
        rows[name] = {
            "mean, in sd": float(((draws.mean(0) - problem.mean).abs() / sd).mean()),
            "sd ratio": float((draws.std(0) / sd).log().mean().exp()),
            "correlation, mean absolute difference": float(
                (torch.corrcoef(draws.T) - correlation(torch.linalg.inv(problem.precision))).abs().mean()
            ),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def correlation(covariance: torch.Tensor) -> torch.Tensor:
    """The correlation matrix of a covariance."""
    sd = covariance.diagonal().sqrt()
    return covariance / torch.outer(sd, sd)


def network_rows(prior) -> pd.DataFrame:
    """Families and methods beside NUTS on the two-layer network."""
    model, train, test = two_layer_problem(prior)
    nuts = lb.infer.nuts(model, train, draws=1000, warmup=500, chains=2, progress=False)
    rates = lb.Rates(loc=0.02, scale=0.02, factor=0.02)
    svi = lambda guide, **more: lb.fit(
        model, train, guide=guide, **({"epochs": 1500, "rates": rates, "progress": False} | more)
    )
    runs = {repr(case): (lambda case=case: svi(case.guide)) for case in CASES}
    if isinstance(prior, lb.priors.Normal):
        point = svi(G.Delta())
        for structure in ("diagonal", "kron", "low_rank", "full"):
            runs[f"laplace({structure})"] = lambda structure=structure: lb.infer.laplace(
                model, train, structure=structure, init=point
            )
        runs["ensemble"] = lambda: lb.infer.ensemble(
            model, train, members=5, epochs=500, spread=1.0, rates=rates, progress=False
        )
        runs["mc_dropout"] = lambda: lb.infer.mc_dropout(model, train, epochs=1000, rates=rates, progress=False)
        runs["swag"] = lambda: lb.infer.swag(
            model, train, init=point, burn_in=0, every=20, snapshots=50, columns=8, progress=False
        )
    rows = {}
    for name, run in runs.items():
        found = against_reference(run(), nuts, test).table
        rows[name] = found["value"]
    quality = f"R-hat {nuts.settings['r_hat']:.3f}, smallest ESS {nuts.settings['ess']:.0f}"
    rows[f"between halves of the draws of NUTS ({quality})"] = found["floor"]
    return pd.DataFrame.from_dict(rows, orient="index")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/truth.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    parts = [
        "# Families and methods against the truth",
        f"`make truth`; one CPU thread, torch {torch.__version__}, seed 0. Regenerated whole by that command.",
    ]
    priors = (lb.priors.Normal(1.0), lb.priors.Laplace(0.4))
    tables = [("Linear-Gaussian target, D = 18, two modules, the posterior known in closed form", gaussian_rows)]
    tables.append(("Sampling methods on the same target", sampler_rows))
    tables += [
        (f"Two-layer network, D = 8, beside NUTS, prior {prior}", lambda prior=prior: network_rows(prior))
        for prior in priors
    ]
    for title, table in tables:
        cells = table().map(lambda value: "" if pd.isna(value) else f"{value:.4g}")
        text = cells.to_markdown(disable_numparse=True)
        print(f"\n## {title}\n\n{text}", flush=True)
        parts += [f"## {title}", text]
        # After every table: a run that is cut short leaves what it has.
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
