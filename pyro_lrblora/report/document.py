"""The blocks that a report is made of; html.py and markdown.py write them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from ..formatting import is_missing, is_number

VERDICTS = ("bad", "warning", "not checked", "good")  # the order in which they sort


@dataclass(frozen=True)
class Document:
    """What to_html and to_markdown write.

    Args:
        title: of the page.
        subtitle: one sentence below it; inline markup as in Text.
        sections: in the order of reading; no two with one anchor.
    """

    title: str
    subtitle: str
    sections: Sequence[Section]

    def __post_init__(self):
        anchors = [section.anchor for section in self.sections]
        twice = [section.title for section in self.sections if anchors.count(section.anchor) > 1]
        if twice:
            raise ValueError(f"expected sections with different titles, got {twice}; write another title")


@dataclass(frozen=True, eq=False)
class Section:
    """A heading, with its line in the contents, and the blocks below it."""

    title: str
    blocks: Sequence[Block]

    def __post_init__(self):
        if not self.anchor:
            raise ValueError(f"expected a title with a letter or a digit, got {self.title!r}; write a word")
        _check_blocks(self.blocks)

    @property
    def anchor(self) -> str:
        """The title as GitHub writes it in a link."""
        return re.sub(r"[^\w\- ]", "", self.title.lower()).strip(" -_").replace(" ", "-")


@dataclass(frozen=True)
class Text:
    """Paragraphs, apart by an empty line; `code` and **bold** are the only markup."""

    text: str


@dataclass(frozen=True)
class Note:
    """What was left out, and why; inline markup as in Text."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Names and their values, such as the settings of a run."""

    values: Mapping[str, Any]


@dataclass(frozen=True)
class Details:
    """Blocks that a reader opens; on paper they are open."""

    summary: str
    blocks: Sequence[Block]

    def __post_init__(self):
        _check_blocks(self.blocks)


class Verdict(NamedTuple):
    """One check: what came out, what it is held against, what that means and what to do; see VERDICTS."""

    check: str
    value: Any
    threshold: Any
    verdict: str
    meaning: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Verdicts:
    """A table of checks.

    Args:
        rows: each a Verdict or a tuple of its fields; check, meaning and advice may use the inline markup of Text.
        name: of the table, for whoever cannot see where it stands.
        decimals: of value and threshold.
    """

    rows: Sequence[Verdict | tuple]
    name: str = "Checks and their verdicts"
    decimals: int = 3

    def __post_init__(self):
        rows = [Verdict(*row) for row in self.rows]
        for row in rows:
            if row.verdict not in VERDICTS:
                raise ValueError(f"expected a verdict in {VERDICTS}, got {row.verdict!r}; write one of them")
        object.__setattr__(self, "rows", rows)

    @property
    def tally(self) -> dict[str, int]:
        """Verdict -> rows that have it, the bad first; only those that occur."""
        verdicts = [row.verdict for row in self.rows]
        return {word: verdicts.count(word) for word in VERDICTS if word in verdicts}


@dataclass(frozen=True, eq=False)
class Table:
    """A DataFrame with its index; numbers stand at the right, missing values are a dash.

    Args:
        frame: the rows, with numbers unrounded.
        caption: inline markup as in Text.
        decimals: of every column, or column -> decimals (3 for the others).
        note: below the table; what is missing and why.
    """

    frame: pd.DataFrame
    caption: str
    decimals: int | Mapping[Any, int] = 3
    note: str = ""

    def __post_init__(self):
        if not isinstance(self.frame, pd.DataFrame):
            raise TypeError(f"expected a DataFrame, got {type(self.frame).__name__}; write pd.DataFrame(...)")

    @property
    def heads(self) -> list[str]:
        """The names of the index and of the columns."""
        index = " / ".join(str(name) for name in self.frame.index.names if name is not None)
        return [index, *(str(_name(column)) for column in self.frame.columns)]

    @property
    def rows(self) -> list[list[Any]]:
        """The index and the cells of every row, as they are."""
        columns = [self.frame.iloc[:, j].tolist() for j in range(self.frame.shape[1])]
        return [[_name(key), *cells] for key, *cells in zip(self.frame.index, *columns, strict=True)]

    @property
    def places(self) -> list[int]:
        """The decimals of the index and of the columns."""
        if isinstance(self.decimals, Mapping):
            return [3, *(self.decimals.get(column, 3) for column in self.frame.columns)]
        return [self.decimals] * (1 + self.frame.shape[1])

    @property
    def numeric(self) -> list[bool]:
        """Whether the index and each column hold numbers only (missing ones aside)."""
        kept = [[cell for cell in column if not is_missing(cell)] for column in zip(*self.rows, strict=True)]
        return [bool(column) and all(map(is_number, column)) for column in kept] or [False] * len(self.heads)


@dataclass(frozen=True, eq=False)
class Picture:
    """A matplotlib Figure; its layout is settled when it is first written and stays so.

    Lines and text in the colour INK follow the page's own, in light and in dark; text on a coloured ground needs a
    colour that is neither INK nor black.

    Args:
        figure: as the functions in plots/ return it.
        alt: what it shows, in words, for a reader who does not see it; plain.
        caption: below it; inline markup as in Text.
    """

    figure: Any
    alt: str
    caption: str = ""

    def __post_init__(self):
        if not hasattr(self.figure, "savefig"):
            raise TypeError(f"expected a matplotlib Figure, got {type(self.figure).__name__}; write canvas(...)[0]")
        if not self.alt.strip():
            raise ValueError("expected a text that says what the picture shows, got none; write alt=...")


Block = Text | Note | Facts | Details | Verdicts | Table | Picture


def inline(text: str) -> list[tuple[str, str]]:
    """The pieces of a line, each with its kind: plain, code or bold."""
    pieces, end = [], 0
    for match in re.finditer(r"`([^`]+)`|\*\*(.+?)\*\*", text):
        pieces += [("plain", text[end : match.start()]), ("code", match[1]) if match[1] else ("bold", match[2])]
        end = match.end()
    return [(kind, piece) for kind, piece in [*pieces, ("plain", text[end:])] if piece]


def paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def _name(key: Any) -> Any:
    """A label of pandas; several levels are put side by side."""
    return " / ".join(str(part) for part in key) if isinstance(key, tuple) else key


def _check_blocks(blocks: Sequence[Block]):
    for block in blocks:
        if not isinstance(block, Block):
            raise TypeError(f"expected a block such as Text or Table, got {type(block).__name__}; write Text(...)")
