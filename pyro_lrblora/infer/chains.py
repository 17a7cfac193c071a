"""What every Markov chain method needs: where its chains start, the log joint, and whether the chains agree."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import pyro
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_value
from torch import Tensor

from ..arviz_io import convergence
from ..counts import check_counts
from ..data import Batch
from ..guides.draws import Draws, DrawsGuide
from ..model import BayesianLoRA
from ..posterior import Posterior
from ..priors.median import init_to_prior_median
from .start import starting_values

R_HAT = 1.05  # above it, chains are called not converged


class ChainsNotConverged(UserWarning):
    """R-hat says that the chains have not reached one distribution."""


def posterior_of_chains(
    model: BayesianLoRA, draws: Mapping[str, Tensor], history: list[dict], settings: Mapping[str, object]
) -> Posterior:
    """A posterior that holds the draws, with R-hat and ESS in its settings.

    Args:
        model: a copy that is the posterior's own.
        draws: by site, (chains, S, site shape).
        history: one dict per chain.
        settings: the arguments of the run.

    Warns:
        ChainsNotConverged: the largest rank-normalised split R-hat (Vehtari et al. 2021, arXiv 1903.08008) is above
            1.05, or cannot be computed.
    """
    r_hat, ess = convergence(draws)
    if not r_hat <= R_HAT:
        warnings.warn(
            f"the chains have not converged: R-hat is {r_hat:.3f} at its largest (converged is below {R_HAT}), the "
            f"smallest effective sample size {ess:.0f}; draw more, or start from init=",
            ChainsNotConverged,
            stacklevel=4,
        )
    guide = DrawsGuide(draws).to(model.device)
    chains, count = next(iter(draws.values())).shape[:2]
    seconds = sum(row["seconds"] for row in history)
    settings = dict(settings) | {"r_hat": r_hat, "ess": ess, "seconds": seconds}
    return Posterior(model, guide, Draws(chains, count), history, settings)


def check_chain_arguments(model: BayesianLoRA, **counts: int) -> None:
    """Raise a ValueError for a point head, or for a count that is not a positive integer."""
    if model.point_head is not None:
        raise ValueError(
            "expected head='bayesian' or head=lb.fixed_from(posterior) for a Markov chain, got head='point', which is "
            "trained and not sampled; write model.with_head('bayesian')"
        )
    check_counts(**counts)


def starting_point(model: BayesianLoRA, init: Posterior | None) -> dict[str, Tensor]:
    """Every site's value at init's mean, or at the pretrained network with the prior's own sites at their median."""
    known = init_to_value(values=starting_values(model, init), fallback=init_to_prior_median)
    messenger = InitMessenger(known)
    with poutine.block():
        trace = poutine.trace(messenger(model.sample_prior)).get_trace()
    return {name: trace.nodes[name]["value"].detach().clone() for name in trace.stochastic_nodes}


def log_joint(model: BayesianLoRA, batch: Batch, values: Mapping[str, Tensor], weight: float = 1.0) -> Tensor:
    """Log prior plus N / B times a weight times the batch's log likelihood, in nats.

    Args:
        model: attached to its network.
        batch: B rows.
        values: every site of the model.
        weight: what row_weight says, where the value is one of a pass.
    """
    # Validation would turn NaN into an error that names no batch, and costs as much as a small network.
    with poutine.block(), pyro.validation_enabled(False):
        trace = poutine.trace(poutine.condition(model, data=dict(values))).get_trace(batch)
        for name in trace.nodes.keys() - values.keys():
            if trace.nodes[name]["type"] == "sample":
                trace.nodes[name]["scale"] = weight * trace.nodes[name]["scale"]
        return trace.log_prob_sum()
