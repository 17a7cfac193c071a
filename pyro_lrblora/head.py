"""The classification head: which parameters it has, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from .parts import output_embedding


@dataclass(frozen=True)
class FixedHead:
    """Head parameters that are neither trained nor sampled, by dotted name."""

    values: Mapping[str, Tensor]

    def __repr__(self) -> str:
        return f"FixedHead({', '.join(self.values)})"


class PointHead(PyroModule):
    """Trainable head parameters; calling it returns them by dotted name (and shows them to Pyro as params)."""

    def __init__(self, values: Mapping[str, Tensor], name: str):
        super().__init__(name)
        # What reading it locally needs, which Pyro gives only to modules built locally.
        self._pyro_context.param_state = {"params": {}, "constraints": {}}
        self.names = {path.replace(".", "__"): path for path in values}
        for leaf, path in self.names.items():
            setattr(self, leaf, nn.Parameter(values[path].detach().float().clone()))

    def forward(self) -> dict[str, Tensor]:
        return {path: getattr(self, leaf) for leaf, path in self.names.items()}


def head_parameters(network: nn.Module, modules: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """The head's parameters by dotted name.

    Args:
        network: a transformers model: what stands outside its base model and is not an output embedding; any other
            module has no head unless `modules` names it.
        modules: dotted names of the head's modules, to say it explicitly.
    """
    named = dict(network.named_parameters())
    if modules is not None:
        holds = lambda module, name: name == module or name.startswith(module + ".")
        modules = list(modules)
        idle = [module for module in modules if not any(holds(module, name) for name in named)]
        if idle or not modules:
            raise ValueError(
                f"expected head modules among {sorted({n.rpartition('.')[0] for n in named})}, got {idle or modules}"
            )
        return {name: p for name, p in named.items() if any(holds(module, name) for module in modules)}
    base = getattr(network, "base_model", network)
    if base is network:
        return {}
    shared = {id(p) for p in base.parameters()}
    output = output_embedding(network)
    if output is not None:
        shared |= {id(p) for p in output.parameters()}
    return {name: p for name, p in named.items() if id(p) not in shared}


def check_in_memory(parameters: Mapping[str, Tensor]) -> None:
    """Raise a ValueError where a head's parameters are offloaded or quantised: they are trained, in float32."""
    for name, parameter in parameters.items():
        if parameter.is_meta or not parameter.is_floating_point():
            raise ValueError(
                f"expected the head in memory and not quantised, got {name!r} on device {str(parameter.device)!r} in "
                f"{parameter.dtype}; name its module in the device_map, or in llm_int8_skip_modules"
            )


def check_head(head: object, parameters: Iterable[str]) -> None:
    """Raise a ValueError unless `head` is a treatment of a head with these parameters that a model knows."""
    if not (isinstance(head, FixedHead) or head in ("point", "bayesian", "frozen")):
        raise ValueError(f"expected head='point', 'bayesian', 'frozen' or a FixedHead, got {head!r}")
    if isinstance(head, FixedHead) and set(head.values) != set(parameters):
        raise ValueError(f"expected a head with parameters {sorted(parameters)}, got {sorted(head.values)}")


def output_layer(network: nn.Module, head: Iterable[str]) -> str | None:
    """The dotted name of the head's last linear module: the one a linear probe fits."""
    owners = {name.rpartition(".")[0] for name in head}
    linear = [n for n, m in network.named_modules() if n in owners and isinstance(m, nn.Linear)]
    return linear[-1] if linear else None


def head_prior(centre: Mapping[str, Tensor], output: str | None, scale: float) -> dict[str, dist.Normal]:
    """The prior of every parameter of a head, a point's and a Bayesian one's alike.

    The output layer's weight is around zero, as in the probe that chose the scale. Its bias, which that scale is not
    of, is around the probe's and as wide as that is large, at least 1: a base rate is nothing to be punished. What else
    there is, such as a dense layer or a norm's weight, is around the network's own, which a pull to zero would undo.

    Args:
        centre: by dotted name, the head before any fit: the network's, its output layer probed.
        output: dotted name of the output layer.
        scale: standard deviation of the weights.
    """
    priors = {}
    for name, value in centre.items():
        loc, sd = value, torch.full_like(value, scale)
        if name == f"{output}.weight":
            loc = torch.zeros_like(value)
        elif name == f"{output}.bias":
            sd = value.abs().clamp(min=1)
        priors[name] = dist.Normal(loc, sd)
    return priors
