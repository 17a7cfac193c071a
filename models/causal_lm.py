"""Fine-tune a causal language model on texts, compare a posterior with the point, and write with uncertainty.

python models/causal_lm.py --base gpt2 --data roneneldan/TinyStories --prompt "One day"

Under `torchrun --nproc-per-node 4 ...` or `accelerate launch ...` the processes share the rows of every batch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from loading import from_hub, tokenizer_of
from processes import Processes
from sequence_classification import GUIDES, load_splits
from transformers import AutoModelForCausalLM

import pyro_lrblora as lb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="hub id or folder of a causal language model")
    parser.add_argument("--data", required=True, help="file or folder of texts, or hub name (name:config)")
    parser.add_argument("--text", default="text", help="column of texts")
    parser.add_argument("--prompt-column", help="column of prompts, which are read but not scored")
    parser.add_argument("--prompt", nargs="+", default=["One day"], help="to be continued")
    parser.add_argument("--new-tokens", type=int, default=32, help="written after each prompt, at most")
    parser.add_argument("--guides", nargs="+", default=["Delta", "LowRankPrecision"], choices=GUIDES)
    parser.add_argument("--prior-scale", type=float, default=0.1)
    parser.add_argument("--projection", default="Gradient", choices=["SVD", "WhitenedSVD", "Gradient", "Random"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--layers", type=int, nargs="*")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--validation-rows", type=int, default=100, help="scored after every epoch")
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    processes, tokenizer = Processes(args.device), tokenizer_of(args.base)
    with from_hub(args.base, "--base"):
        network = AutoModelForCausalLM.from_pretrained(args.base, dtype=args.dtype).to(args.device)
    splits = load_splits(args.data, args.rows, args.validation_rows, args.test_rows, args.seed)
    train, validation, test = (
        lb.data.Texts(
            rows, tokenizer, text=args.text, prompt=args.prompt_column, max_length=args.max_length,
            batch_size=args.batch_size, shuffle=shuffle, by_length=shuffle is None,
        )
        for rows, shuffle in zip(splits, (args.seed, None, None), strict=True)
    )  # fmt: skip
    adapter = lb.LoRAXS(args.rank, getattr(lb.projections, args.projection)(), args.targets, args.layers)
    model = lb.BayesianLoRA(
        network, adapter, lb.priors.Normal(args.prior_scale), lb.likelihoods.NextToken(), tokenizer=tokenizer
    ).prepare(train)
    model.check_labels(test, "test data")
    if processes.first:
        print(f"{len(model.modules)} adapted modules, {model.sites.size} latents, {train.rows} texts")
    untrained = lb.Posterior(model, lb.guides.Delta()(model), lb.guides.Delta())
    posteriors = {"base": untrained} | {
        name: lb.fit(
            model, train, validation=validation, guide=getattr(lb.guides, name)(), epochs=args.epochs, seed=args.seed
        )
        for name in args.guides
    }
    processes.part()
    last = posteriors[args.guides[-1]]
    if args.out:
        last.save(args.out)
    table = lb.compare(posteriors, test, train=train, draws=args.draws)
    print(table)
    if args.out:
        table.to_csv(args.out / "table.csv")
    written = lb.generate(last, args.prompt, draws=args.draws, max_new_tokens=args.new_tokens)
    for prompt, text, entropy, model_part in zip(
        args.prompt, written.texts, written.sequence_entropy, written.sequence_mutual_information, strict=True
    ):
        print(f"\n{prompt} | {text}\n  {entropy:.3f} nats per token, {model_part:.3f} of them the model's")


if __name__ == "__main__":
    main()
