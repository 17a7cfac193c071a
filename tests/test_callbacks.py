"""What follows a fit from outside: TensorBoard, Weights & Biases, and the library's logger."""

import importlib.machinery
import logging
import sys
import types

import pytest
from conftest import tiny_bert, token_batches

import pyro_lrblora as lb

pytestmark = pytest.mark.filterwarnings("ignore::pyro_lrblora.ScalesNotConverged")


def fit(**options):
    model = lb.BayesianLoRA(tiny_bert(), lb.LoRAXS(2), head_scale=1.0)
    return lb.fit(model, token_batches(16), validation=token_batches(8), epochs=3, progress=False, **options)


def numbers(row):
    return {name: value for name, value in row.items() if name != "step" and value is not None}


@pytest.fixture
def pretend(monkeypatch):
    """Put a module that is not installed in place."""

    def place(name, **contents):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)

    return place


class Recorder:
    """A SummaryWriter and a run of W&B that remember what they are given."""

    def __init__(self, *args, **options):
        self.begun, self.rows, self.flushed = (args, options), {}, 0

    def add_scalar(self, name, value, step):
        self.rows.setdefault(step, {})[name] = value

    def flush(self):
        self.flushed += 1

    def log(self, values, step):
        self.rows[step] = values


def test_tensorboard_gets_every_number_of_every_epoch(pretend, tmp_path):
    made = []
    pretend("tensorboard")
    pretend("torch.utils.tensorboard", SummaryWriter=lambda *args: made.append(Recorder(*args)) or made[-1])
    callback = lb.callbacks.TensorBoard(tmp_path / "run")
    assert made == []
    posterior = fit(callbacks=[callback])
    (writer,) = made
    assert writer.begun == ((str(tmp_path / "run"),), {})
    assert writer.rows == {row["step"]: numbers(row) for row in posterior.history}
    assert {"elbo", "kl", "mean_log_sd", "validation_nll"} <= writer.rows[2].keys()
    assert writer.flushed == 3


def test_tensorboards_own_reader_reads_it_back(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    point = fit(callbacks=[lb.callbacks.TensorBoard(tmp_path)], guide=lb.guides.Delta())
    read = EventAccumulator(str(tmp_path)).Reload()
    assert set(read.Tags()["scalars"]) == set(numbers(point.history[0]))  # a point has no scales
    for name in numbers(point.history[0]):
        seen = {event.step: event.value for event in read.Scalars(name)}
        assert seen == {row["step"]: pytest.approx(row[name], rel=1e-6) for row in point.history}


def test_wandb_gets_the_rows_and_the_arguments_of_the_fit(pretend):
    made = []
    pretend("wandb", init=lambda **options: made.append(Recorder(**options)) or made[-1])
    callback = lb.callbacks.WandB(project="mine", mode="offline")
    posterior = fit(callbacks=[callback])
    (run,) = made
    assert callback.run is run
    assert run.begun == ((), {"config": posterior.settings, "project": "mine", "mode": "offline"})
    assert run.rows == {row["step"]: numbers(row) for row in posterior.history}


@pytest.mark.parametrize(
    ("package", "make"),
    [("tensorboard", lambda: lb.callbacks.TensorBoard("run")), ("wandb", lambda: lb.callbacks.WandB(project="mine"))],
)
def test_a_package_that_is_missing_is_named_before_any_work(package, make, monkeypatch):
    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", lambda *_: None)
    monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {package}"):
        make()


def test_epochs_are_logged_at_info_and_nothing_is_configured(caplog):
    logger = logging.getLogger("pyro_lrblora")
    with caplog.at_level(logging.INFO, "pyro_lrblora"):
        posterior = fit()
    assert (logger.handlers, logger.propagate) == ([], True)
    lines = [record.getMessage() for record in caplog.records if record.name == "pyro_lrblora"]
    assert len(lines) == 3
    for line, row in zip(lines, posterior.history, strict=True):
        told = dict(part.split(" ") for part in line.split(", "))
        assert {name: float(value) for name, value in told.items()} == pytest.approx(row, rel=1e-3)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "pyro_lrblora"):
        fit()
    assert caplog.records == []
