"""What one scale of the prior means for the logits, by projection, rank and number of adapted layers.

python models/study/prior_scale.py --data FOLDER        prints a Markdown table
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

sys.path.append(str(Path(__file__).resolve().parents[1]))
from methods import Fits  # noqa: E402
from tasks import TASKS, problem  # noqa: E402

import pyro_lrblora as lb  # noqa: E402

ADAPTERS = {
    f"{name}, r = {rank}": lb.LoRAXS(rank, projection, "all-linear")
    for name, projection, rank in [
        ("Gradient", lb.projections.Gradient(), 8),
        ("Gradient", lb.projections.Gradient(), 16),
        ("SVD", lb.projections.SVD(), 8),
        ("Random", lb.projections.Random(), 8),
    ]
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with a folder of parquet files per task")
    parser.add_argument("--base", default="builtin", help="a BERT encoder, hub id or folder; 'builtin' is MiniLM")
    parser.add_argument("--frozen-layers", type=int, nargs="+", default=[4, 0])
    parser.add_argument("--tasks", nargs="+", default=["sst2", "snli"], choices=TASKS)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.1, 0.2, 1.0])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--validation-rows", type=int, default=150, help="that the logits are of")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(judged_rows=0)  # nothing is judged
    args = parser.parse_args(argv)
    table = []
    for task in args.tasks:
        for frozen in args.frozen_layers:
            one = argparse.Namespace(**vars(args) | {"frozen_layers": frozen})
            fits = Fits(problem(task, args.seed, one, test=False), one)
            for name, adapter in ADAPTERS.items():
                spread = {f"at {scale:g}": logit_sd(fits, adapter, scale, args.draws) for scale in args.scales}
                table.append({"task": task, "modules": len(fits.model(adapter).modules), "adapter": name} | spread)
    print(pd.DataFrame(table).round(2).to_markdown(index=False))


def logit_sd(fits: Fits, adapter: lb.LoRAXS, scale: float, draws: int) -> float:
    """Standard deviation over prior draws of logits about their mean over classes, root mean square over rows."""
    model = fits.model(adapter, lb.priors.Normal(scale))
    logits = model.prior_predictive(fits.problem.validation, draws=draws).logits
    return float((logits - logits.mean(-1, keepdim=True)).var(0).mean().sqrt())


if __name__ == "__main__":
    main()
