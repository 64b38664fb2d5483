"""What was measured, and the one table that shows it."""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One way of doing a piece of work: the seconds of each repeat, and the units that a repeat does."""

    name: str
    seconds: list[float]
    work: float
    unit: str

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        return self.work / self.median


@dataclass(frozen=True)
class Comparison:
    """Ways of doing the same work, the baseline first, and what else a reader must know."""

    title: str
    rows: list[Row]
    notes: list[str]

    def speed_up(self, row: Row) -> float:
        return row.rate / self.rows[0].rate

    def to_dict(self) -> dict[str, Any]:
        rows = [
            {**asdict(r), "median": r.median, "rate": r.rate, "speed_up": self.speed_up(r)} for r in self.rows
        ]
        return {"title": self.title, "rows": rows, "notes": self.notes}


def interleaved(variants: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of each variant, run in turn (a, b, a, b, …) so that a busy moment hits them all."""
    seconds: list[list[float]] = [[] for _ in variants]
    for _ in range(repeats):
        for variant, times in zip(variants, seconds, strict=True):
            start = perf_counter()
            variant()
            times.append(perf_counter() - start)
    return seconds


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    cuda = torch.cuda.is_available()
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "load": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def table(comparisons: Sequence[Comparison]) -> str:
    """A Markdown table that reads well as plain text, and each comparison's notes below it."""
    header = ("measured", "runs", "median", "range", "rate", "speed-up")
    lines: list[tuple[str, ...]] = []
    for comparison in comparisons:
        lines.append((f"**{comparison.title}**", "", "", "", "", ""))
        for row in comparison.rows:
            lines.append(
                (
                    row.name,
                    str(len(row.seconds)),
                    f"{row.median:.3g} s",
                    f"{min(row.seconds):.3g}–{max(row.seconds):.3g} s",
                    f"{row.rate:.3g} {row.unit}/s",
                    f"{comparison.speed_up(row):.2f}×",
                )
            )
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    rule = tuple("-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths))

    def show(line: tuple[str, ...]) -> str:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    notes = [f"- {comparison.title}: {note}" for comparison in comparisons for note in comparison.notes]
    return "\n".join([*map(show, [header, rule, *lines]), "", *notes])
