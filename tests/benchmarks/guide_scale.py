"""Cost of one optimiser step of every guide alone (draw, KL, backward, Adam) as D and K grow, as ratios in one run.

python tests/benchmarks/guide_scale.py        # prints Markdown
"""

from __future__ import annotations

import argparse
import statistics
import time

import pandas as pd
import pyro
import torch
from torch import nn

import pyro_lrblora as lb
from pyro_lrblora.infer.elbo import has_closed_form, latent_kl

G = lb.guides


def one_module(rank: int) -> lb.BayesianLoRA:
    """D = rank^2 latents of one linear layer; its network never runs."""
    network = nn.Sequential(nn.Linear(rank, rank, bias=False))
    return lb.BayesianLoRA(network, lb.LoRAXS(rank, lb.projections.Random(), targets="all-linear"), size=1000)


def many_modules(count: int, rank: int) -> lb.BayesianLoRA:
    """D = count * rank^2 latents."""
    network = nn.Sequential(*(nn.Linear(rank, rank, bias=False) for _ in range(count)))
    return lb.BayesianLoRA(network, lb.LoRAXS(rank, lb.projections.Random(), targets="all-linear"), size=1000)


def seconds_per_step(model, spec, repeats: int = 7) -> float:
    """Median over repeats, after one step that is not counted."""
    with pyro.settings.context(module_local_params=True):
        guide = spec(model)
        closed = has_closed_form(model, guide)
        normal = torch.distributions.Normal(torch.zeros(model.sites.size), 0.1)
        prior = [torch.distributions.Independent(normal, 1)]
        optimiser = torch.optim.Adam(guide.parameters(), lr=1e-3, fused=True)
        target = torch.randn(model.sites.size)
        times = []
        for _ in range(repeats + 1):
            begun = time.process_time()
            q = guide.distribution()
            draw = q.rsample()
            kl = latent_kl(q, prior) if closed else q.log_prob(draw) - normal.log_prob(draw).sum()
            ((draw * target).sum() + kl).backward()
            optimiser.step()
            optimiser.zero_grad()
            times.append(time.process_time() - begun)
    return statistics.median(times[1:])


def growth() -> pd.DataFrame:
    """LowRank and LowRankPrecision over D and K; per latent and column beside the largest D."""
    rows = {}
    for spec in (G.LowRank, G.LowRankPrecision):
        for rank, columns in [(32, 10), (100, 10), (316, 10), (1000, 10), (316, 1), (316, 4), (316, 16), (316, 64)]:
            seconds = seconds_per_step(one_module(rank), spec(columns))
            size = rank**2
            rows[f"{spec.__name__}({columns}), D = {size:,}"] = {
                "ms per step": 1e3 * seconds,
                "ns per latent and (K + 2)": 1e9 * seconds / size / (columns + 2),
            }
    return pd.DataFrame.from_dict(rows, orient="index")


def families() -> pd.DataFrame:
    """Every family at D = 15,040 (235 modules, r = 8), beside Diagonal."""
    model, rows = many_modules(235, 8), {}
    specs = [G.Diagonal(), G.LowRank(10), G.LowRankPrecision(10), G.BlockLowRank(4), G.MatrixNormal()]
    specs += [G.RotatedDiagonal(), G.FullRank(per_module=True), G.Flow(), G.Mixture(4), G.FullRank()]
    for spec in specs:
        try:
            parameters = sum(p.numel() for p in spec(model).parameters())
            seconds = seconds_per_step(model, spec)
            rows[repr(spec)] = {"parameters": parameters, "MB with gradient and Adam": parameters * 16 / 1e6}
            rows[repr(spec)]["ms per step"] = 1e3 * seconds
        except ValueError as error:
            rows[repr(spec)] = {"refused": str(error).split(";")[0]}
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.insert(3, "times Diagonal", table["ms per step"] / table["ms per step"].iloc[0])
    return table


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    for table in (growth(), families()):
        cells = table.map(
            lambda value: "" if pd.isna(value) else f"{value:,.3g}" if isinstance(value, float) else value
        )
        print(cells.to_markdown(disable_numparse=True), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
