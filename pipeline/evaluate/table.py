"""A table as plain values: what its builders make and the renderers read; and the renderer for the terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

DASH = "–"


@dataclass(frozen=True)
class Column:
    """`group` is what is measured, `title` whose number it is; either may be empty."""

    title: str
    group: str = ""
    numeric: bool = True
    width: int = 0  # as plain text it has at least so many characters


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

    name: str  # "Table 1"; empty: it stands without a heading
    title: str
    part: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    run_ids: frozenset[str] = field(default=frozenset(), repr=False)  # of the records that it accounts for


def cells(*texts: str) -> tuple[Cell, ...]:
    return tuple(Cell(text) for text in texts)


def plain_text(table: Table) -> str:
    """For the terminal: a heading, columns in line, notes below."""
    titles = [column.group or column.title for column in table.columns]
    lines = [titles, *([cell.text for cell in row.cells] for row in table.rows)]
    widths = [max(column.width, *(len(line[i]) for line in lines)) for i, column in enumerate(table.columns)]
    aligned = []
    for line in lines:
        texts = [
            text.rjust(width) if column.numeric else text.ljust(width)
            for text, width, column in zip(line, widths, table.columns, strict=True)
        ]
        aligned.append("  ".join(texts).rstrip())
    part = f" ({table.part})" if table.part else ""
    heading = [f"{table.name}. {table.title}{part}"] if table.name else []
    return "\n".join([*heading, *aligned, *table.notes])


# --- what stands in cells and notes ---------------------------------------------------------------


def one_decimal(value: float) -> str:
    return f"{round(value, 1) + 0.0:.1f}"  # + 0.0: no "-0.0"


def percent(score: float) -> str:
    """A score, a fraction of 1, in percent; a dash for NaN."""
    return DASH if math.isnan(score) else one_decimal(100 * score)


def mean_and_std(numbers: Sequence[float]) -> str:
    """`32.8 ± 0.36 (n=3)` with the sample standard deviation (n - 1); the number alone where it is one."""
    if not numbers:
        return DASH
    mean = one_decimal(statistics.fmean(numbers))
    if len(numbers) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(numbers):.2f} (n={len(numbers)})"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def listing(items: Sequence[str]) -> str:
    """Each item once, in the order of its first appearance."""
    return ", ".join(dict.fromkeys(items))
