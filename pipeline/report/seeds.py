"""Table 10: one row a seed, their mean and standard deviation.

The paper's standard deviations: its 0.29 is what the population formula (n) gives for the printed mBO, where the
sample formula (n - 1) gives 0.36. Its 0.06 is neither's for the printed FG-ARI (0.08 and 0.10), but both reach it
within the rounding of those to one digit. Ours are sample standard deviations.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from pipeline.records import Record
from pipeline.report.notes import SAMPLE_STD, protocol_note, run_notes
from pipeline.report.parts import YTVIS, Part
from pipeline.report.scores import accepts, score_columns
from pipeline.report.select import Choice, choose, most_common, percent, values
from pipeline.report.table import DASH, Cell, Column, Row, Table

SCORES = ("video_fg_ari", "video_mbo")


def seed_table(part: Part, records: Sequence[Record], printed: dict[str, Any], beta: float) -> Table:
    """SlotMatch with weight `beta`, under the protocol and with the settings of most of its records.

    `printed` is the paper's table, which shows beside ours for the paper's data set.
    """
    paper = part == YTVIS
    chooses = accepts("slotmatch", beta)
    candidates = [record for record in part.of(records) if chooses(record)]
    choice = choose(candidates, most_common(candidates), beta)
    by_seed = {record.seed: record for record in choice.records} if choice else {}
    printed_seeds = printed["seeds"] if paper else {}
    more = [seed for seed in by_seed if seed not in printed_seeds]

    def row(title: str, seed: str, ours: Sequence[str], theirs: Sequence[str], kind: str) -> Row:
        pairs = zip(ours, theirs, strict=True)
        texts = [text for pair in pairs for text in (pair if paper else pair[:1])]
        return Row(tuple(map(Cell, (title, seed, *texts))), kind)

    rows = []
    for number, seed in enumerate([*printed_seeds, *more], start=1):
        found = [by_seed[seed]] if seed in by_seed else []
        theirs = [f"{value:.1f}" for value in printed_seeds.get(seed, ())] or [DASH] * len(SCORES)
        rows.append(
            row(f"Run {number}", DASH if seed is None else str(seed), _means(found), theirs, "method")
        )
    shown = choice.records if choice else ()
    rows.append(row("Mean", DASH, _means(shown), [f"{v:.1f}" for v in printed["mean"]], "summary"))
    rows.append(row("Std.", DASH, _stds(shown), [f"±{v:.2f}" for v in printed["std"]], "summary"))
    return Table(
        "Table 10",
        "SlotMatch from several seeds",
        part.title,
        (Column("run", numeric=False), Column("seed"), *score_columns(SCORES, paper=paper)),
        tuple(rows),
        tuple(_notes(choice, beta, paper=paper)),
        frozenset(record.run_id for record in candidates),
    )


def _means(records: Sequence[Record]) -> list[str]:
    columns = [values(records, score) for score in SCORES]
    return [percent(statistics.fmean(numbers)) if numbers else DASH for numbers in columns]


def _stds(records: Sequence[Record]) -> list[str]:
    columns = [values(records, score) for score in SCORES]
    return [f"±{statistics.stdev(numbers):.2f}" if len(numbers) > 1 else DASH for numbers in columns]


def _notes(choice: Choice | None, beta: float, *, paper: bool) -> list[str]:
    notes = []
    if choice:
        notes.append(protocol_note(choice.records[0]))
        notes += [note for note in run_notes([("SlotMatch", choice)]) if note != SAMPLE_STD]
    notes.append(f"SlotMatch with β = {beta:g}. Our Std. is the sample standard deviation (n − 1).")
    if paper:
        notes.append("The paper's ±0.29 is the population's (n); our formula gives ±0.36 for its three mBO.")
    return notes
