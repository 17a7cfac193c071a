"""Fits that tests/test_data_parallel.py runs in one process and, as a script under torchrun, in several.

torchrun --nproc-per-node 2 tests/data_parallel_fits.py FOLDER
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from conftest import tiny_bert, tiny_reviews, tiny_tokenizer, token_batches
from pyro.infer.autoguide import AutoNormal
from safetensors.torch import save_file

import pyro_lrblora as lb

UNEVEN = tiny_reviews(21)  # the last batch of 8 has 5 rows
LONELY = tiny_reviews(17)  # the last one has a single row: a process is left without any


def model(prior=lb.priors.Normal(0.1), projection=lb.projections.SVD(), **options):
    options = {"head_scale": 1.0, "tokenizer": tiny_tokenizer()} | options
    return lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2, projection), prior, **options)


def fit(model, train=UNEVEN, **options):
    return lb.fit(model, train, **({"epochs": 2, "batch_size": 8, "progress": False} | options))


def loading_another_head(rank: int):
    """A network whose head is drawn anew in every process, as from_pretrained does."""
    network = tiny_bert()
    with torch.no_grad():
        network.classifier.weight += rank
    prepared = lb.BayesianLoRA(network, lb.LoRAXS(2), tokenizer=tiny_tokenizer()).prepare(UNEVEN, probe=False)
    return fit(prepared, guide=lb.guides.Diagonal(), warm_start=False)


hierarchical = lb.priors.LayerScale(0.1)
FITS = {
    "a draw per row": lambda rank: fit(
        model(projection=lb.projections.Gradient()),
        guide=lb.guides.LowRankPrecision(2),
        validation=tiny_reviews(20, seed=3),
    ),
    "accumulated": lambda rank: fit(model(), accumulate=2, guide=lb.guides.LowRank(2)),
    "mirrored draws": lambda rank: fit(model(), LONELY, guide=lb.guides.LowRank(2), antithetic=True),
    "particles and scales": lambda rank: fit(model(hierarchical), LONELY, guide=lb.guides.Diagonal(), particles=2),
    "path derivative": lambda rank: fit(model(), guide=lb.guides.Diagonal(), path_derivative=True),
    "shared draws, Bayesian head": lambda rank: fit(
        model(hierarchical, head="bayesian"), guide=lb.guides.Diagonal(), draws="shared"
    ),
    "a stock guide": lambda rank: fit(model(hierarchical), guide=AutoNormal),
    "a point, batches of one's own": lambda rank: fit(
        model(), token_batches(20), guide=lb.guides.Delta(), map_epochs=1
    ),
    "a head drawn anew": loading_another_head,
}


def results(posterior) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Parameters, and the numbers of the history without seconds."""
    tensors = dict(posterior.guide.state_dict()) | posterior.head()
    numbers = lambda row: {k: v for k, v in row.items() if k != "seconds" and v is not None}
    history = [numbers(row) for row in posterior.history]
    return {name: value.detach().contiguous() for name, value in tensors.items()}, history


def cut_off_and_resumed(folder: Path):
    """Written by the first process, read by both."""
    options = {"guide": lb.guides.Diagonal(), "epochs": 3}
    fit(model(), checkpoint=folder, callbacks=[lambda row, _: row["epoch"] == 1], **options)
    return fit(model(), resume_from=folder, **options)


def main(folder: Path) -> None:
    import accelerate

    state = accelerate.PartialState(cpu=True)
    rank = state.process_index
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", lb.ScalesNotConverged)
    fits = {name: run(rank) for name, run in FITS.items()}
    fits["resumed"] = cut_off_and_resumed(folder / "checkpoint")
    fits["dropout"] = fit(model(dropout=True), guide=lb.guides.Diagonal(), draws="shared")
    seen = []
    fits["stopped"] = fit(model(), epochs=5, callbacks=[lambda row, _: seen.append(row["epoch"]) or row["epoch"] == 2])
    try:
        fit(model(), UNEVEN.select(range(20 + rank)))
    except ValueError as error:
        refused = str(error)
    report = {"callbacks": seen, "refused": refused, "histories": {}}
    for name, posterior in fits.items():
        tensors, report["histories"][name] = results(posterior)
        save_file(tensors, folder / f"{name} {rank}.safetensors")
    (folder / f"report {rank}.json").write_text(json.dumps(report))
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
