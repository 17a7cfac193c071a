"""Fit many posterior families to one data set in one subspace, and compare them in one table.

python models/compare_families.py --families Delta Diagonal LowRankPrecision laplace-kron swag --out grid

A finished fit stays in its folder below --out and is read from there on the next run with the same settings. A family
that cannot be fitted is reported with the reason, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from pyro.infer import autoguide
from sequence_classification import count_classes, load_base, load_splits

import pyro_lrblora as lb
from pyro_lrblora.reviews import reviews

SHORT = ["Delta", "Diagonal", "LowRank", "LowRankPrecision"]
# Many passes over the data for every draw, or for every latent: by name only.
NOT_IN_ALL = ["nuts", "AutoLaplaceApproximation"]
STOCK = [
    autoguide.AutoNormal,
    autoguide.AutoLowRankMultivariateNormal,
    autoguide.AutoMultivariateNormal,
    autoguide.AutoIAFNormal,
    autoguide.AutoLaplaceApproximation,
]
PROJECTIONS = {
    "SVD": lb.projections.SVD(),
    "WhitenedSVD": lb.projections.WhitenedSVD(),
    "Gradient": lb.projections.Gradient(),
    "Gradient-label-free": lb.projections.Gradient(label_free=True),
    "DCT": lb.projections.DCT(),
    "Random": lb.projections.Random(),
    "Hybrid": lb.projections.Hybrid((lb.projections.SVD(), lb.projections.Gradient()), (0.5, 0.5)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="builtin", help="hub id or folder; 'builtin' is MiniLM")
    parser.add_argument("--mean-pool", action="store_true", help="mean pooling, for sentence encoders")
    parser.add_argument(
        "--data", default="builtin", help="file, folder or hub name (name:config); 'builtin' are reviews"
    )
    parser.add_argument("--families", nargs="+", default=SHORT, metavar="NAME", help="'all', or of --list")
    parser.add_argument("--list", action="store_true", help="print the families' names and stop")
    parser.add_argument("--prior", default="Normal", choices=lb.priors.__all__)
    parser.add_argument("--prior-scale", type=float, default=0.1)
    parser.add_argument("--lora-prior-scale", type=float, default=0.2, help="of the families with the LoRA adapter")
    parser.add_argument("--projection", default="Gradient", choices=PROJECTIONS)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--layers", type=int, nargs="*")
    parser.add_argument("--head", default="point", choices=["point", "bayesian"])
    parser.add_argument("--columns", type=int, default=8, help="K of every low-rank family")
    parser.add_argument("--members", type=int, default=5, help="of ensembles and mixtures")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--validation-rows", type=int, default=300)
    parser.add_argument("--test-rows", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--draws", type=int, default=10, help="of every prediction; a chain stores ten times more")
    parser.add_argument("--evidence-draws", type=int, default=50, help="of ELBO and LOO; 0 for none")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("grid"))
    args = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        parser.error("expected one process, for not every family can share its work, got several; write python")
    families = families_of(args)
    if args.list:
        print(*families, sep="\n")
        return
    names = [name for name in families if name not in NOT_IN_ALL] if args.families == ["all"] else args.families
    unknown = [name for name in names if name not in families]
    if unknown:
        parser.error(f"expected --families among {', '.join(families)}, or all, got {', '.join(unknown)}")

    sizes = (args.rows, args.validation_rows, args.test_rows)
    if args.data == "builtin":
        train, validation, test = (reviews(n, seed=10 * args.seed + k) for k, n in enumerate(sizes, 1))
    else:
        train, validation, test = load_splits(args.data, *sizes, args.seed, classes=True)
    network, tokenizer = load_base(args.base, count_classes(train, validation, test), args.mean_pool, args.dtype)
    grid = Grid(args, families, network.to(args.device), tokenizer, train)
    posteriors, failed = {}, {}
    for name in dict.fromkeys(names):
        begun = time.perf_counter()
        try:
            posteriors[name] = grid.posterior(name)
            print(f"{name}: ready after {time.perf_counter() - begun:.1f} s", flush=True)
        except Exception as error:  # whatever it is, the other families are worth having
            failed[name] = f"{type(error).__name__}: {error}"
            print(f"{name}: failed, {failed[name]}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "failed.json").write_text(json.dumps(failed, indent=1))
    if not posteriors:
        raise SystemExit("expected at least one family to be fitted, all failed")

    draws = {"draws": args.draws, "evidence_draws": args.evidence_draws}
    fitted = train if args.evidence_draws else None
    table = lb.compare(posteriors, test, train=fitted, validation=validation, seed=args.seed, **draws)
    print(table)
    for name, reason in failed.items():
        print(f"not in the table: {name}, {reason}")
    table.to_csv(args.out / "table.csv")
    table.to_html(args.out / "table.html")
    table.to_markdown(args.out / "table.md")
    print(f"Wrote to {args.out}/: table.csv, table.md, table.html, and a folder per family.")


@dataclass(frozen=True)
class Family:
    """How one row of the table is fitted.

    Args:
        method: called with a model, the training rows and the options.
        options: what is written beside the fit; another value fits it again.
        start: name of the family whose fit is passed on as init.
        lora: adapt by LoRA instead of LoRA-XS.
    """

    method: Callable
    options: Mapping[str, object] = field(default_factory=dict)
    start: str | None = None
    lora: bool = False


def families_of(args: argparse.Namespace) -> dict[str, Family]:
    """Every family by its name on the command line."""
    g, k = lb.guides, args.columns
    guides = {
        "Delta": g.Delta(),
        "Diagonal": g.Diagonal(),
        "LowRank": g.LowRank(k),
        "LowRankPrecision": g.LowRankPrecision(k),
        "BlockLowRank": g.BlockLowRank(k),
        "BlockLowRank-covariance": g.BlockLowRank(k, form="covariance"),
        "MatrixNormal": g.MatrixNormal(),
        "RotatedDiagonal": g.RotatedDiagonal(),
        "FullRank": g.FullRank(),
        "FullRank-per-module": g.FullRank(per_module=True),
        "Flow": g.Flow(),
        "Mixture": g.Mixture(args.members),
        "Mixture-of-points": g.Mixture(args.members, component="delta"),
    } | {guide.__name__: guide for guide in STOCK}
    epochs = {"epochs": args.epochs, "seed": args.seed}
    seed = {"seed": args.seed}
    # As many steps after the point fit as in it, with 2 K snapshots on the way.
    every = max(1, args.epochs * math.ceil(args.rows / 32) // (2 * k))
    swag = Family(lb.infer.swag, {"columns": k, "snapshots": 2 * k, "every": every, "burn_in": args.epochs} | seed)
    rates = {"rates": lb.Rates(loc=1e-3)}  # LoRA's factors are larger than R
    chain = {"draws": 10 * args.draws} | seed
    return {name: Family(lb.fit, {"guide": guide} | epochs) for name, guide in guides.items()} | {
        "laplace-diagonal": Family(lb.infer.laplace, {"structure": "diagonal"} | seed, "Delta"),
        "laplace-kron": Family(lb.infer.laplace, {"structure": "kron"} | seed, "Delta"),
        "laplace-low-rank": Family(lb.infer.laplace, {"structure": "low_rank", "rank": k} | seed, "Delta"),
        "laplace-full": Family(lb.infer.laplace, {"structure": "full"} | seed, "Delta"),
        "swag": swag,
        "ensemble": Family(lb.infer.ensemble, {"members": args.members} | epochs),
        "mc-dropout": Family(lb.infer.mc_dropout, {"rate": 0.1} | epochs),
        "tfb": Family(tfb, {"anchor_rows": 200} | seed, "Delta"),
        "sgld": Family(partial(chain_at, lb.infer.sgld), chain, "Delta"),
        "sghmc": Family(partial(chain_at, lb.infer.sghmc), chain, "Delta"),
        "nuts": Family(partial(chain_at, lb.infer.nuts), {"warmup": 10 * args.draws} | chain, "Delta"),
        "lora": Family(lb.fit, {"guide": g.Delta()} | rates | epochs, lora=True),
        # The Fisher matrix of A is zero where B is: no warm start.
        "blob": Family(
            lb.fit, {"guide": g.Diagonal(point_sites=("B",)), "warm_start": False} | rates | epochs, lora=True
        ),
        "swag-lora": Family(swag.method, swag.options, lora=True),
        "laplace-lora": Family(lb.infer.laplace, {"structure": "kron"} | seed, "lora", lora=True),
        "ensemble-lora": Family(lb.infer.ensemble, {"members": args.members} | rates | epochs, lora=True),
        "tfb-lora": Family(tfb, {"anchor_rows": 200} | seed, "lora", lora=True),
    }


def tfb(model, train, *, init, anchor_rows: int, **options) -> lb.Posterior:
    """TFB around a point, its anchor being training rows: the validation rows are for the temperature."""
    return lb.infer.tfb(init, train.select(range(min(anchor_rows, len(train)))), **options)


def chain_at(method: Callable, model, train, *, init, **options) -> lb.Posterior:
    """A Markov chain around a point, with the point's head: a chain cannot train one."""
    return method(model.with_head(lb.fixed_from(init)), train, init=init, **options)


