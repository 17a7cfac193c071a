"""Fit a Bayesian LoRA posterior to any text classification data with any base, and score it.

python models/sequence_classification.py --base roberta-base --data glue:sst2 --guide LowRank --prior Horseshoe

Under `torchrun --nproc-per-node 4 ...` or `accelerate launch ...` the processes share the rows of every batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import datasets
from loading import from_hub, tokenizer_of
from processes import Processes
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

import pyro_lrblora as lb
from pyro_lrblora.networks import MeanPoolClassifier, builtin_base

# Endings of files of rows, and what datasets calls their format.
READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
# Guides that need no arguments.
GUIDES = [
    "Delta", "Diagonal", "LowRank", "LowRankPrecision", "BlockLowRank", "MatrixNormal", "RotatedDiagonal", "FullRank",
    "Flow", "Mixture",
]  # fmt: skip


def read_splits(source: str) -> dict[str, datasets.Dataset]:
    """Every split by name: a file each, or what a hub data set has (name, or name:config).

    Raises:
        SystemExit: nothing that can be read.
    """
    found = Path(source)
    if found.exists():
        files = [path for path in (sorted(found.iterdir()) if found.is_dir() else [found]) if path.suffix in READERS]
        if not files:
            endings = ", ".join(READERS)
            raise SystemExit(f"expected --data to be a file ending in {endings}, or a folder of such, got {source!r}")
        read = lambda path: datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train")
        return {path.stem: read(path) for path in files}
    path, _, name = source.partition(":")
    with from_hub(path, "--data"):
        return dict(datasets.load_dataset(path, name or None))


def load_splits(
    source: str, rows: int, validation: int, test: int, seed: int, held_out: Sequence[str] = ("test", "validation"),
    classes: bool = False,
):  # fmt: skip
    """Train, validation and test rows of what `read_splits` reads, no row in two of them.

    Where no other split has labels, the test rows are taken from the one that is trained on: the same for every seed,
    and at most half of it. Of a small split a quarter is left for validation.

    Args:
        source: as for `read_splits`.
        rows, validation, test: at most so many of each.
        seed: of the order in which train and validation rows are taken.
        held_out: beginnings of the names of the split that is tested on, the preferred one first.
        classes: make classes 0, 1, ... of labels that are texts, in alphabetical order over all splits.
    """
    splits = read_splits(source)
    if classes:
        splits = _with_classes(splits)
    by_prefix = lambda *words: next((splits[n] for w in words for n in splits if n.startswith(w)), None)
    trained_on = next((name for name in splits if name.startswith("train")), next(iter(splits)))
    everything = splits.pop(trained_on)
    held = by_prefix(*held_out)
    if held is None or _unlabelled(held):
        held = by_prefix("validation")
    if held is None:
        mixed, count = everything.shuffle(seed=0), min(test, len(everything) // 2)
        held, everything = mixed.select(range(count)), mixed.select(range(count, len(mixed)))
    everything = everything.shuffle(seed=seed)
    rows = min(rows, len(everything) - min(validation, len(everything) // 4))
    # datasets refuses an empty range that begins at the end.
    pick = lambda start, count: everything.select(range(start, min(start + count, len(everything))) or [])
    # Many data sets are sorted by label.
    return pick(0, rows), pick(rows, validation), held.shuffle(seed=0).select(range(min(test, len(held))))


def _with_classes(splits: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
    is_text = lambda rows: getattr(rows.features.get("label"), "dtype", None) in ("string", "large_string")
    texts = {name: rows for name, rows in splits.items() if is_text(rows)}
    names = sorted({label for rows in texts.values() for label in rows.unique("label") if label})
    as_class = lambda row: {"label": names.index(row["label"]) if row["label"] else -1}
    features = lambda rows: datasets.Features(rows.features | {"label": datasets.ClassLabel(names=names)})
    return splits | {name: rows.map(as_class, features=features(rows)) for name, rows in texts.items()}


def _unlabelled(rows: datasets.Dataset) -> bool:
    """Whether the labels are kept back, as those of many test splits are."""
    first = lambda *columns: [value for name in columns if name in rows.column_names for value in rows[name][:50]]
    missing = [value is None or (isinstance(value, int) and value < 0) for value in first("label", "labels")]
    return (bool(missing) and all(missing)) or "" in first("answerKey")


def count_classes(*splits: datasets.Dataset) -> int:
    """C of splits whose column "label" or "labels" holds classes; a SystemExit where one holds anything else."""
    largest = 0
    for rows in splits:
        name = next((name for name in ("label", "labels") if name in rows.column_names), None)
        if name is None:
            raise SystemExit(f"expected --data with a column 'label' in every split, got columns {rows.column_names}")
        values = rows[name][:]
        wrong = [value for value in values if not isinstance(value, int) or value < 0]
        if wrong:
            raise SystemExit(
                f"expected classes 0, 1, ... in the column {name!r} of --data, got {wrong[0]!r}; write "
                f"dataset.class_encode_column({name!r}), drop rows without a label, and save it again"
            )
        largest = max([largest, getattr(rows.features[name], "num_classes", 0), *(value + 1 for value in values)])
    return largest


def load_base(name: str, classes: int, mean_pool: bool, dtype: str):
    """A classifier on a pretrained base, and its tokenizer."""
    if name == "builtin":
        return builtin_base(classes)
    tokenizer = tokenizer_of(name)
    with from_hub(name, "--base"):
        if mean_pool:
            return MeanPoolClassifier(AutoModel.from_pretrained(name, dtype=dtype), classes), tokenizer
        config = AutoConfig.from_pretrained(name, num_labels=classes)
        config.pad_token_id = tokenizer.pad_token_id
        return AutoModelForSequenceClassification.from_pretrained(name, config=config, dtype=dtype), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="builtin", help="hub id or folder; 'builtin' is MiniLM")
    parser.add_argument("--mean-pool", action="store_true", help="mean pooling, for sentence encoders")
    parser.add_argument("--data", required=True, help="file, folder with one per split, or hub name (name:config)")
    by_scale = [name for name in lb.priors.__all__ if name not in ("Learned", "SingularValues")]
    parser.add_argument("--prior", default="Normal", choices=by_scale)
    parser.add_argument("--prior-scale", type=float, default=0.1)
    parser.add_argument("--guide", default="LowRankPrecision", choices=GUIDES)
    parser.add_argument("--guide-rank", type=int, default=8)
    parser.add_argument("--adapter", default="LoRAXS", choices=["LoRAXS", "LoRA"])
    parser.add_argument("--projection", default="Gradient", choices=["SVD", "Gradient", "Random"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--layers", type=int, nargs="*")
    parser.add_argument("--head", default="point", choices=["point", "bayesian", "frozen"])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--test-rows", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--checkpoint", type=Path, help="folder written every epoch; an interrupted fit goes on from it"
    )
    parser.add_argument("--resume", action="store_true", help="there must be a fit in --checkpoint to go on with")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.resume and args.checkpoint is None:
        parser.error("expected --checkpoint FOLDER with --resume")
    processes = Processes(args.device)
    train, validation, test = load_splits(args.data, args.rows, 300, args.test_rows, args.seed, classes=True)
    network, tokenizer = load_base(args.base, count_classes(train, validation, test), args.mean_pool, args.dtype)
    where = {"rank": args.rank, "targets": args.targets, "layers": args.layers}
    if args.adapter == "LoRAXS":
        where["projection"] = getattr(lb.projections, args.projection)()
    prior = getattr(lb.priors, args.prior)(args.prior_scale)
    model = lb.BayesianLoRA(network, getattr(lb, args.adapter)(**where), prior, head=args.head, tokenizer=tokenizer)
    guide = getattr(lb.guides, args.guide)(**({"rank": args.guide_rank} if "Low" in args.guide else {}))
    posterior = lb.fit(
        model,
        train,
        validation=validation,
        guide=guide,
        epochs=args.epochs,
        device=args.device,
        seed=args.seed,
        **{"resume_from" if args.resume else "checkpoint": args.checkpoint},
    )
    processes.part()
    if args.out:
        posterior.save(args.out)
    table = lb.compare({args.guide: posterior}, test, validation=validation, draws=args.draws)
    print(posterior, table.T.to_string(float_format="{:.4f}".format), sep="\n")


if __name__ == "__main__":
    main()
