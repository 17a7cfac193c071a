"""From saved posteriors and a data set to a report.

python models/report.py runs/a runs/b --base roberta-base --data glue:sst2 --rows 1000 --out report.html

The first posterior is examined, the others are compared with it. Rows, seed and data must be those of the fits (of
models/sequence_classification.py --out runs/a), for the evidence is that of the rows that were fitted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sequence_classification import count_classes, load_base, load_splits

import pyro_lrblora as lb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("posteriors", type=Path, nargs="+", help="folders that Posterior.save wrote")
    parser.add_argument("--base", default="builtin", help="hub id or folder; 'builtin' is MiniLM")
    parser.add_argument("--mean-pool", action="store_true", help="mean pooling, for sentence encoders")
    parser.add_argument("--data", required=True, help="file, folder with one per split, or hub name (name:config)")
    parser.add_argument("--outside", help="data of another kind, likewise")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--test-rows", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=32)
    parser.add_argument("--evidence-draws", type=int, default=100)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="ends in .html or .md")
    args = parser.parse_args()

    train, validation, test = load_splits(args.data, args.rows, 300, args.test_rows, args.seed, classes=True)
    outside = load_splits(args.outside, 1, 0, args.test_rows, args.seed)[2] if args.outside else None
    network, tokenizer = load_base(args.base, count_classes(train, validation, test), args.mean_pool, args.dtype)
    posteriors = {folder.name: lb.Posterior.load(folder, network, tokenizer=tokenizer) for folder in args.posteriors}
    if len(posteriors) < len(args.posteriors):
        parser.error("expected folders with different names: the names stand in the tables")
    report = lb.report(
        posteriors, test, args.out, train=train, validation=validation, outside=outside, draws=args.draws,
        evidence_draws=args.evidence_draws, seed=args.seed,
    )  # fmt: skip
    print(report.diagnosis, report.comparison, f"Wrote {report.path}", sep="\n\n")


if __name__ == "__main__":
    main()
