"""Stochastic-gradient Langevin dynamics (Welling and Teh 2011)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model import BayesianLoRA
from ..posterior import Posterior, local_parameters
from .chains import posterior_of_chains
from .stochastic_gradients import check_step, stochastic_gradient_chains


@local_parameters
def sgld(
    model: BayesianLoRA,
    train,
    *,
    draws: int = 500,
    burn_in: int = 1000,
    thin: int = 10,
    step_size: float = 0.1,
    batch_size: int = 32,
    chains: int = 1,
    init: Posterior | None = None,
    seed: int = 0,
    progress: bool = True,
    tokenizer=None,
) -> Posterior:
    """Draw from the posterior by preconditioned stochastic-gradient Langevin dynamics with a constant step size h.

    theta += h/2 G g + sqrt(h G) xi, where g is the gradient of the log joint, its likelihood scaled from the batch to N
    rows (in batches of several sizes such that every row counts once per pass), and xi is standard normal. The
    preconditioner G is diagonal and constant, so the correction term of Li et al. (arXiv 1512.07666, equation 8) is
    zero: 1 / (diagonals of the prior precision and the Fisher matrix) at the start, divided by the largest eigenvalue
    of the curvature in those units. So h means the same for every model: the posterior variance comes out too large by
    at most about h N / (4 B) in the stiffest direction, in relative terms, and less elsewhere: that is with rows drawn
    anew for every batch, and a pass, in which each row comes once, has less noise. There is no accept step. Neither
    the model, nor the network, nor Pyro's param store is changed.

    Args:
        model: prepared or not, with head="bayesian", a fixed or a frozen head, and a prior without constrained sites
            that is no mixture.
        train: a datasets.Dataset, Batches, or a re-iterable of batch dicts, with labels.
        draws: S per chain that are kept.
        burn_in: steps before the first.
        thin: steps between two draws.
        step_size: h, positive and below 4; above it a full-batch chain explodes.
        batch_size: B, rows per step, for a datasets.Dataset.
        chains: run one after the other, all from the same start.
        init: start at the mean of this posterior, in its subspace; None is the pretrained network.
        seed: of everything random here.
        progress: show a progress bar.
        tokenizer: for a datasets.Dataset, where the model has none.

    Returns:
        A posterior whose settings hold r_hat (largest), ess (smallest bulk) and seconds.

    Raises:
        ValueError, TypeError, KeyError: a point head, bad arguments or data, a prior with constrained sites or that is
            a mixture (SpikeSlab).
        FloatingPointError: NaN or infinite log joint or gradient; names the batch.

    Warns:
        ChainsNotConverged: the largest R-hat is above 1.05.
    """
    check_step("step_size", step_size, 4.0)

    def update(position: Tensor, momentum: Tensor, gradient: Tensor, scale: Tensor) -> None:
        noise = torch.randn_like(position)
        position += 0.5 * step_size * scale * gradient + (step_size * scale).sqrt() * noise

    result = stochastic_gradient_chains(
        update, model, train, draws=draws, burn_in=burn_in, thin=thin, batch_size=batch_size, chains=chains, init=init,
        seed=seed, progress=progress, tokenizer=tokenizer, settings={"method": "sgld", "step_size": step_size},
    )  # fmt: skip
    return posterior_of_chains(*result)
