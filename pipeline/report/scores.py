"""A table of scores: a row a method with ours beside the paper's, trivial baselines at the bottom."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline import storage
from pipeline.evaluate.records import Record
from pipeline.evaluate.scoring import SCORES
from pipeline.report.select import Choice, Evaluation, choose, mean_and_std, most_common, percent, values
from pipeline.report.table import DASH, Cell, Column, Row, Table, cells, listing, plural

pass

TITLES = dict(
    zip(SCORES, ("image FG-ARI", "image mBO", "video FG-ARI", "video mBO"), strict=True),
)


@dataclass(frozen=True)
class Wanted:
    """A row: which records may fill it, and what the paper has in it."""

    label: str
    accepts: Callable[[Record], bool]
    paper: Sequence[float | None] | None = None  # in the order of the table's scores
    more: tuple[str, ...] = ()  # cells between the label and the scores
    kind: str = "method"


def accepts(
    method: str | None, beta: float | None = None, teacher: str | None = None
) -> Callable[[Record], bool]:
    """Which records fill a row; None leaves a condition out, but for the method: such a row stays empty."""

    def test(record: Record) -> bool:
        return (
            record.method == method
            and (beta is None or (record.beta is not None and math.isclose(record.beta, beta)))
            and (teacher is None or record.teacher == teacher)
        )

    return test


def baseline_rows(records: Sequence[Record], more: int = 0) -> list[Wanted]:
    """One row for each trivial baseline that was recorded."""
    names = sorted({record.name for record in records if record.method == "baseline"})
    return [
        Wanted(
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


def score_table(
    name: str,
    title: str,
    part: str,
    wanted: Sequence[Wanted],
    records: Sequence[Record],
    *,
    scores: Sequence[str] = SCORES,
    lead: Sequence[Column] = (Column("method", numeric=False),),
    paper: bool = True,
    beta: float | None = None,
    notes: Sequence[str] = (),
) -> Table:
    """Fills the wanted rows from `records`, the latest first."""
    candidates = [[record for record in records if row.accepts(record)] for row in wanted]
    run_ids = frozenset(record.run_id for found in candidates for record in found)
    main = most_common([record for record in records if record.run_id in run_ids])
    choices = [choose(found, main, beta) for found in candidates]
    shown = [(row.label, choice) for row, choice in zip(wanted, choices, strict=True) if choice]
    order = _evaluations(main, [choice for _, choice in shown])
    texts = [_ours(choice, scores, order) for choice in choices]
    best = _best(choices, scores, main)
    rows = []
    for row, choice, ours in zip(wanted, choices, texts, strict=True):
        line = list(cells(row.label, *row.more))
        for i, text in enumerate(ours):
            is_best = choice is not None and choice.evaluation == main and _leads(choice, scores[i], best[i])
            line.append(Cell(text, best=is_best))
            if paper:
                number = row.paper[i] if row.paper else None
                line.append(Cell(DASH if number is None else f"{number:.1f}"))
        rows.append(Row(tuple(line), row.kind))
    return Table(
        name,
        title,
        part,
        (*lead, *score_columns(scores, paper=paper)),
        tuple(rows),
        (*protocol_notes([choice for _, choice in shown], order), *run_notes(shown), *notes),
        run_ids,
    )


def _evaluations(main: Evaluation | None, choices: Sequence[Choice]) -> list[Evaluation]:
    """The evaluations that rows come from, the unmarked one first."""
    found = dict.fromkeys(choice.evaluation for choice in choices)
    return sorted(found, key=lambda evaluation: evaluation != main)


def _ours(choice: Choice | None, scores: Sequence[str], order: Sequence[Evaluation]) -> list[str]:
    if choice is None:
        return [DASH] * len(scores)
    sign = mark(order.index(choice.evaluation))
    texts = [mean_and_std(values(choice.records, score)) for score in scores]
    return [text if text == DASH or not sign else f"{text} {sign}" for text in texts]


def _mean(choice: Choice, score: str) -> float | None:
    numbers = values(choice.records, score)
    return float(percent(sum(numbers) / len(numbers))) if numbers else None


def _best(
    choices: Sequence[Choice | None], scores: Sequence[str], main: Evaluation | None
) -> list[float | None]:
    """The highest mean, as printed, of each score under the main protocol; None where there is no contest."""
    result = []
    for score in scores:
        means = [_mean(choice, score) for choice in choices if choice and choice.evaluation == main]
        found = [mean for mean in means if mean is not None]
        result.append(max(found) if len(found) > 1 else None)
    return result


def _leads(choice: Choice, score: str, best: float | None) -> bool:
    return best is not None and _mean(choice, score) == best


MARKS = "¹²³⁴⁵⁶⁷⁸⁹"
SAMPLE_STD = "± is the sample standard deviation (n − 1) over n seeds."


def mark(index: int) -> str:
    """The sign of the index-th protocol of a table; the first, which most rows share, has none."""
    return "" if index == 0 else MARKS[index - 1] if index <= len(MARKS) else f"({index})"


def protocol_note(record: Record, sign: str = "") -> str:
    protocol = record.protocol
    words = protocol.get("in_words")
    text = f"protocol {protocol['name']}" + (f" ({words})" if words else "")
    text += f"; {plural(record.videos, 'video')}; clips {storage.name(record.clips_uri)}."
    if sign:
        return f"{sign} Not comparable with the rows without this mark: {text}"
    return text[0].upper() + text[1:]


def protocol_notes(choices: Sequence[Choice], order: Sequence[Evaluation]) -> list[str]:
    """One note for each evaluation that the rows come from."""
    first = {choice.evaluation: choice.records[0] for choice in reversed(choices)}
    return [protocol_note(first[evaluation], mark(i)) for i, evaluation in enumerate(order)]


def run_notes(shown: Sequence[tuple[str, Choice]]) -> list[str]:
    """Steps and seeds of the rows, and how many evaluations they leave out."""
    notes = []
    if any(len(choice.records) > 1 for _, choice in shown):
        notes.append(SAMPLE_STD)
    steps: dict[int, list[str]] = {}
    for label, choice in shown:
        if choice.records[0].steps is not None:
            steps.setdefault(choice.records[0].steps, []).append(label)
    if steps:
        lengths = "; ".join(f"{listing(labels)}: {count:,}" for count, labels in steps.items())
        notes.append(f"Training steps of our runs: {lengths}.")
    for label, choice in shown:
        if choice.others:
            record = choice.records[0]
            settings = [f"{record.steps:,} steps"] if record.steps is not None else []
            settings += [f"β = {record.beta:g}"] if record.beta else []
            what = f"the runs with {' and '.join(settings)}" if settings else "the latest"
            notes.append(
                f"{label}: shown {'are' if settings else 'is'} {what}; not shown: "
                f"{plural(choice.others, 'other evaluation')} under this protocol (other settings, or a seed again)."
            )
    hidden = sum(choice.elsewhere for _, choice in shown)
    if hidden:
        labels = listing([label for label, choice in shown if choice.elsewhere])
        notes.append(
            f"Under other protocols or on other clips, not shown: {plural(hidden, 'evaluation')} ({labels})."
        )
    return notes
