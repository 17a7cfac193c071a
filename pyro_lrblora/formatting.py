"""How a value is written where people read it: report, diagnosis and model card alike."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import pandas as pd

MISSING = "–"


def shown(value: Any, decimals: int = 3) -> str:
    """A value as a reader sees it: rounded if it is a number, a dash if it is missing."""
    if is_missing(value):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return shown(value.item(), decimals)
    if not is_number(value) or isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return "∞" if value > 0 else "-∞"
    rounded = f"{value:.{decimals}f}"
    hidden = value != 0 and float(rounded) == 0
    return f"{value:.2e}" if hidden or abs(value) >= 1e7 else rounded


def brief(value: float | str) -> str:
    """Three significant digits: rows of one list have units of their own, and no number of decimals suits them all."""
    return value if isinstance(value, str) else f"{value:.3g}"


def is_number(value: Any) -> bool:
    """Whether it is a real number; a bool is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_missing(value: Any) -> bool:
    """None, NaN, or what pandas writes for them."""
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, Real) and math.isnan(value))
