"""Steps that our staged start needs to reach the ELBO of Pyro's AutoLowRankMultivariateNormal, its rate tuned too.

The same model, data, batches and draws per step (one per batch); the passes of the warm start are counted as steps.
Writes the curves to --out and prints a table.

python tests/benchmarks/warm_start.py
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import pandas as pd
from pyro.infer.autoguide import AutoLowRankMultivariateNormal

import pyro_lrblora as lb
from pyro_lrblora.evidence import elbo
from pyro_lrblora.networks import builtin_base
from pyro_lrblora.reviews import reviews

G = lb.guides
WARM_ROWS = 128  # rows of the warm start's pass


def stock(model):
    """Pyro's low-rank guide of rank 8, as it comes."""
    return AutoLowRankMultivariateNormal(model, init_scale=0.1, rank=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="of the stock guide")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--draws", type=int, default=16, help="draws of every ELBO estimate")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="*", default=[3e-3, 1e-2, 3e-2], help="tried for the stock guide")
    parser.add_argument("--out", type=Path, default=Path("out/warm_start.csv"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")

    train = reviews(args.rows, seed=1)
    network, tokenizer = builtin_base(num_labels=2)
    adapter = lb.LoRAXS(8, projection=lb.projections.Gradient(), targets="all-linear", layers=(4, 5))
    model = lb.BayesianLoRA(network, adapter, lb.priors.Normal(0.1), tokenizer=tokenizer).prepare(train)
    model = model.with_head(lb.FixedHead(model.head_start))  # an ELBO needs a head that does not move
    per_epoch = -(-args.rows // 32)
    # One forward and two backward passes per batch: 5/3 of a step, which is one of each (backward counts double).
    start_passes = round(-(-WARM_ROWS // 32) * (1 + 2 * 2) / 3)

    rows = []

    def run(name: str, seed: int, total: int, every: int, passes: int, **options) -> None:
        def note(row, posterior):
            if (row["epoch"] - 1) % every == 0 or row["step"] == total:
                bound = elbo(posterior, train, draws=args.draws, seed=100)
                rows.append(
                    {"guide": name, "seed": seed, "steps": row["step"] + passes, "elbo": bound.value / args.rows}
                )
                rows[-1]["standard error"] = bound.standard_error / args.rows
                print(rows[-1], flush=True)

        lb.fit(
            model, train, steps=total, draws="shared", seed=seed, callbacks=[note], progress=False, warmup=0.0,
            warm_start_rows=WARM_ROWS, **options,
        )  # fmt: skip

    for seed in range(args.seeds):
        for rate in args.rates:
            rates = lb.Rates(loc=rate, scale=rate, factor=rate)
            run(f"stock, rate {rate:g}", seed, args.steps, 2, 0, guide=stock, rates=rates, warm_start=False)
        for guide in (G.LowRank(8), G.LowRankPrecision(8)):
            total = args.steps // 3 - start_passes
            run(repr(guide), seed, total - total % per_epoch, 1, start_passes, guide=guide)
    curves = pd.DataFrame(rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    curves.to_csv(args.out, index=False)

    last = curves.groupby(["guide", "seed"]).last()["elbo"].unstack()
    best = last[last.index.str.startswith("stock")].max()
    reached = {}
    for name in curves["guide"].unique():
        own = curves[curves["guide"] == name]
        hits = [own[(own["seed"] == s) & (own["elbo"] >= best[s])]["steps"].min() for s in best.index]
        reached[name] = {f"seed {s}: ELBO/row, steps to the stock guide's": f"{last.loc[name, s]:.3f}, {hit:g}"
                         for s, hit in zip(best.index, hits, strict=True)}  # fmt: skip
    print(f"\n{args.rows} reviews, {args.steps} steps of the stock guide, start passes counted as {start_passes} steps")
    print(pd.DataFrame.from_dict(reached, orient="index").to_markdown())


if __name__ == "__main__":
    main()
