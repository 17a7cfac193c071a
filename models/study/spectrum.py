"""Is the posterior's covariance of low rank on real text: the full Gauss-Newton matrix and a chain, beside their nulls.

python models/study/spectrum.py --data FOLDER                       prints Markdown, a table per task
python models/study/spectrum.py --data FOLDER --chain-rank 2        and a NUTS reference in the top layer, at small D
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from methods import DEFAULT, Fits  # noqa: E402
from tasks import TASKS, problem  # noqa: E402

import pyro_lrblora as lb  # noqa: E402
from pyro_lrblora.diagnostics import low_rank  # noqa: E402

PROJECTIONS = {"Gradient": lb.projections.Gradient(), "SVD": lb.projections.SVD(), "Random": lb.projections.Random()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with a folder of parquet files per task")
    parser.add_argument("--base", default="builtin", help="a BERT encoder, hub id or folder; 'builtin' is MiniLM")
    parser.add_argument("--frozen-layers", type=int, default=4)
    parser.add_argument("--tasks", nargs="+", default=["sst2", "snli"], choices=TASKS)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--prior-scale", type=float, default=DEFAULT.scale)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--validation-rows", type=int, default=150)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--chain-rank", type=int, default=0, help="of the chain's latents; 0 runs none")
    parser.add_argument("--chain-rows", type=int, default=64)
    parser.add_argument("--chain-draws", type=int, default=150, help="after as many of warm-up, two chains")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(judged_rows=0)  # nothing is predicted
    args = parser.parse_args(argv)
    for task in args.tasks:
        random = full(task, "Random", args)
        for projection in ("Gradient", "SVD"):
            found = low_rank(full(task, projection, args), random)
            print(f"\n{task}, {projection} projection, full Gauss-Newton matrix\n\n{_shown(found)}")
        if args.chain_rank:
            found = low_rank(chain(task, args))
            print(f"\n{task}, NUTS, r = {args.chain_rank}\n\n{_shown(found)}\n\n{found.note}")


def full(task: str, projection: str, args: argparse.Namespace) -> lb.Posterior:
    """The Laplace approximation with a free covariance, around a point under the prior."""
    fits = Fits(problem(task, args.seed, args, test=False), args)
    adapter = lb.LoRAXS(args.rank, PROJECTIONS[projection], "all-linear")
    point = fits.fit(fits.model(adapter, lb.priors.Normal(args.prior_scale)), lb.guides.Delta())
    return lb.infer.laplace(point.model, fits.problem.train, structure="full", init=point)


def chain(task: str, args: argparse.Namespace) -> lb.Posterior:
    """Two NUTS chains over the latents of the top layer, the head where a point fit left it."""
    small = argparse.Namespace(**vars(args) | {"frozen_layers": 5, "rows": args.chain_rows})
    fits = Fits(problem(task, args.seed, small, test=False), small)
    adapter = lb.LoRAXS(args.chain_rank, lb.projections.Gradient(), "all-linear")
    model = fits.model(adapter, lb.priors.Normal(args.prior_scale))
    point = fits.fit(model, lb.guides.Delta())
    small.batch_size = args.chain_rows  # the chain's only batch
    whole = problem(task, args.seed, small, test=False).train
    model = point.model.with_head(lb.fixed_from(point))
    return lb.infer.nuts(model, whole, init=point, draws=args.chain_draws, warmup=args.chain_draws, chains=2)


def _shown(found) -> str:
    return found.table.reset_index().round(3).to_markdown(index=False)


if __name__ == "__main__":
    main()
