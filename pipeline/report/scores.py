"""A table of scores: a row a method with ours beside the paper's, trivial baselines at the bottom."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.evaluate.records import Record
from pipeline.evaluate.scoring import SCORES, TITLES
from pipeline.evaluate.table import (
    DASH,
    Cell,
    Column,
    Row,
    Table,
    cells,
    listing,
    mean_and_std,
    one_decimal,
    plural,
)
from pipeline.report.select import Choice, Conditions, choose, most_common, scores_in_percent

MARKS = "¹²³⁴⁵⁶⁷⁸⁹"
SAMPLE_STD = "± is the sample standard deviation (n − 1) over n seeds."


@dataclass(frozen=True)
class RowSpec:
    """Which records may fill a row, and what the paper has in it."""

    label: str
    accepts: Callable[[Record], bool]
    paper: Sequence[float | None] | None = None  # in the order of the table's scores
    more: tuple[str, ...] = ()  # cells between the label and the scores
    kind: str = "method"


def accepts(
    method: str | None, beta: float | None = None, teacher: str | None = None, system: str | None = None
) -> Callable[[Record], bool]:
    """Which records fill a row; None leaves a condition out, but for the method: such a row stays empty."""

    def test(record: Record) -> bool:
        return (
            record.method == method
            and (beta is None or (record.beta is not None and math.isclose(record.beta, beta)))
            and (teacher is None or record.teacher == teacher)
            and (system is None or record.system == system)
        )

    return test


def of_system(system: str) -> Callable[[Record], bool]:
    """Which records fill a rival's row, however their models came about."""
    return lambda record: record.system == system


def baseline_rows(records: Sequence[Record], more: int = 0) -> list[RowSpec]:
    """One row for each trivial baseline that was recorded."""
    names = sorted({record.name for record in records if record.method == "baseline"})
    return [
        RowSpec(
            name,
            lambda record, name=name: record.method == "baseline" and record.name == name,  # type: ignore[misc]
            more=(DASH,) * more,
            kind="baseline",
        )
        for name in names
    ]


def score_columns(scores: Sequence[str], *, paper: bool) -> tuple[Column, ...]:
    whose = ("ours", "paper") if paper else ("ours",)
    return tuple(Column(title, TITLES[score]) for score in scores for title in whose)


def method_table(
    name: str,
    title: str,
    part: str,
    specs: Sequence[RowSpec],
    records: Sequence[Record],
    *,
    scores: Sequence[str] = SCORES,
    lead: Sequence[Column] = (Column("method", numeric=False),),
    paper: bool = True,
    beta: float | None = None,
    notes: Sequence[str] = (),
) -> Table:
    """Fills the rows from `records`, the latest first."""
    candidates = [[record for record in records if spec.accepts(record)] for spec in specs]
    run_ids = frozenset(record.run_id for found in candidates for record in found)
    main = most_common([record for record in records if record.run_id in run_ids])
    choices = [choose(found, main, beta) for found in candidates]
    filled = [(spec.label, choice) for spec, choice in zip(specs, choices, strict=True) if choice]
    order = _conditions(main, [choice for _, choice in filled])
    texts = [_ours(choice, scores, order) for choice in choices]
    best = _best(choices, scores, main)
    rows = []
    for spec, choice, ours in zip(specs, choices, texts, strict=True):
        line = list(cells(spec.label, *spec.more))
        for i, text in enumerate(ours):
            is_best = choice is not None and choice.conditions == main and _leads(choice, scores[i], best[i])
            line.append(Cell(text, best=is_best))
            if paper:
                number = spec.paper[i] if spec.paper else None
                line.append(Cell(DASH if number is None else f"{number:.1f}"))
        rows.append(Row(tuple(line), spec.kind))
    return Table(
        name,
        title,
        part,
        (*lead, *score_columns(scores, paper=paper)),
        tuple(rows),
        (*protocol_notes([choice for _, choice in filled], order), *run_notes(filled), *notes),
        run_ids,
    )


def _conditions(main: Conditions | None, choices: Sequence[Choice]) -> list[Conditions]:
    """The conditions under which rows were scored, the unmarked ones first."""
    found = dict.fromkeys(choice.conditions for choice in choices)
    return sorted(found, key=lambda conditions: conditions != main)


