"""A table as plain values: what the builders make and the renderers read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

DASH = "–"


@dataclass(frozen=True)
class Column:
    """`group` is what is measured, `title` whose number it is; either may be empty."""

    title: str
    group: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Cell:
    text: str = DASH
    best: bool = False


@dataclass(frozen=True)
class Row:
    cells: tuple[Cell, ...]
    kind: str = "method"  # or "baseline", or "summary"


@dataclass(frozen=True)
class Table:
    """One table; `part` names the data set where one of the paper's tables has several."""

    name: str  # "Table 1"
    title: str
    part: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    run_ids: frozenset[str] = field(default=frozenset(), repr=False)  # of the records that it accounts for


def cells(*texts: str) -> tuple[Cell, ...]:
    return tuple(Cell(text) for text in texts)


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def listing(items: Sequence[str]) -> str:
    """Each item once, in the order of its first appearance."""
    return ", ".join(dict.fromkeys(items))
