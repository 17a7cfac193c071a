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
from pyro_lrblora.infer.step import Rates, add_gradients, optimiser_of
from pyro_lrblora.infer.step import step as move
from pyro_lrblora.networks import builtin_base
from pyro_lrblora.posterior import local_parameters
from pyro_lrblora.reviews import reviews


def peft_lora(network, names, rank: int):
    """PEFT LoRA in a network's named modules, its head trained too."""
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names, modules_to_save=["classifier"])
    return peft.get_peft_model(network, config).eval()


def peft_step(lora, batch):
    """One step of PEFT LoRA, and one forward."""
    optimiser = torch.optim.Adam([p for p in lora.parameters() if p.requires_grad], lr=1e-4)
    forward = plain_forward(lora, batch)

    def step():
        with torch.enable_grad():
            loss = torch.nn.functional.cross_entropy(forward().logits, batch["labels"])
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step, torch.no_grad()(forward)


def plain_forward(network, batch):
    """A forward of a network as it is."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return lambda: network(**inputs)


def our_step(network, batch, adapter, guide, per_row: bool, draws: int = 10):
    """One step of SVI as `fit` makes it; and a prediction."""
    with pyro.settings.context(module_local_params=True):
        model = lb.BayesianLoRA(network, adapter, size=1000)
        fitted = guide(model)
        elbo = PartedELBO(has_closed_form(model, fitted), model.sites.shapes)
    posterior = lb.Posterior(model, fitted, guide)
    optimiser = optimiser_of(posterior, Rates())
    programs = (model.rowwise, fitted.rowwise) if per_row else (model, fitted)

    @local_parameters
    def step():
        add_gradients(model, elbo, *programs, batch, (0, 1))
        move(optimiser, 10.0)

    batches = lb.data.as_batches([batch])
    return step, lambda: lb.predict(posterior, batches, draws=draws)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()
    quiet()
    _, tokenizer = builtin_base(2)
    batch = next(iter(lb.Batches(reviews(args.batch_size), tokenizer, batch_size=args.batch_size)))
    xs, guides = lb.LoRAXS(args.rank, targets="all-linear"), lb.guides
    names = list(lb.BayesianLoRA(builtin_base(2)[0], xs).modules)
    step, forward = peft_step(peft_lora(builtin_base(2)[0], names, args.rank), batch)
    plain = torch.no_grad()(plain_forward(builtin_base(2)[0].eval(), batch))
    steps, predictions = {"PEFT LoRA": step}, {"base, one forward": plain, "PEFT LoRA, one forward": forward}
    for name, adapter, guide, per_row in (
        ("LoRA, Delta", lb.LoRA(args.rank, "all-linear"), guides.Delta(), False),
        ("LoRA-XS, Delta", xs, guides.Delta(), False),
        ("LoRA-XS, Diagonal, a draw per row", xs, guides.Diagonal(), True),
        ("LoRA-XS, LowRank(8), shared draws", xs, guides.LowRank(8), False),
        ("LoRA-XS, LowRank(8), a draw per row", xs, guides.LowRank(8), True),
        ("LoRA-XS, LowRankPrecision(8), a draw per row", xs, guides.LowRankPrecision(8), True),
    ):
        steps[name], predict = our_step(builtin_base(2)[0].eval(), batch, adapter, guide, per_row)
        if "LowRank" in name:
            predictions[f"{name}, 10 draws"] = predict
    tokens = batch["input_ids"].shape[1]
    print(f"MiniLM, {len(names)} modules, r = {args.rank}, batch {args.batch_size} x {tokens} tokens,")
    print(f"{torch.get_num_threads()} threads, median of {args.repeats} rounds\n")
    print(table(steps, args.repeats, "training step").to_string(float_format="{:.3f}".format), "\n")
    print(table(predictions, args.repeats, "prediction").to_string(float_format="{:.3f}".format))


def quiet() -> None:
    """Keep load reports and warnings out of what is printed as a result."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def table(calls: dict, repeats: int, title: str) -> pd.DataFrame:
    """Median seconds of each call and the median of its ratio to the first call of the same round."""
    # On one thread, the process's own seconds: what other processes take of the machine does not count.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for call in calls.values():
        call()
    rounds = []
    for _ in range(repeats):
        seconds = {}
        for name, call in calls.items():
            begun = clock()
            call()
            seconds[name] = clock() - begun
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
