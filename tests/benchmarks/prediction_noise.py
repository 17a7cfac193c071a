"""How far a test NLL moves with the seed of the draws: independent ones, and mirrored pairs.

MiniLM's upper third on the built-in reviews; a fit per guide, then predictions with many seeds.

python tests/benchmarks/prediction_noise.py        # prints Markdown
"""

from __future__ import annotations

import argparse
import warnings

import pandas as pd

import pyro_lrblora as lb
from pyro_lrblora.networks import builtin_base
from pyro_lrblora.reviews import reviews

GUIDES = {"Diagonal": lb.guides.Diagonal(), "LowRankPrecision(8)": lb.guides.LowRankPrecision(8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200, help="to train and to test on")
    parser.add_argument("--draws", type=int, nargs="+", default=[10])
    parser.add_argument("--seeds", type=int, default=6)
    args = parser.parse_args()
    warnings.simplefilter("ignore", lb.ScalesNotConverged)

    network, tokenizer = builtin_base(num_labels=2)
    train, test = reviews(args.rows, seed=1), lb.Batches(reviews(args.rows, seed=2), tokenizer, by_length=True)
    adapter = lb.LoRAXS(8, projection=lb.projections.Gradient(), targets="all-linear", layers=(4, 5))
    model = lb.BayesianLoRA(network, adapter, lb.priors.Normal(0.1), tokenizer=tokenizer).prepare(train)
    rows = {}
    for name, guide in GUIDES.items():
        posterior = lb.fit(model, train, guide=guide, epochs=5, progress=False)
        for draws in args.draws:
            row = {}
            for kind, antithetic in {"independent": False, "in pairs": True}.items():
                options = {"draws": draws, "antithetic": antithetic}
                found = pd.Series([lb.predict(posterior, test, seed=seed, **options).nll for seed in range(args.seeds)])
                row |= {f"{kind}: NLL": found.mean(), f"{kind}: s.d. over seeds": found.std()}
            rows[f"{name}, {draws} draws"] = row
    print(f"{args.rows} rows, {args.seeds} seeds, nats per row\n")
    print(pd.DataFrame.from_dict(rows, orient="index").to_markdown(floatfmt=".4f"))


if __name__ == "__main__":
    main()
