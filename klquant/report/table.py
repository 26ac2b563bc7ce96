"""A table as data: drawn as HTML by the page's template, as text by `markdown`."""

import re
from dataclasses import dataclass
from typing import Literal

RowKind = Literal["", "floor", "reference"]
_SPECIAL = re.compile(r"([\\`*_\[\]<>|#])")


@dataclass(frozen=True)
class Cell:
    """`detail`: a second, smaller line. `quiet`: says little, drawn so. `heat`: 0 to 1, how deep its colour is.
    `series`: the variant whose colour and marker stand before the text."""

    text: str
    detail: str = ""
    quiet: bool = False
    heat: float | None = None
    series: int | None = None


@dataclass(frozen=True)
class Row:
    head: Cell
    cells: tuple[Cell, ...]
    kind: RowKind = ""


@dataclass(frozen=True)
class Table:
    """`columns` head the cells, `corner` the rows' heads. `text`: columns of words, set to the left."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    corner: str = ""
    text: bool = False


def markdown(table: Table) -> str:
    """A GitHub table with its title and note; what a user may have named is escaped."""
    bar = "---" if table.text else "---:"
    lines = [f"**{escape(table.title)}**", ""] if table.title else []
    lines += [_line([table.corner, *table.columns]), f"|---|{'|'.join([bar] * len(table.columns))}|"]
    lines += [_line([_text(cell) for cell in (row.head, *row.cells)]) for row in table.rows]
    return "\n".join([*lines, *(["", escape(table.note)] if table.note else [])]) + "\n"


def escape(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _text(cell: Cell) -> str:
    detail = cell.detail.replace("\n", ", ")
    return f"{cell.text} ({detail})" if cell.detail else cell.text


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(escape(cell) for cell in cells) + " |"