def _ours(choice: Choice | None, scores: Sequence[str], order: Sequence[Conditions]) -> list[str]:
    if choice is None:
        return [DASH] * len(scores)
    sign = mark(order.index(choice.conditions))
    texts = [mean_and_std(scores_in_percent(choice.records, score)) for score in scores]
    return [text if text == DASH or not sign else f"{text} {sign}" for text in texts]


def _mean(choice: Choice, score: str) -> float | None:
    numbers = scores_in_percent(choice.records, score)
    return float(one_decimal(sum(numbers) / len(numbers))) if numbers else None


def _best(
    choices: Sequence[Choice | None], scores: Sequence[str], main: Conditions | None
) -> list[float | None]:
    """The highest mean, as printed, of each score under the main protocol; None where there is no contest."""
    result = []
    for score in scores:
        means = [_mean(choice, score) for choice in choices if choice and choice.conditions == main]
        found = [mean for mean in means if mean is not None]
        result.append(max(found) if len(found) > 1 else None)
    return result


def _leads(choice: Choice, score: str, best: float | None) -> bool:
    return best is not None and _mean(choice, score) == best


# --- notes below a table --------------------------------------------------------------------------


def mark(index: int) -> str:
    """The sign of the index-th protocol of a table; the first, which most rows share, has none."""
    return "" if index == 0 else MARKS[index - 1] if index <= len(MARKS) else f"({index})"


def protocol_note(record: Record, sign: str = "") -> str:
    rules = record.protocol
    text = f"protocol {rules.name}" + (f" ({rules.in_words})" if rules.in_words else "")
    text += f"; {plural(record.videos, 'video')}; clips {storage.name(record.clips_uri)}."
    text = " ".join([text, *rules.warnings])
    if sign:
        return f"{sign} Not comparable with the rows without this mark: {text}"
    return text[0].upper() + text[1:]


def protocol_notes(choices: Sequence[Choice], order: Sequence[Conditions]) -> list[str]:
    """One note for each of the conditions under which rows were scored."""
    first = {choice.conditions: choice.records[0] for choice in reversed(choices)}
    return [protocol_note(first[conditions], mark(i)) for i, conditions in enumerate(order)]


def _labels_by(values: Sequence[tuple[str, Any]]) -> dict[Any, list[str]]:
    """The labels of each value, without those that have none."""
    found: dict[Any, list[str]] = {}
    for label, value in values:
        if value not in (None, ""):
            found.setdefault(value, []).append(label)
    return found


def run_notes(filled: Sequence[tuple[str, Choice]]) -> list[str]:
    """Steps and seeds of the rows, and how many evaluations they leave out."""
    notes = []
    if any(len(choice.records) > 1 for _, choice in filled):
        notes.append(SAMPLE_STD)
    if steps := _labels_by([(label, choice.records[0].steps) for label, choice in filled]):
        lengths = "; ".join(f"{listing(labels)}: {count:,}" for count, labels in steps.items())
        notes.append(f"Training steps of our runs: {lengths}.")
    if precisions := _labels_by([(label, choice.records[0].precision) for label, choice in filled]):
        listed = "; ".join(f"{listing(labels)}: {precision}" for precision, labels in precisions.items())
        notes.append(f"Products in training were computed in {listed}.")
    for label, choice in filled:
        if choice.others:
            record = choice.records[0]
            settings = [f"{record.steps:,} steps"] if record.steps is not None else []
            settings += [f"β = {record.beta:g}"] if record.beta else []
            what = f"the runs with {' and '.join(settings)}" if settings else "the latest"
            notes.append(
                f"{label}: shown {'are' if settings else 'is'} {what}; not shown: "
                f"{plural(choice.others, 'other evaluation')} under this protocol (other settings, or a seed again)."
            )
    hidden = sum(choice.elsewhere for _, choice in filled)
    if hidden:
        labels = listing([label for label, choice in filled if choice.elsewhere])
        notes.append(
            f"Under other protocols or on other clips, not shown: {plural(hidden, 'evaluation')} ({labels})."
        )
    return notes
