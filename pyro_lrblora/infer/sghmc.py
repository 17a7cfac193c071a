"""Stochastic-gradient Hamiltonian Monte Carlo (Chen, Fox and Guestrin 2014, arXiv 1402.4102)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model import BayesianLoRA
from ..posterior import Posterior, local_parameters
from .chains import posterior_of_chains
from .stochastic_gradients import check_step, stochastic_gradient_chains


@local_parameters
def sghmc(
    model: BayesianLoRA,
    train,
    *,
    draws: int = 500,
    burn_in: int = 1000,
    thin: int = 10,
    step_size: float = 0.02,
    friction: float = 0.1,
    batch_size: int = 32,
    chains: int = 1,
    init: Posterior | None = None,
    seed: int = 0,
    progress: bool = True,
    tokenizer=None,
) -> Posterior:
    """Draw from the posterior by Hamiltonian dynamics with friction a, driven by minibatch gradients.

    v <- (1 - a) v + eta G g + sqrt(2 a eta G) xi, then theta += v: equation 15 of the paper, its estimate of the
    gradient noise set to zero. The gradient g, the preconditioner G and the units of the step eta are those of sgld.
    In the stiffest direction the posterior variance comes out too large by at most about eta / (4 - 2 a) +
    eta (N / B - 1) / (2 a), in relative terms, and by less elsewhere. Slow directions are crossed in fewer steps than
    by sgld.

    Args:
        model: prepared or not, with head="bayesian", a fixed or a frozen head, and a prior without constrained sites
            that is no mixture.
        train: a datasets.Dataset, Batches, or a re-iterable of batch dicts, with labels.
        draws: S per chain that are kept.
        burn_in: steps before the first.
        thin: steps between two draws.
        step_size: eta, the paper's learning rate, positive and below 2.
        friction: a, in (0, 1]; at 1 this is sgld with h = 2 eta.
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
    check_step("step_size", step_size, 2.0)
    if not 0 < friction <= 1:
        raise ValueError(f"expected friction in (0, 1], got friction={friction!r}")

    def update(position: Tensor, momentum: Tensor, gradient: Tensor, scale: Tensor) -> None:
        noise = torch.randn_like(position)
        momentum *= 1 - friction
        momentum += step_size * scale * gradient + (2 * friction * step_size * scale).sqrt() * noise
        position += momentum

    result = stochastic_gradient_chains(
        update, model, train, draws=draws, burn_in=burn_in, thin=thin, batch_size=batch_size, chains=chains, init=init,
        seed=seed, progress=progress, tokenizer=tokenizer,
        settings={"method": "sghmc", "step_size": step_size, "friction": friction},
    )  # fmt: skip
    return posterior_of_chains(*result)
