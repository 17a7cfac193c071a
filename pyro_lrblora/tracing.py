"""One draw of every site of a Pyro program."""

from __future__ import annotations

from collections.abc import Callable

from pyro import poutine
from torch import Tensor


def traced_values(program: Callable, *args) -> dict[str, Tensor]:
    """The value of every site that a program samples, auxiliary ones left out.

    The values alone: a trace holds the distributions too, which are many times as large.
    """
    nodes = poutine.trace(program).get_trace(*args).iter_stochastic_nodes()
    return {name: node["value"] for name, node in nodes if not node["infer"].get("is_auxiliary")}
