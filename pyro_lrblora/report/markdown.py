"""A document as GitHub Markdown, with its pictures beside it."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from ..formatting import shown
from .document import (
    Block,
    Details,
    Document,
    Facts,
    Note,
    Picture,
    Section,
    Table,
    Text,
    Verdicts,
    inline,
    paragraphs,
)
from .pictures import to_png


def to_markdown(document: Document, pictures: str | Path | None = None) -> str:
    """The same document as GitHub Markdown.

    Args:
        document: what to write.
        pictures: folder for the pictures as PNG, made where it is missing; links start beside it, so write the text
            into its parent. None leaves a picture's words only.
    """
    folder = None if pictures is None else Path(pictures)
    parts = [f"# {_plain(document.title)}", *_text(document.subtitle)]
    for section in document.sections:
        parts += [f"## {_plain(section.title)}", *_blocks(section.blocks, section, folder, [0])]
    return "\n\n".join(parts) + "\n"


def _blocks(blocks: list[Block], section: Section, folder: Path | None, count: list[int]) -> list[str]:
    parts = []
    for block in blocks:
        match block:
            case Text():
                parts += _text(block.text)
            case Note():
                parts += ["> " + part for part in _text(block.text)]
            case Facts():
                rows = [[_plain(name), _plain(shown(value))] for name, value in block.values.items()]
                parts.append(_table(["setting", "value"], rows, ["left", "left"]))
            case Details():
                inside = _blocks(block.blocks, section, folder, count)
                parts += [f"<details><summary>{escape(_one_line(block.summary))}</summary>", *inside, "</details>"]
            case Verdicts():
                parts.append(_verdicts(block))
            case Table():
                rows = [
                    [_plain(shown(cell, places)) for cell, places in zip(row, block.places, strict=True)]
                    for row in block.rows
                ]
                sides = ["right" if number else "left" for number in block.numeric]
                heads = [_plain(str(head)) for head in block.heads]
                parts += [*_text(block.caption), _table(heads, rows, sides), *_text(block.note)]
            case Picture():
                count[0] += 1
                parts += [_picture(block, f"{section.anchor}-{count[0]}.png", folder), *_text(block.caption)]
    return parts


def _verdicts(block: Verdicts) -> str:
    rows = [
        [
            _line(row.check),
            f"**{row.verdict}**",
            _plain(shown(row.value, block.decimals)),
            _plain(shown(row.threshold, block.decimals)),
            _line(row.meaning),
            _line(row.advice),
        ]
        for row in block.rows
    ]
    heads = ["check", "verdict", "value", "threshold", "what it means", "what to do"]
    return _table(heads, rows, ["left", "left", "right", "right", "left", "left"])


def _picture(block: Picture, name: str, folder: Path | None) -> str:
    alt = _plain(block.alt)
    if folder is None:
        return f"*Picture: {alt}*"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(to_png(block.figure))
    return f"![{alt}]({quote(folder.name)}/{quote(name)})"


def _table(heads: list[str], rows: list[list[str]], sides: list[str]) -> str:
    frame = pd.DataFrame(rows, columns=range(len(heads)), dtype=object)
    return frame.to_markdown(index=False, headers=heads, colalign=sides, disable_numparse=True)


def _text(text: str) -> list[str]:
    """Paragraphs; one that would start a list, a heading or a quotation does not."""
    return [re.sub(r"^(\d+)(?=[.)])|^(?=[-+#=])", r"\1\\", _line(part)) for part in paragraphs(text)]


def _line(text: str) -> str:
    forms = {
        "plain": _plain,
        "code": lambda piece: "`" + _one_line(piece).replace("|", "\\|") + "`",
        "bold": lambda piece: f"**{_plain(piece)}**",
    }
    return "".join(forms[kind](piece) for kind, piece in inline(text))


def _plain(text: str) -> str:
    """Text with nothing in it that Markdown or HTML would read as markup."""
    return re.sub(r"([\\`*<>\[\]|~$&]|(?<!\w)_|_(?!\w))", r"\\\1", _one_line(str(text)))


def _one_line(text: str) -> str:
    return " ".join(text.split()) if "\n" in text or "\r" in text else text
