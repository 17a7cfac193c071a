"""The linearised predictive: logits normal in closed form (Immer et al. 2021, arXiv 2008.08400)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .data import batch_rows
from .likelihoods import check_classes, class_logits
from .passes import watched


def logit_moments(posterior, batches, precision: str = "fp32", progress: bool = False) -> tuple[Tensor, Tensor]:
    """Mean (N, C) and covariance (N, C, C) of the logits of the network linearised at the posterior mean.

    One forward and C backward passes per batch: with a copy of the latents per row, a row's Jacobian J (C, D) is the
    gradient of its own copy, and J Sigma J' needs Sigma times C vectors only. The head stays at its mean.

    Args:
        posterior: Gaussian, or made of stored draws.
        batches: what as_batches returned; labels are optional.
        precision: of the network, "fp32", "bf16" or "fp16".
        progress: show a progress bar once two seconds have passed.

    Raises:
        TypeError: the posterior has no covariance in closed form, or the labels are not classes.
    """
    if hasattr(posterior.model.likelihood, "prediction"):
        raise TypeError(
            f"expected a likelihood of classes for logits, got {posterior.model.likelihood!r}; write "
            f"method='monte_carlo'"
        )
    model, covariance = posterior.model, posterior.covariance()
    mean, head = posterior.mean(), posterior.head()
    loc = model.sites.join(mean)
    means, covariances = [], []
    for batch in watched(batches, "predict", progress):
        batch = model.to_device({k: v for k, v in batch.items() if k != "labels"})
        rows = batch_rows(batch)
        latents = loc.expand(rows, -1).clone().requires_grad_()
        with torch.enable_grad(), model.attached(precision, dropout=False):
            outputs = model.outputs(batch, mean | model.sites.split(latents), head)
            if not means:
                check_classes(model.likelihood, outputs, batch)
            logits = class_logits(model.likelihood, outputs, batch)
            classes = logits.shape[-1]
            jacobian = torch.stack(
                [
                    torch.autograd.grad(logits[:, c].sum(), latents, retain_graph=c < classes - 1)[0]
                    for c in range(classes)
                ],
                dim=1,
            )
        means.append(logits.detach().cpu())
        covariances.append(torch.einsum("bcd,bed->bce", jacobian, covariance.times(jacobian)).cpu())
    order = torch.as_tensor(batches.order)
    back = lambda parts: torch.empty_like(joined := torch.cat(parts)).index_copy_(0, order, joined)
    return back(means), back(covariances)


def draw_logits(mean: Tensor, covariance: Tensor, draws: int, seed: int) -> Tensor:
    """Draws of the logits, (S, N, C), independent between rows.

    Args:
        mean: (N, C).
        covariance: (N, C, C).
        draws: S.
        seed: of the draws.
    """
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    noise = torch.randn(draws, *mean.shape, generator=torch.Generator().manual_seed(seed)).to(root)
    return mean + torch.einsum("nij,snj->sni", root, noise)


def probit_logits(mean: Tensor, covariance: Tensor) -> Tensor:
    """Logits (1, N, C) whose softmax approximates the mean over the normal (MacKay 1992; Gibbs 1997 for C > 2).

    Args:
        mean: (N, C).
        covariance: (N, C, C).
    """
    # A shift common to all logits changes no probability, and must not count as uncertainty.
    shift = mean.mean(-1, keepdim=True)
    centred = covariance - covariance.mean(-1, keepdim=True)
    variance = (centred - centred.mean(-2, keepdim=True)).diagonal(dim1=-2, dim2=-1)
    if mean.shape[-1] == 2:
        # Two classes are one logit, the difference, for which the formula is meant.
        variance = 4 * variance[:, :1]
    return (shift + (mean - shift) / (1 + math.pi / 8 * variance).sqrt()).unsqueeze(0)
