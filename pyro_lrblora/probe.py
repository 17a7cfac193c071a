"""A linear probe of the head: its output layer fitted on the pretrained network's features, where every fit begins."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .head import output_layer
from .likelihoods import Categorical, label_site, logits_of

_CHOICE_ROWS = 5000  # training rows a prior scale is chosen on


def probe_head(model, batches) -> tuple[dict[str, Tensor], float]:
    """The head's parameters with its output layer fitted as a linear probe, and the prior scale of that fit.

    Args:
        model: a BayesianLoRA.
        batches: training data with labels.
    """
    head = dict(model.head_start)
    layer = output_layer(model.network, head)
    if layer is None:
        return head, model.head_scale
    module = model.network.get_submodule(layer)
    seen: dict[str, Tensor] = {}

    def keep(module, args, output):
        seen["inputs"], seen["output"] = args[0].detach().float().to(output.device), output.detach().requires_grad_()
        return seen["output"]

    features, labels = [], []
    handle = module.register_forward_hook(keep)
    try:
        for batch in batches:
            with torch.enable_grad():
                logits = logits_of(model.pretrained_outputs(batch, head))
                if logits.dim() != 2:
                    raise ValueError(
                        f"expected logits (B, C) for the linear probe of the head, got {tuple(logits.shape)}; write "
                        "model.prepare(train, probe=False)"
                    )
                # Which of a row's tokens (or which mixture of them) the logits read, whatever the network's pooling.
                first = logits[:, 0] if module.out_features > 1 else logits
                (read,) = torch.autograd.grad(first.sum(), seen["output"])
            picked = seen["inputs"] * read[..., :1].float()
            picked = picked if picked.dim() == 2 else picked.sum(1)
            # Of an item's choices, (B, C, H).
            features.append(picked if len(picked) == len(logits) else picked.unflatten(0, (len(logits), -1)))
            labels.append(batch["labels"].to(seen["output"].device))
    finally:
        handle.remove()
    x, y, bias = torch.cat(features).double(), torch.cat(labels), module.bias is not None
    scale = model.head_scale or choose_scale(x, y, module.out_features, bias, model.likelihood)
    weight, offset = linear_probe(x, y, module.out_features, scale, bias, model.likelihood)
    head[f"{layer}.weight"] = weight
    if bias:
        head[f"{layer}.bias"] = offset
    return head, scale


def choose_scale(
    features: Tensor, labels: Tensor, outputs: int, bias: bool, likelihood: Callable = Categorical()
) -> float:
    """The prior scale whose probe has the best five-fold cross-validated likelihood on the training rows.

    Scales are tried from the narrowest on until one is worse than the one before, as the widest take longest to fit.
    Of fewer than 20 rows it is the scale by which the prior's logits have a standard deviation of 1.

    Args:
        features: (N, H), of an item's choices (N, C, H).
        labels: (N,).
        outputs: of the layer.
        bias: whether the layer has one.
        likelihood: of the labels given the layer's outputs.
    """
    # In units in which the prior's logits have a standard deviation of 1: features come in any magnitude.
    unit = 1 / float(features.square().sum(-1).mean().sqrt().clamp(min=1e-12))
    # A few rows are not worth thirty fits, unless a predicted noise could be fitted away by more features than rows.
    if len(labels) < (5 if getattr(likelihood, "scale", 0.0) is None else 20):
        return unit
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(labels.device)
    folds = order[:_CHOICE_ROWS].tensor_split(5)
    best, least = unit, float("inf")
    for scale in (unit * step for step in (0.3, 0.6, 1.0, 1.7, 3.0, 6.0)):
        nll = 0.0
        for held in folds:
            kept = torch.cat([fold for fold in folds if fold is not held])
            weight, offset = linear_probe(features[kept], labels[kept], outputs, scale, bias, likelihood)
            predicted = _layer_outputs(features[held].float(), weight, offset if bias else 0)
            nll += _nll(likelihood, predicted, labels[held]).item()
        if not nll < least:
            break
        best, least = scale, nll
    return best


def linear_probe(
    features: Tensor,  # (N, H) or (N, C, H)
    labels: Tensor,  # (N,)
    outputs: int,
    prior_scale: float,
    bias: bool,
    likelihood: Callable = Categorical(),
) -> tuple[Tensor, Tensor | None]:
    """The most probable weight (outputs, H) and bias (outputs,) of a linear layer on frozen features.

    Args:
        features: what the output layer receives for each row, or for each choice of a row.
        labels: of the rows.
        outputs: C for classes.
        prior_scale: standard deviation of the Normal prior on every weight; the bias has none.
        bias: whether the layer has one.
        likelihood: of the labels given the layer's outputs; with Categorical this is multinomial logistic regression.
    """
    x = features.double()
    weight = torch.zeros(outputs, x.shape[-1], dtype=x.dtype, device=x.device, requires_grad=True)
    offset = torch.zeros(outputs, dtype=x.dtype, device=x.device, requires_grad=bias)
    parameters = [weight, offset] if bias else [weight]
    optimiser = torch.optim.LBFGS(parameters, max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        nll = _nll(likelihood, _layer_outputs(x, weight, offset), labels)
        value = (nll + 0.5 * weight.square().sum() / prior_scale**2) / len(labels)
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return weight.detach().float(), offset.detach().float() if bias else None


def _layer_outputs(features: Tensor, weight: Tensor, offset) -> Tensor:
    outputs = features @ weight.T + offset
    return outputs.squeeze(-1) if features.dim() == 3 else outputs


def _nll(likelihood: Callable, outputs: Tensor, labels: Tensor) -> Tensor:
    distribution, observed = label_site(likelihood, outputs, {"labels": labels})
    return -distribution.log_prob(observed).sum()
