"""Two processes that share the rows of every batch end where one process ends."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_parallel_fits import FITS, cut_off_and_resumed, fit, model, results
from safetensors.torch import load_file

import pyro_lrblora as lb
from pyro_lrblora.infer.data_parallel import Workers

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")

SCRIPT = Path(__file__).with_name("data_parallel_fits.py")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What the two processes of one run report: by name, a pair of parameters; and a pair of all else."""
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*run, "--master-port", str(port), str(SCRIPT), str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads((folder / f"report {rank}.json").read_text()) for rank in (0, 1)]
    tensors = {
        name: [load_file(folder / f"{name} {rank}.safetensors") for rank in (0, 1)] for name in reports[0]["histories"]
    }
    return tensors, reports


@pytest.mark.parametrize("name", [*FITS, "resumed"])
def test_the_same_as_one_process(name, two_processes, tmp_path):
    tensors, reports = two_processes
    alone, history = results(FITS[name](0) if name in FITS else cut_off_and_resumed(tmp_path))
    first = tensors[name][0]
    assert first.keys() == alone.keys()
    # Not bit for bit: sums over rows are added up in another order.
    assert max(float((first[key] - value).abs().max()) for key, value in alone.items()) < 1e-5
    assert reports[0]["histories"][name] == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in history]


def test_both_processes_end_with_the_same_bits(two_processes):
    tensors, reports = two_processes
    for name, (first, second) in tensors.items():
        assert [key for key in first if not torch.equal(first[key], second[key])] == [], name
    assert reports[0]["histories"] == reports[1]["histories"]


def test_only_the_first_calls_back_and_its_answer_counts_for_both(two_processes):
    _, reports = two_processes
    assert [report["callbacks"] for report in reports] == [[1, 2], []]
    assert [len(report["histories"]["stopped"]) for report in reports] == [2, 2]


def test_dropout_is_each_processs_own_and_leaves_the_common_stream_alone():
    """Masks that are the same in both would drop the halves of a batch alike; draws must stay the same in both."""

    class Dropping:
        dropout = True

        def __call__(self, rows):
            return torch.rand(rows)[:4]

    masks, draws = [], []
    for rank in (0, 1):
        torch.manual_seed(3)
        workers = Workers()
        workers.rank, workers.size = rank, 2
        program, _ = workers.programs(Dropping(), None, per_row=False, antithetic=False)
        masks.append([program(4 + rank), program(4 + rank)])
        draws.append(torch.rand(3))
    assert torch.equal(*draws)
    assert not torch.equal(masks[0][0], masks[1][0])
    assert not torch.equal(*masks[0])


def test_processes_with_other_rows_are_refused_in_both(two_processes):
    for report in two_processes[1]:
        assert "got other ['training data', 'batches'] in process 1" in report["refused"]


def test_processes_that_are_no_group_are_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match="one of 2 processes, but they fit apart"):
        fit(model(), guide=lb.guides.Delta(), epochs=1)
