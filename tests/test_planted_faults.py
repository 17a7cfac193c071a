"""Planted faults are caught by the checks that should catch them, and what is right raises no alarm."""

import pytest
import torch
from planted_faults import (
    POSTERIOR_FAULTS,
    PREDICTION_FAULTS,
    Classification,
    calibrated,
    posterior_cells,
    prediction_cells,
    problem,
)
from truth import exact

from pyro_lrblora.evidence import importance

pytestmark = pytest.mark.filterwarnings("ignore")
EXACT, NARROW = "none: the exact posterior", "sd x 0.5"
# The others, and what needs another fit, are left to tests/benchmarks/planted_faults.py.
LEFT = ("one module of three left at the prior", "two modules of three left at the prior")
POSTERIORS = (EXACT, NARROW, "correlations removed", *LEFT)
PREDICTIONS = ("none: fitted to convergence", NARROW, "logits x 3", "test labels of the opposite rule")


@pytest.fixture(scope="module")
def target():
    return problem()


@pytest.fixture(scope="module")
def task():
    torch.set_num_threads(1)
    return Classification()


def unexpected(cells, fault):
    return {c: (cell, fault.expected(c)) for c, cell in cells.items() if fault.expected(c) not in (cell, "either")}


def test_the_target_can_tell(target):
    """The exact posterior has constant weights; its correlations are worth removing."""
    assert importance(exact(target), [target.batch], draws=100).k_hat < 0.3
    covariance = target.precision.inverse()
    correlation = covariance / covariance.diagonal().sqrt().outer(covariance.diagonal().sqrt())
    assert float((correlation - torch.eye(12)).square().sum() / 132) ** 0.5 > 0.2


@pytest.mark.parametrize("name", POSTERIORS)
def test_a_fault_of_the_posterior_is_seen_where_it_should_be(name, target):
    assert unexpected(posterior_cells(name, target), POSTERIOR_FAULTS[name]) == {}


@pytest.mark.parametrize(("name", "uniform"), [(EXACT, True), (NARROW, False)])
def test_simulation_based_calibration_of_exact_refits(name, uniform, target):
    assert calibrated(target, POSTERIOR_FAULTS[name].plant, 40).uniform == uniform


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_fault_of_the_predictions_is_seen_where_it_should_be(name, task):
    assert unexpected(prediction_cells(name, task), PREDICTION_FAULTS[name]) == {}
    assert task.network.sharpness == 1.0
