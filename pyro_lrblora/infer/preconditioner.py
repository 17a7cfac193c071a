"""The diagonal preconditioner of stochastic-gradient chains: one step size for every model."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ..data import EncodedBatches, batch_rows, naming_the_batch
from ..latents import LatentSites
from ..model import BayesianLoRA
from ..priors import prior_variance

_PROBES = 64  # random score vectors that the preconditioner is made of


def preconditioner(model: BayesianLoRA, batches: EncodedBatches, sites: LatentSites, at: Tensor) -> Tensor:
    """G, (D,): inverse diagonal of the log joint's Gauss-Newton matrix P, scaled so that G P is at most about 1.

    The Fisher matrix is that of all sites together, a Bayesian head's too: scores of the network's own labels, summed
    over a batch's rows with random signs, have it as their second moment. 64 of them fix it to a fifth or so. The
    prior's part is 1 / its variance where its latents do not depend on each other, else its own second derivative.

    Args:
        model: in its subspace.
        batches: training data; the first 64 batches are enough.
        sites: of every sampled value.
        at: (D,) the point.
    """
    prior, largest = _prior_curvature(model, sites, at)
    at, head, scores, rows = at.detach().requires_grad_(), model.head_values(), [], 0
    repeats = math.ceil(_PROBES / len(batches))
    with model.attached(dropout=False), torch.enable_grad(), pyro.validation_enabled(False):
        for position, batch in enumerate(islice(batches, _PROBES)):
            batch = model.to_device(batch)
            rows += batch_rows(batch)
            labels = model.label_distribution(model.outputs(batch, sites.split(at), head), batch)
            for _ in range(repeats):
                log_probs = labels.log_prob(labels.sample())
                signs = torch.randint_like(log_probs, 2) * 2 - 1
                scores.append(torch.autograd.grad((signs * log_probs).sum(), at, retain_graph=True)[0])
            with naming_the_batch(position):
                if not scores[-1].isfinite().all():
                    raise FloatingPointError("expected a finite gradient at the start, got NaN or infinity")
    scores = torch.stack(scores) * (model.size / rows / repeats) ** 0.5
    precision = prior + scores.square().sum(0)
    whitened = scores * precision.rsqrt()
    top = largest(precision) + torch.linalg.eigvalsh(whitened @ whitened.T)[-1]
    return 1 / (precision * top)


def _prior_curvature(model, sites: LatentSites, at: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The diagonal (D,) of minus the log prior's second derivative, and its largest eigenvalue in given units.

    Returns:
        The diagonal, and a function of a diagonal matrix U, (D,), to the largest eigenvalue of U^-1/2 H U^-1/2.
    """

    def log_prior(flat: Tensor) -> Tensor:
        with poutine.block(), pyro.validation_enabled(False):
            trace = poutine.trace(poutine.condition(model.sample_prior, data=sites.split(flat))).get_trace()
            return trace.log_prob_sum()

    times = lambda vector: -torch.autograd.functional.vhp(log_prior, at, vector)[1]
    alone = sites.join(prior_variance(model.sample_prior, sites.shapes)).reciprocal()
    # A stream of its own: the chains' does not depend on the prior.
    generator = torch.Generator().manual_seed(0)
    uneven = [1 + torch.rand(len(at), generator=generator).to(at) for _ in range(2)]
    first, second = (times(vector) / vector for vector in uneven)
    if not ((first - second).abs() > 1e-3 * (first.abs() + second.abs())).any():
        # No latent's slope depends on another latent. A Laplace prior has no curvature but a scale, 1 / its precision.
        return alone, lambda units: (alone / units).max()
    signs = [(torch.randint(2, (len(at),), generator=generator) * 2 - 1).to(at) for _ in range(_PROBES)]
    # Of a normal it is at least the precision each latent has by itself; an estimate may not be.
    diagonal = torch.stack([sign * times(sign) for sign in signs]).mean(0).maximum(alone)

    def largest(units: Tensor) -> Tensor:
        vector, size = uneven[0], torch.ones(())
        for _ in range(_PROBES):
            vector = times(vector / size * units.rsqrt()) * units.rsqrt()
            size = vector.norm()
        return size

    return diagonal, largest
