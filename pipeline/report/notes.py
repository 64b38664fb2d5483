"""What is said under a table: protocols, seeds, steps, and what is not shown."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline import storage
from pipeline.records import Record
from pipeline.report.select import Choice, Evaluation
from pipeline.report.table import listing, plural

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
