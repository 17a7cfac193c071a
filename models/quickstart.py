"""Five fits of one base on the same short reviews: two points and three posteriors, compared and reported on.

The text is generated, so the true probability of every label is known and calibration is scored against the truth too.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import datasets
import numpy as np
import pandas as pd

import pyro_lrblora as lb
from pyro_lrblora.networks import builtin_base
from pyro_lrblora.reviews import reviews


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--rows", type=int, default=300, help="training rows")
    parser.add_argument("--validation-rows", type=int, default=200)
    parser.add_argument("--test-rows", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--prior-scale", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    begun = time.perf_counter()
    sizes = (args.rows, args.validation_rows, args.test_rows)
    train, validation, test = (reviews(n, seed=10 * args.seed + k) for k, n in enumerate(sizes, 1))
    network, tokenizer = builtin_base(num_labels=2)
    where = {"targets": "all-linear", "layers": (4, 5)}  # every linear layer of the upper third
    lora = lb.BayesianLoRA(network, lb.LoRA(8, **where), lb.priors.Normal(1.0), tokenizer=tokenizer)
    xs = lb.BayesianLoRA(
        network,
        adapter=lb.LoRAXS(8, projection=lb.projections.Gradient(), **where),
        prior=lb.priors.Normal(args.prior_scale),
        tokenizer=tokenizer,
    ).prepare(train)  # once: every fit below shares this subspace
    print(f"MiniLM, {len(xs.modules)} adapted layers, {xs.sites.size} latents; {args.rows} reviews, such as:")
    for row in train.select(range(3)):
        print(f"  {row['text']!r} label={row['label']} p_true={row['p_true']:.2f}")

    fits = {
        "LoRA": (lora, lb.guides.Delta(), lb.Rates(loc=1e-3)),
        "LoRA-XS": (xs, lb.guides.Delta(), lb.Rates()),
        "Diagonal": (xs, lb.guides.Diagonal(), lb.Rates()),
        "LowRank": (xs, lb.guides.LowRank(rank=8), lb.Rates()),
        "LowRankPrecision": (xs, lb.guides.LowRankPrecision(rank=8), lb.Rates()),
    }
    posteriors = {
        name: lb.fit(model, train, guide=guide, epochs=args.epochs, rates=rates, seed=args.seed)
        for name, (model, guide, rates) in fits.items()
    }

    # The first is examined in the report; the others stand beside it.
    shown = {name: posteriors[name] for name in ("LowRankPrecision", *posteriors)}
    outside = topics()
    report = lb.report(
        shown, test, args.out / "report.html", train=train, validation=validation, outside=outside, draws=args.draws,
        evidence_draws=50, title="Five fits of MiniLM on short reviews",
    )  # fmt: skip
    table = report.comparison
    predictions = {name: lb.predict(posterior, test, draws=args.draws) for name, posterior in posteriors.items()}
    truth = np.array(test["p_true"])
    distance = {name: np.abs(p.probs[:, 1].numpy() - truth).mean() for name, p in predictions.items()}
    table.insert(table.columns.get_loc("NLL"), "|p - p_true|", pd.Series(distance))
    print(f"\nShould LowRankPrecision be believed?\n\n{report.diagnosis}\n\n{table}\n")
    conclude(table)

    best = posteriors["LowRankPrecision"]
    best.save(args.out / "posterior")
    best.to_arviz(test.select(range(min(100, len(test)))), draws=50).to_netcdf(args.out / "draws.nc")
    lb.plots.reliability_diagram(predictions).savefig(args.out / "reliability.png", dpi=150)
    table.to_csv(args.out / "table.csv")
    print(
        f"\n{time.perf_counter() - begun:.0f} s. Wrote to {args.out}/: report.html (open it in a browser), posterior/, "
        "draws.nc, reliability.png, table.csv"
    )


def topics() -> datasets.Dataset:
    """Sentences that are no reviews: what the posterior should be less sure of."""
    subjects = ("The train to the coast", "Our town council", "The recipe", "A new bridge", "The lecture on fungi")
    rest = (
        "leaves at nine from platform two.",
        "is described in the second chapter.",
        "was mentioned on the radio this morning.",
        "takes about forty minutes in winter.",
        "has been moved to the third of May.",
        "needs two cups of flour and some patience.",
    )
    return datasets.Dataset.from_dict({"text": [f"{subject} {end}" for subject in subjects for end in rest]})


def conclude(table: pd.DataFrame) -> None:
    """Say whether the posterior beat the point of the same adapter."""
    point, posterior = table.loc["LoRA-XS"], table.loc["LowRankPrecision"]
    for name in ("NLL", "ECE (15 bins)", "Brier"):
        word = "lower" if posterior[name] < point[name] else "NOT lower"
        print(
            f"{name}: {posterior[name]:.3f} with the LowRankPrecision posterior, {point[name]:.3f} at the point: {word}"
        )


if __name__ == "__main__":
    main()
