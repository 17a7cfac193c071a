"""How a training step's ratio to PEFT LoRA, and a prediction's to a plain forward, change with one thing at a time.

Modules L, rank r, columns K, rows B, draws S; and the milliseconds of a step that are Pyro's and the attachment's own.
The networks are random thin BERTs: what the library adds does not depend on what the weights are, and weighs most where
layers are thin. (D and K of the guide alone: guide_scale.py.)

python tests/benchmarks/sweeps.py        # prints Markdown
"""

from __future__ import annotations

import argparse
import math
import time

import pandas as pd
import pyro
import torch
from step_and_prediction import our_step, peft_lora, peft_step, plain_forward, quiet, table
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import pyro_lrblora as lb
from pyro_lrblora.infer.elbo import PartedELBO, has_closed_form

G = lb.guides


def thin_bert(modules: int, hidden: int):
    """A random BERT with about that many linear modules (6 a layer) and heads of 32."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200, hidden_size=hidden, intermediate_size=2 * hidden, num_attention_heads=hidden // 32,
        num_hidden_layers=math.ceil(modules / 6), max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def measured(repeats: int, modules=36, hidden=128, rank=8, columns=8, rows=16, tokens=32, draws=10, predicted=True):
    """Ratios of one setting, ours first with a draw per row, then with shared draws."""
    batch = {
        "input_ids": torch.randint(1, 200, (rows, tokens)),
        "attention_mask": torch.ones(rows, tokens, dtype=torch.long),
        "labels": torch.randint(2, (rows,)),
    }
    build = lambda: thin_bert(modules, hidden)
    targets = [name for name in dict(build().named_modules()) if name.startswith("bert.encoder.")]
    found = list(lb.BayesianLoRA(build(), lb.LoRAXS(rank, targets=targets)).modules)[:modules]
    adapter, spec = lb.LoRAXS(rank, targets=found), G.LowRankPrecision(columns)
    steps = {"PEFT LoRA": peft_step(peft_lora(build(), found, rank), batch)[0]}
    steps["rows"], predict = our_step(build(), batch, adapter, spec, True, draws)
    steps["shared"], _ = our_step(build(), batch, adapter, spec, False)
    ratios = table(steps, repeats, "step").iloc[:, 1]
    row = {"D": len(found) * rank**2, "step, a draw per row": ratios["rows"], "step, shared draws": ratios["shared"]}
    if predicted:
        calls = {"plain": torch.no_grad()(plain_forward(build(), batch)), "predict": predict}
        row["prediction in plain forwards per draw"] = table(calls, repeats, "").iloc[1, 1] / draws
    return row


class Idle(nn.Module):
    """Linear layers that never run, and a head that does: what is left of a step is not the network's."""

    def __init__(self, modules: int, width: int = 64):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(modules))
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        return self.head(x)


def own_milliseconds(spec, per_row: bool, modules: int = 144, rank: int = 8, rows: int = 32, steps: int = 60) -> dict:
    """Least processor milliseconds of a step: attach and detach; trace, loss and backward. No optimiser."""
    with pyro.settings.context(module_local_params=True):
        adapter = lb.LoRAXS(rank, lb.projections.Random(), targets=r"layers\.\d+")
        model = lb.BayesianLoRA(Idle(modules).eval(), adapter, size=1000, head_modules=["head"])
        guide = spec(model)
        elbo = PartedELBO(has_closed_form(model, guide), model.sites.shapes)
        programs = (model.rowwise, guide.rowwise) if per_row else (model, guide)
        batch = {"x": torch.randn(rows, 64), "labels": torch.randint(2, (rows,))}
        attaching, tracing = [], []
        for _ in range(steps):
            begun = time.process_time()
            with model.attached():
                entered = time.process_time()
                (elbo.differentiable_loss(*programs, batch) / model.size).backward()
                done = time.process_time()
            left = time.process_time()
            attaching.append(entered - begun + left - done)
            tracing.append(done - entered)
    return {
        "attach and detach, ms": 1e3 * min(attaching),
        "Pyro's trace, loss and backward, ms": 1e3 * min(tracing),
        "both, ms": 1e3 * min(a + t for a, t in zip(attaching, tracing, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sweeps = {
        "L": [("modules", value, {"hidden": 64}) for value in (12, 36, 72, 144, 224)],
        "r": [("rank", value, {}) for value in (4, 8, 16, 32, 64)],
        "K": [("columns", value, {"predicted": False}) for value in (1, 4, 16, 64)],
        "B": [("rows", value, {}) for value in (1, 4, 16, 64)],
        "S": [("draws", value, {}) for value in (1, 4, 16, 64)],
    }
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=[*sweeps, "own"], default=[*sweeps, "own"])
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, median of {args.repeats} rounds\n")
    for letter, settings in sweeps.items():
        if letter not in args.only:
            continue
        rows = {f"{letter} = {value}": measured(args.repeats, **{key: value}, **rest) for key, value, rest in settings}
        print(pd.DataFrame(rows).T.to_markdown(floatfmt=("", ",.0f", ".2f", ".2f", ".2f")), end="\n\n", flush=True)
    if "own" not in args.only:
        return
    rows = {}
    for spec in (G.Diagonal(), G.LowRank(8), G.LowRankPrecision(8)):
        for per_row in (False, True):
            rows[f"{type(spec).__name__}, {'a draw per row' if per_row else 'shared'}"] = own_milliseconds(
                spec, per_row
            )
    print("144 modules, 32 rows, the network idle:\n")
    print(pd.DataFrame(rows).T.to_markdown(floatfmt=".1f"))


if __name__ == "__main__":
    main()
