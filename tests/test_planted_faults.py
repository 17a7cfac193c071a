"""Planted faults are caught by the checks that should catch them, and what is right raises no alarm."""

import pytest
import torch
from planted_faults import (
    CAUGHT,
    POSTERIOR_FAULTS,
    PREDICTION_FAULTS,
    QUIET,
    Classification,
    calibrated,
    posterior_cells,
    prediction_cells,
    problem,
)
from truth import exact

from pyro_lrblora.evidence import importance

pytestmark = pytest.mark.filterwarnings("ignore")
CONTROL, *REST = PREDICTION_FAULTS
REFITTED = ("training labels shuffled", "training stopped early")  # left to the benchmark, which takes a minute


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


@pytest.mark.parametrize("name", POSTERIOR_FAULTS)
def test_a_fault_of_the_posterior_is_seen_where_it_should_be(name, target):
    assert unexpected(posterior_cells(name, target), POSTERIOR_FAULTS[name]) == {}


@pytest.mark.parametrize(("name", "word"), zip(POSTERIOR_FAULTS, [QUIET, CAUGHT], strict=False))
def test_simulation_based_calibration_of_exact_refits(name, word, target):
    assert calibrated(target, POSTERIOR_FAULTS[name].plant, 60).uniform == (word == QUIET)


@pytest.mark.parametrize("name", [CONTROL, *(name for name in REST if name not in REFITTED)])
def test_a_fault_of_the_predictions_is_seen_where_it_should_be(name, task):
    assert unexpected(prediction_cells(name, task), PREDICTION_FAULTS[name]) == {}
    assert task.network.sharpness == 1.0
