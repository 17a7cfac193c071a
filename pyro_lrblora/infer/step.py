"""One optimiser step on the ELBO: learning rates, gradients of a batch, and the move."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..data import Batch, naming_the_batch
from ..model import BayesianLoRA
from ..posterior import Posterior
from .elbo import PartedELBO

_UNSCALED = torch.amp.GradScaler("cpu", enabled=False)


@dataclass(frozen=True)
class Rates:
    """Learning rates of Adam, one per kind of parameter.

    Args:
        loc: of means, and of everything that is not named below.
        scale: of parameters with "scale" in their name (log standard deviations: a relative step).
        factor: of parameters with "factor" in their name; smaller, or D x K per-element steps swamp the signal.
        head: of a point head.
    """

    loc: float = 5e-3
    scale: float = 1e-2
    factor: float = 1e-3
    head: float = 1e-3

    def __post_init__(self):
        for name in ("loc", "scale", "factor", "head"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"expected a rate >= 0, got {name}={getattr(self, name)!r}")


def optimiser_of(posterior: Posterior, rates: Rates) -> torch.optim.Optimizer:
    """Adam over the guide, a point head and a learned prior scale, each at its own rate."""
    for parameter in posterior.guide.parameters():
        if any(stride == 0 and size > 1 for stride, size in zip(parameter.stride(), parameter.shape, strict=True)):
            # Expanded from fewer numbers: a fused step would write past their end.
            parameter.data = parameter.data.contiguous()
    options = [{"params": p, "lr": getattr(rates, kind)} for kind, p in parameter_groups(posterior).items()]
    return torch.optim.Adam(options, lr=options[0]["lr"], fused=True)


def parameter_groups(posterior: Posterior) -> dict[str, list[torch.nn.Parameter]]:
    """What a fit trains, by the learning rate it has: loc, scale, factor and head, those that are not empty."""
    head, learned = posterior.model.point_head, posterior.model.learned_scale
    groups: dict[str, list] = {"loc": [], "scale": [], "factor": [], "head": []}
    for name, parameter in posterior.guide.named_parameters():
        kind = name.removeprefix("extra.").split(".")[0]
        groups["factor" if "factor" in kind else "scale" if "scale" in kind else "loc"].append(parameter)
    # Without a density there is no bound, and the log joint has no maximum: it grows as the latents and their prior's
    # scale go to zero together.
    if learned is not None and posterior.has_bound:
        groups["scale"] += learned.parameters()
    if head is not None:
        groups["head"] += head.parameters()
    return {kind: group for kind, group in groups.items() if group}


def add_gradients(
    model: BayesianLoRA,
    elbo: PartedELBO,
    program,
    proposal,
    batch: Batch,
    where: tuple[int, int | None],
    precision: str = "fp32",
    weight: float = 1.0,
    scaler: torch.amp.GradScaler = _UNSCALED,
) -> None:
    """Add the gradients of a batch's estimate of (-ELBO - log prior of a point head) / N, times a weight.

    Args:
        model: owns the head; of `program` and `proposal`, model and guide or their row-wise forms.
        elbo: keeps the estimate in `bound`.
        batch: with labels.
        where: position and epoch, for the message.
        precision: of the network.
        weight: the batch's share of the step.
        scaler: what gradient_scaler returned; the gradients stay scaled until `step`.

    Raises:
        FloatingPointError: NaN or infinite loss; names the batch.
    """
    # The network must carry the adapter through backward, where gradient checkpointing runs layers again.
    with model.attached(precision), naming_the_batch(*where):
        loss = elbo.differentiable_loss(program, proposal, batch)
        loss = (loss + model.head_penalty(model.head_values())) / model.size
        if not loss.isfinite():
            raise FloatingPointError(f"expected a finite loss, got {loss.item()}")
        scaler.scale(loss * weight).backward()


def gradient_scaler(model: BayesianLoRA, precision: str) -> torch.amp.GradScaler:
    """Loss scaling where the network computes in fp16, in which small gradients are zero; else none.

    A step whose gradients overflow is left out, and the scale halved (Micikevicius et al. 2018, arXiv 1710.03740).
    """
    half = precision == "fp16" or any(p.dtype == torch.float16 for p in model.network.parameters())
    # Gradients of the mean over rows are small: from torch's own 2^16 the first steps may be left out.
    return torch.amp.GradScaler(model.device.type, init_scale=2.0**12, enabled=half)


def step(optimiser: torch.optim.Optimizer, clip: float | None, scaler: torch.amp.GradScaler = _UNSCALED) -> None:
    """Move against the gradients, unscaled and their norm clipped, and clear them.

    Raises:
        FloatingPointError: gradients that overflow fp16 at any scale.
    """
    scaler.unscale_(optimiser)
    if clip is not None:
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, clip)
    scaler.step(optimiser)
    scaler.update()
    optimiser.zero_grad()
    if scaler.get_scale() < 1:
        raise FloatingPointError(
            "expected finite gradients in fp16, got overflow at every scale; write precision='bf16'"
        )
