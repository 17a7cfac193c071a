"""What any likelihood says of a network's outputs: the labels' distribution, what is kept of a draw, the prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor

from ..data.batches import batch_rows
from ..predictions import Prediction
from .categorical import check_finite, logits_of


def label_site(likelihood: Callable, outputs, batch: Mapping[str, Tensor]) -> tuple[TorchDistribution, Tensor]:
    """The distribution that a likelihood gives the labels, batch shape (B,), and the labels themselves.

    Args:
        likelihood: a Pyro program.
        outputs: what the network returned.
        batch: without "labels" the second value is a draw.

    Raises:
        TypeError: no site is named "labels", or there are others, or parameters, or it is scaled or masked.
    """
    with poutine.block(), pyro.plate("data", batch_rows(batch), dim=-1):
        trace = poutine.trace(likelihood).get_trace(outputs, batch)
    if "labels" not in trace.nodes:
        raise TypeError(f"expected the likelihood to sample a site named 'labels', got {likelihood!r}")
    others = [name for name in (*trace.stochastic_nodes, *trace.param_nodes) if name not in ("labels", "data")]
    if others:
        raise TypeError(
            f"expected a likelihood without sites and parameters of its own, which a fit would not train, got {others} "
            f"in {likelihood!r}; make them arguments"
        )
    labels = trace.nodes["labels"]
    if labels["scale"] != 1 or labels["mask"] is not None:
        raise TypeError(
            f"expected a likelihood whose distribution says all, got {likelihood!r} with poutine.scale or poutine.mask "
            "around it; write the weight into the distribution, or its .mask(...)"
        )
    return labels["fn"], labels["value"]


def class_logits(likelihood: Callable, outputs, batch: Mapping[str, Tensor]) -> Tensor:
    """The logits (B, C) of a likelihood of classes, all finite; of a user's own function, what the network returned."""
    return check_finite(likelihood.logits(outputs, batch) if hasattr(likelihood, "logits") else logits_of(outputs))


def summary(likelihood: Callable, outputs, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `predict` keeps of one draw's outputs: tensors (B, ...) by name."""
    if hasattr(likelihood, "summary"):
        return likelihood.summary(outputs, batch)
    kept = {"logits": class_logits(likelihood, outputs, batch)}
    labels = batch.get("labels")
    # A user's own function may say of the labels something else than the logits do, such as that some are mistaken.
    if not hasattr(likelihood, "logits") and labels is not None and bool((labels >= 0).all()):
        distribution, observed = label_site(likelihood, outputs, batch)
        kept["log_likelihood"] = distribution.log_prob(observed)
    return kept


def check_classes(likelihood: Callable, outputs, batch: Mapping[str, Tensor]) -> None:
    """Raise a TypeError where a user's own likelihood does not give labels that are classes, one per logit."""
    if hasattr(likelihood, "summary") or hasattr(likelihood, "logits"):
        return
    logits = logits_of(outputs)
    with torch.random.fork_rng():
        labels = label_site(likelihood, outputs, batch)[0]
    if not (isinstance(labels, torch.distributions.Categorical) and labels.logits.shape[-1] == logits.shape[-1]):
        raise TypeError(
            f"expected a likelihood of classes, one per logit, got {type(labels).__name__} of shape "
            f"{tuple(labels.batch_shape + labels.event_shape)} from {likelihood!r} and logits {tuple(logits.shape)}; "
            "give it `logits`, or `summary` and `prediction`, as docs/how_to/add_a_likelihood.md says"
        )


def prediction(
    likelihood: Callable, summaries: Mapping[str, Tensor], labels: Tensor | None, class_names: Sequence[str] | None
):
    """What `predict` returns, from the summaries (S, N, ...) of all draws and rows."""
    if hasattr(likelihood, "prediction"):
        return likelihood.prediction(summaries, labels, class_names)
    return Prediction(summaries["logits"], labels, class_names, summaries.get("log_likelihood"))
