"""What Pyro's AutoLaplaceApproximation leaves to its user: the normal at the mode it has found."""

from __future__ import annotations

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.ops.hessian import hessian
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..data import batch_rows
from ..guides.stock import build_guide
from ..posterior import Posterior


def normal_at_mode(point: Posterior, train) -> Posterior:
    """AutoMultivariateNormal with the inverse Hessian of minus the log joint as its covariance, summed over batches.

    Pyro's own laplace_approximation takes all rows as one batch, and its result cannot be saved.

    Args:
        point: fitted with AutoLaplaceApproximation.
        train: the rows it was fitted to.

    Raises:
        ValueError: the Hessian is not positive definite: not a mode, or the network is far from linear there.
    """
    model, loc = point.model, point.guide.loc
    total = torch.zeros(len(loc), len(loc), device=loc.device)
    # Only the plain attention kernel can be differentiated twice.
    with model.attached(dropout=False), sdpa_kernel(SDPBackend.MATH):
        for batch in train:
            guide_trace = poutine.trace(point.guide).get_trace(batch)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(batch)
            loss = guide_trace.log_prob_sum() - model_trace.log_prob_sum()
            total += hessian(loss, loc) * (batch_rows(batch) / model.size)
    root, failed = torch.linalg.cholesky_ex(torch.linalg.inv(total))
    if failed:
        raise ValueError(
            f"expected a positive definite Hessian at the mode, got eigenvalues from "
            f"{float(torch.linalg.eigvalsh(total)[0]):.3g}; train longer, or write lb.infer.laplace(model, train)"
        )
    guide = build_guide(AutoMultivariateNormal, model)
    scale = root.diagonal()
    guide.loc.data.copy_(loc.detach())
    guide.scale, guide.scale_tril = scale, root / scale.unsqueeze(-1)
    settings = point.settings | {"method": "AutoLaplaceApproximation"}  # whose history is a point's
    return Posterior(model, guide, AutoMultivariateNormal, point.history, settings)
