"""Predict a number for each text or pair of texts, with its noise.

python models/regression.py --data FOLDER --text premise hypothesis --label entropy

Under `torchrun --nproc-per-node 4 ...` or `accelerate launch ...` the processes share the rows of every batch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from processes import Processes
from sequence_classification import GUIDES, load_base, load_splits

import pyro_lrblora as lb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="builtin", help="hub id or folder; 'builtin' is MiniLM")
    parser.add_argument("--mean-pool", action="store_true", help="mean pooling, for sentence encoders")
    parser.add_argument("--data", required=True, help="file, folder with one per split, or hub name (name:config)")
    parser.add_argument("--text", nargs="+", default=["text"], help="one or two text columns")
    parser.add_argument("--label", default="label", help="column of numbers")
    parser.add_argument(
        "--noise", type=float, help="standard deviation of the labels' noise; left out, it is predicted"
    )
    parser.add_argument("--guides", nargs="+", default=["Delta", "LowRankPrecision"], choices=GUIDES)
    parser.add_argument("--prior-scale", type=float, default=0.1)
    parser.add_argument("--projection", default="Gradient", choices=["SVD", "WhitenedSVD", "Gradient", "Random"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--layers", type=int, nargs="*")
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--validation-rows", type=int, default=200, help="scored after every epoch")
    parser.add_argument("--test-rows", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    processes = Processes(args.device)
    splits = load_splits(args.data, args.rows, args.validation_rows, args.test_rows, args.seed)
    network, tokenizer = load_base(args.base, 2 if args.noise is None else 1, args.mean_pool, args.dtype)
    network.to(args.device)
    text = args.text if len(args.text) > 1 else args.text[0]
    train, validation, test = (
        lb.Batches(rows, tokenizer, text=text, label=args.label, shuffle=shuffle, by_length=shuffle is None)
        for rows, shuffle in zip(splits, (args.seed, None, None), strict=True)
    )
    adapter = lb.LoRAXS(args.rank, getattr(lb.projections, args.projection)(), args.targets, args.layers)
    likelihood = lb.likelihoods.Gaussian(args.noise)
    model = lb.BayesianLoRA(network, adapter, lb.priors.Normal(args.prior_scale), likelihood, tokenizer=tokenizer)
    model = model.prepare(train)
    model.check_labels(test, "test data")
    if processes.first:
        print(f"{len(model.modules)} adapted modules, {model.sites.size} latents, {train.rows} rows")
    posteriors = {
        name: lb.fit(
            model, train, validation=validation, guide=getattr(lb.guides, name)(), epochs=args.epochs, seed=args.seed
        )
        for name in args.guides
    }
    processes.part()
    if args.out:
        posteriors[args.guides[-1]].save(args.out)
    table = lb.compare(posteriors, test, train=train, draws=args.draws)
    constant = (test.labels.double() - train.labels.double().mean()).square().mean().sqrt()
    print(f"RMSE of the mean of all training labels: {constant:.3f}")
    print(table)
    if args.out:
        table.to_csv(args.out / "table.csv")


if __name__ == "__main__":
    main()
