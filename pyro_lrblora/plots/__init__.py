"""Pictures of what the diagnostics return: functions of a result that give a matplotlib Figure."""

from .reliability import reliability_diagram

__all__ = ["reliability_diagram"]
