"""A document as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from typing import Any

from ..formatting import is_missing, is_number, shown
from .document import VERDICTS, Document, Picture, inline, paragraphs
from .pictures import to_png, to_svg

PAGE_BYTES = 5_000_000
# The size up to which a picture stays an SVG, and the dots per inch of those above; the next when the page is too long.
_SIZES = ((300_000, 150), (60_000, 120), (0, 90))


def to_html(document: Document) -> str:
    """The page: no network, no script needed to read it, below 5 MB; the same bytes for the same document.

    A picture of more than 300 kB of SVG becomes a PNG; where the page would exceed 5 MB, more of them do.

    Args:
        document: what to write.

    Raises:
        ValueError: texts and tables alone exceed 5 MB.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pyro_lrblora", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"inline": _inline, "shown": shown, "sort_key": _sort_key, "fingerprint": _fingerprint}
    environment.filters |= {"paragraphs": paragraphs, "number": is_number, "missing": is_missing}
    environment.filters["breakable"] = _breakable
    environment.tests["block"] = lambda block, kind: type(block).__name__ == kind
    template = environment.get_template("page.html.jinja")
    for svg_bytes, dpi in _SIZES:
        pictures = _Pictures(svg_bytes, dpi)
        page = template.render(document=document, picture=pictures, order=VERDICTS.index)
        size = len(page.encode())
        if size <= PAGE_BYTES:
            return page
    raise ValueError(
        f"expected a page below {PAGE_BYTES:,} bytes, got {size:,}; write shorter tables or fewer pictures"
    )


class _Pictures:
    """Writes the pictures of one page and counts them, so that their ids differ."""

    def __init__(self, svg_bytes: int, dpi: float):
        self.svg_bytes, self.dpi, self.count = svg_bytes, dpi, 0

    def __call__(self, block: Picture):
        from markupsafe import Markup

        self.count += 1
        svg = to_svg(block.figure, block.alt, f"_p{self.count}-") if self.svg_bytes else None
        if svg is not None and len(svg.encode()) <= self.svg_bytes:
            return Markup(svg)
        width, height = (round(96 * inches) for inches in block.figure.get_size_inches())
        data = base64.b64encode(to_png(block.figure, self.dpi)).decode()
        image = Markup('<img alt="{}" width="{}" height="{}" style="--width: {}px" src="data:image/png;base64,{}">')
        return image.format(block.alt, width, height, width, data)


def _inline(text: str):
    from markupsafe import Markup

    forms = {"plain": "{}", "code": "<code>{}</code>", "bold": "<strong>{}</strong>"}
    return Markup("").join(Markup(forms[kind]).format(piece) for kind, piece in inline(text))


def _breakable(text: str):
    """A dotted name that may be broken after a dot, and nowhere else."""
    from markupsafe import Markup

    return text if " " in text else Markup("<wbr>").join(re.split(r"(?<=[^\d.]\.)(?=\w)", text))


def _sort_key(value: Any) -> str:
    """The unrounded number, as a script reads it."""
    value = float(value)
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return repr(int(value) if value.is_integer() and abs(value) < 2**53 else value)


def _fingerprint(script: str) -> str:
    """Names the one script that the page may run, for its Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()
