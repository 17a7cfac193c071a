"""Peak memory of the diagnostics on 2,000 rows x 500 draws x D = 15,360 latents, beyond imports, network and posterior.

python tests/benchmarks/diagnostics_memory.py        # prints Markdown, the table of docs/results/diagnostics_memory.md
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
import warnings

import pandas as pd
import torch
from torch import nn

import pyro_lrblora as lb
from pyro_lrblora.arviz_io import psis
from pyro_lrblora.diagnostics import against_reference, structure
from pyro_lrblora.evidence import importance


class Deep(nn.Module):
    """Linear layers in a row; the first three outputs are the logits."""

    def __init__(self, layers: int = 60, width: int = 16):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))

    def forward(self, x):
        return self.layers(x)[:, :3]


def problem(rows: int):
    """A posterior of 60 modules of rank 16, and its rows."""
    torch.manual_seed(0)
    network = Deep().requires_grad_(False)
    for layer in network.layers:
        nn.init.orthogonal_(layer.weight)
    model = lb.BayesianLoRA(
        network, lb.LoRAXS(16, lb.projections.Random(), targets="all-linear"), lb.priors.Normal(0.02), head="frozen",
        size=rows,
    )  # fmt: skip
    spec = lb.guides.LowRank(8, start_scale=1.0)
    batches = [{"x": torch.randn(500, 16), "labels": torch.randint(3, (500,))} for _ in range(rows // 500)]
    return lb.Posterior(model, spec(model), spec), batches


def peak(work) -> tuple[float, float]:
    """Megabytes above where it began, and seconds, in a process of its own."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def run():
        before, begun = resident(), time.perf_counter()
        work()
        queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before, time.perf_counter() - begun))

    process = context.Process(target=run)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"expected the work to end well, its process ended with {process.exitcode}")
    return queue.get()


def resident() -> float:
    """Megabytes in memory now (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000, help="a multiple of 500")
    parser.add_argument("--draws", type=int, default=500)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    posterior, data = problem(args.rows)
    psis(torch.randn(2, 50).double().numpy())  # ArviZ is imported before anything is measured
    draws = args.draws
    work = {
        "posterior.sample": lambda: posterior.sample(draws, seed=0),
        "structure": lambda: structure(posterior, draws=draws),
        "ELBO, k-hat, LOO": lambda: importance(posterior, data, draws=draws).loo,
        "predict": lambda: lb.predict(posterior, data, draws=draws),
        "against_reference": lambda: against_reference(posterior, posterior, data, draws=draws),
        "diagnose, all of it": lambda: lb.diagnose(
            posterior, data, train=data, validation=data, outside=data, reference=posterior, draws=draws,
            evidence_draws=draws,
        ),
    }  # fmt: skip
    size = posterior.model.sites.size
    print(f"D = {size:,}, {args.rows:,} rows, {draws} draws; D x D would be {4 * size**2 / 2**20:,.0f} MB in float32")
    print(f"imports, network and posterior: {resident():.0f} MB\n")
    table = pd.DataFrame({name: peak(part) for name, part in work.items()}, index=["peak MB", "seconds"]).T
    print(table.round(0).astype(int).to_markdown())


if __name__ == "__main__":
    main()