class Grid:
    """The fits of one run: each made at most once, and kept below args.out.

    Args:
        args: of the command line.
        families: by name.
        network, tokenizer: the base.
        train: the rows every fit sees.
    """

    def __init__(self, args: argparse.Namespace, families: Mapping[str, Family], network, tokenizer, train):
        self.args, self.families, self.network, self.tokenizer, self.train = args, families, network, tokenizer, train
        self._models: dict[bool, lb.BayesianLoRA] = {}
        self._posteriors: dict[str, lb.Posterior] = {}
        shared = ["base", "mean_pool", "data", "dtype", "rank", "targets", "layers", "head", "rows", "seed"]
        self._shared = {name: getattr(args, name) for name in shared}

    def posterior(self, name: str) -> lb.Posterior:
        """The fit of a family, from its folder where it is there with the same settings."""
        if name not in self._posteriors:
            family = self.families[name]
            model = self._model(family.lora)
            init = {} if family.start is None else {"init": self.posterior(family.start)}
            settings = self._settings(family.lora) | {"prior": repr(model.prior)}
            for role, part in (("options", family), ("start", self.families.get(family.start))):
                settings[role] = {key: repr(value) for key, value in part.options.items()} if part else None
            self._posteriors[name] = self._kept(
                name, settings, lambda: family.method(model, self.train, **init, **family.options)
            )
        return self._posteriors[name]

    def _model(self, lora: bool) -> lb.BayesianLoRA:
        """The prepared model that all fits with one adapter share; its subspace is kept too."""
        if lora not in self._models:
            args = self.args
            where = {"rank": args.rank, "targets": args.targets, "layers": args.layers}
            adapter = lb.LoRA(**where) if lora else lb.LoRAXS(projection=PROJECTIONS[args.projection], **where)

            new = lb.BayesianLoRA(self.network, adapter, head=args.head, tokenizer=self.tokenizer)

            def start() -> lb.Posterior:
                model = new.prepare(self.train, seed=args.seed)
                return lb.Posterior(model, lb.guides.Delta()(model), lb.guides.Delta())

            kept = self._kept("start-lora" if lora else "start-lora-xs", self._settings(lora), start)
            model = new.in_subspace_of(kept.model).prepare(self.train)  # the head's probe is cheap
            scale = args.lora_prior_scale if lora else args.prior_scale
            self._models[lora] = model.with_prior(prior_of(args.prior, scale, model))
        return self._models[lora]

    def _settings(self, lora: bool) -> dict[str, object]:
        return self._shared | {"adapter": "LoRA" if lora else f"LoRA-XS, {PROJECTIONS[self.args.projection]!r}"}

    def _kept(self, name: str, settings: dict, make: Callable[[], lb.Posterior]) -> lb.Posterior:
        folder, card = self.args.out / name, self.args.out / name / "settings.json"
        if card.exists() and json.loads(card.read_text()) == settings:
            return lb.Posterior.load(folder, self.network, tokenizer=self.tokenizer)
        # The card goes first and comes last: a run that is cut short leaves none.
        card.unlink(missing_ok=True)
        posterior = make()
        posterior.save(folder)
        card.write_text(json.dumps(settings, indent=1))
        return posterior


def prior_of(name: str, scale: float, model: lb.BayesianLoRA) -> Callable:
    """A prior by name, at a scale."""
    match name:
        case "SingularValues":
            return lb.priors.SingularValues.of(model, scale)
        case "Learned":
            return lb.priors.Learned(lb.priors.Normal(scale))
        case _:
            return getattr(lb.priors, name)(scale)


if __name__ == "__main__":
    main()
