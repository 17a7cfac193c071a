"""Whole numbers among the arguments of a call."""

from __future__ import annotations

from numbers import Integral


def check_counts(least: int = 1, **counts: object) -> None:
    """Raise a ValueError for the first count, by its argument's name, that is not an integer of at least `least`."""
    for name, value in counts.items():
        if not (isinstance(value, Integral) and value >= least):
            raise ValueError(f"expected {name} to be an integer >= {least}, got {name}={value!r}")
