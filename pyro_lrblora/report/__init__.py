"""The report: the answers about a posterior as one HTML file, or as Markdown."""

from .report import Report, report

__all__ = ["Report", "report"]
