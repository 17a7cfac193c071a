"""Cost of a training step and of a 10-draw prediction, as ratios to deterministic PEFT LoRA in the same run.

Same network, modules, batch and threads; the candidates take turns, so that a busy machine slows them all alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import pandas as pd
import peft
import pyro
import torch
import transformers

import pyro_lrblora as lb
from pyro_lrblora.infer.elbo import PartedELBO, has_closed_form
from pyro_lrblora.networks import builtin_base
from pyro_lrblora.posterior import local_parameters
from pyro_lrblora.reviews import reviews


def peft_step(batch, rank: int):
    """One step of PEFT LoRA on the same modules, with its head trained too; and one plain forward."""
    network, _ = builtin_base(2)
    names = list(lb.BayesianLoRA(network, lb.LoRA(rank, "all-linear")).modules)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names, modules_to_save=["classifier"])
    lora = peft.get_peft_model(network, config).eval()
    optimiser = torch.optim.Adam([p for p in lora.parameters() if p.requires_grad], lr=1e-4)
    inputs = {name: value for name, value in batch.items() if name != "labels"}

    def step():
        loss = torch.nn.functional.cross_entropy(lora(**inputs).logits, batch["labels"])
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    @torch.no_grad()
    def forward():
        lora(**inputs)

    return step, forward


def base_forward(batch):
    """A forward of the network without any adapter."""
    network = builtin_base(2)[0].eval()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return torch.no_grad()(lambda: network(**inputs))


def our_step(batch, adapter, guide, per_row: bool):
    """One step of SVI as `fit` makes it; and a 10-draw prediction."""
    network, _ = builtin_base(2)
    with pyro.settings.context(module_local_params=True):
        model = lb.BayesianLoRA(network, adapter, size=1000)
        fitted = guide(model)
        elbo = PartedELBO(has_closed_form(model, fitted), model.sites.shapes)
    parameters = [*fitted.parameters(), *model.point_head.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=1e-4)
    program, proposal = (model.rowwise, fitted.rowwise) if per_row else (model, fitted)

    @local_parameters
    def step():
        with model.attached():
            loss = elbo.differentiable_loss(program, proposal, batch) + model.head_penalty(model.head_values())
            (loss / model.size).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimiser.step()
        optimiser.zero_grad()

    posterior = lb.Posterior(model, fitted, guide)
    batches = lb.data.as_batches([batch])
    return step, lambda: lb.predict(posterior, batches, draws=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    _, tokenizer = builtin_base(2)
    batch = next(iter(lb.Batches(reviews(args.batch_size), tokenizer, batch_size=args.batch_size)))
    xs, guides = lb.LoRAXS(args.rank, targets="all-linear"), lb.guides
    step, forward = peft_step(batch, args.rank)
    plain = base_forward(batch)
    steps, predictions = {"PEFT LoRA": step}, {"base, one forward": plain, "PEFT LoRA, one forward": forward}
    for name, adapter, guide, per_row in (
        ("LoRA, Delta", lb.LoRA(args.rank, "all-linear"), guides.Delta(), False),
        ("LoRA-XS, Delta", xs, guides.Delta(), False),
        ("LoRA-XS, Diagonal, a draw per row", xs, guides.Diagonal(), True),
        ("LoRA-XS, LowRank(8), shared draws", xs, guides.LowRank(8), False),
        ("LoRA-XS, LowRank(8), a draw per row", xs, guides.LowRank(8), True),
        ("LoRA-XS, LowRankPrecision(8), a draw per row", xs, guides.LowRankPrecision(8), True),
    ):
        steps[name], predict = our_step(batch, adapter, guide, per_row)
        if "LowRank" in name:
            predictions[f"{name}, 10 draws"] = predict
    modules = len(lb.BayesianLoRA(builtin_base(2)[0], xs).modules)
    print(
        f"MiniLM, {modules} modules, r = {args.rank}, batch {args.batch_size} x {batch['input_ids'].shape[1]} tokens,"
    )
    print(f"{torch.get_num_threads()} threads, median of {args.repeats} rounds\n")
    print(table(steps, args.repeats, "training step").to_string(float_format="{:.3f}".format), "\n")
    print(table(predictions, args.repeats, "prediction").to_string(float_format="{:.3f}".format))


def table(calls: dict, repeats: int, title: str) -> pd.DataFrame:
    """Median seconds of each call and the median of its ratio to the first call of the same round."""
    for call in calls.values():
        call()
    rounds = []
    for _ in range(repeats):
        seconds = {}
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            seconds[name] = time.perf_counter() - begun
        rounds.append(seconds)
    first = next(iter(calls))
    rows = {
        name: {
            "seconds": statistics.median(r[name] for r in rounds),
            f"ratio to {first}": statistics.median(r[name] / r[first] for r in rounds),
        }
        for name in calls
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(title)


if __name__ == "__main__":
    main()
