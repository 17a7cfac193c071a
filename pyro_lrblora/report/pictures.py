"""Figures as the report needs them: SVG that belongs to its page, or PNG."""

from __future__ import annotations

import io
import re
from html import escape

from ..plots.canvas import INK


def to_svg(figure, alt: str, prefix: str) -> str:
    """An <svg> element whose text and axes have the colour of the page around it.

    Args:
        figure: a matplotlib Figure.
        alt: what it shows.
        prefix: of every id in it, one per figure of a page.
    """
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        svg = _saved(figure, format="svg", transparent=True, metadata={"Date": None}).decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)

    def adapted(tag: re.Match) -> str:
        """Only inside a tag, so that text which looks like an id or a colour stays."""
        text = re.sub(r'( id="|href="#|url\(#)', lambda start: start[1] + prefix, tag[0])
        return re.sub(rf"{INK}\b|#000000\b", "currentColor", text)

    svg = re.sub(r"<[^>]+>", adapted, svg)
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    shape = re.search(r'viewBox="[^"]*"', svg)[0]
    name = escape(alt)
    head = f'<svg role="img" aria-label="{name}" {shape} width="{width}" height="{height}" style="--width: {width}px"'
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return re.sub(r"^<svg[^>]*>", lambda _: f"{head} {spaces}><title>{name}</title>", svg).strip()


def to_png(figure, dpi: float = 150) -> bytes:
    """A PNG on white.

    Args:
        figure: a matplotlib Figure.
        dpi: dots per inch.
    """
    return _saved(figure, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})


def _saved(figure, **options) -> bytes:
    # A constrained layout moves a little with every drawing; one that has been settled gives the same bytes each time.
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    buffer = io.BytesIO()
    figure.savefig(buffer, **options)
    return buffer.getvalue()
