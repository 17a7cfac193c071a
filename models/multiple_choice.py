"""Fine-tune on multiple choice: an encoder that scores question and choice, or a language model asked for it.

python models/multiple_choice.py --base builtin --data FOLDER
python models/multiple_choice.py --base meta-llama/Llama-2-7b-hf --form letter --data allenai/ai2_arc:ARC-Easy

Under `torchrun --nproc-per-node 4 ...` or `accelerate launch ...` the processes share the rows of every batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import datasets
import torch
from loading import from_hub, tokenizer_of
from processes import Processes
from sequence_classification import GUIDES, load_splits
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMultipleChoice

import pyro_lrblora as lb
from pyro_lrblora.networks import AnswerScorer, MeanPoolClassifier, builtin_base


def load(base: str, form: str, mean_pool: bool, dtype: str, choices: int):
    """The network of a form, its tokenizer, the likelihood, and what turns rows into batches."""
    likelihood = lb.likelihoods.MultipleChoice()
    if form == "pair":
        if base == "builtin":
            network, tokenizer = builtin_base(num_labels=1)
            return network, tokenizer, likelihood, lb.data.Choices
        tokenizer = tokenizer_of(base)
        with from_hub(base, "--base"):
            if mean_pool:
                network = MeanPoolClassifier(AutoModel.from_pretrained(base, dtype=dtype), 1)
            else:
                network = AutoModelForMultipleChoice.from_pretrained(base, dtype=dtype)
        return network, tokenizer, likelihood, lb.data.Choices
    tokenizer = tokenizer_of(base)
    with from_hub(base, "--base"):
        network = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if form == "answer":
        batches = lambda *args, **options: lb.data.Choices(*args, pair=False, **options)
        return AnswerScorer(network, per_token=True), tokenizer, likelihood, batches
    letters = letters_of(tokenizer, choices)
    return network, tokenizer, lb.likelihoods.MultipleChoice(letters), lb.data.Letters


def letters_of(tokenizer, choices: int) -> tuple[int, ...]:
    """The letters' tokens as they follow a space, or nothing where the vocabulary has no token for space and letter."""
    try:
        return lb.likelihoods.letter_tokens(tokenizer, choices)
    except ValueError:
        return lb.likelihoods.letter_tokens(tokenizer, choices, prefix="")


def science(row: Mapping, question: str = "question") -> dict:
    """A row of ARC, OpenBookQA or CommonsenseQA; the hub has choices with their letters, and the answer's letter."""
    choices, label = row["choices"], row.get("label")
    if isinstance(choices, Mapping):
        choices, label = choices["text"], choices["label"].index(row["answerKey"])
    return {"question": row.get(question) or row["question_stem"], "choices": list(choices), "label": label}


def items_of(rows: datasets.Dataset, question: str) -> datasets.Dataset:
    """Rows with a list of choices and the index of the right one, as lb.data takes them, whatever they came as."""
    if len(rows) == 0 or not isinstance(rows[0]["choices"], Mapping):
        return rows
    items = rows.map(lambda row: science(row, question), remove_columns=rows.column_names)
    return items if question == "question" else items.rename_column("question", question)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="builtin", help="hub id or folder; 'builtin' is MiniLM")
    parser.add_argument("--form", default="pair", choices=["pair", "answer", "letter"])
    parser.add_argument("--mean-pool", action="store_true", help="mean pooling, for sentence encoders")
    parser.add_argument("--data", required=True, help="file, folder with one per split, or hub name (name:config)")
    parser.add_argument("--question", default="question")
    parser.add_argument("--choices", type=int, default=4, help="items with another number of choices are left out")
    parser.add_argument("--guides", nargs="+", default=["Delta", "LowRankPrecision"], choices=GUIDES)
    parser.add_argument("--prior-scale", type=float, default=0.1)
    parser.add_argument("--projection", default="Gradient", choices=["SVD", "WhitenedSVD", "Gradient", "Random"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--layers", type=int, nargs="*")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--validation-rows", type=int, default=200, help="scored after every epoch")
    parser.add_argument("--test-rows", type=int, default=300)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--evidence-draws", type=int, default=30, help="of ELBO and LOO on training rows; 0 for none")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    processes = Processes(args.device)
    network, tokenizer, likelihood, form = load(args.base, args.form, args.mean_pool, args.dtype, args.choices)
    network.to(args.device)
    splits = load_splits(args.data, args.rows, args.validation_rows, args.test_rows, args.seed)
    splits = [items_of(rows, args.question).filter(lambda row: len(row["choices"]) == args.choices) for rows in splits]
    how = {"question": args.question, "batch_size": args.batch_size, "max_length": args.max_length}
    train = form(splits[0], tokenizer, shuffle=args.seed, **how)
    validation, test = (form(rows, tokenizer, by_length=True, **how) for rows in splits[1:])
    adapter = lb.LoRAXS(args.rank, getattr(lb.projections, args.projection)(), args.targets, args.layers)
    model = lb.BayesianLoRA(network, adapter, lb.priors.Normal(args.prior_scale), likelihood, tokenizer=tokenizer)
    model = model.prepare(train)
    model.check_labels(test, "test data")
    if processes.first:
        print(f"{len(model.modules)} adapted modules, {model.sites.size} latents, {train.rows} items")
    posteriors = {
        name: lb.fit(
            model, train, validation=validation, guide=getattr(lb.guides, name)(), epochs=args.epochs, seed=args.seed
        )
        for name in args.guides
    }
    processes.part()
    fitted = {"train": train, "evidence_draws": args.evidence_draws} if args.evidence_draws else {}
    if args.out:
        posteriors[args.guides[-1]].save(args.out)
    table = lb.compare(posteriors, test, validation=validation, draws=args.draws, **fitted)
    print(table)
    if args.out:
        table.to_csv(args.out / "table.csv")


if __name__ == "__main__":
    main()
