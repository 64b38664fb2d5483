"""Which recorded evaluations stand in a row, so that no cell mixes what must not be mixed.

A row shows one protocol on one set of clips, and the seeds of runs that are equal in all else that a record
knows. Whatever it leaves out is counted, for a note.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.records import Record
from pipeline.report.table import DASH

Evaluation = tuple[str, str]  # the fingerprints of protocol and clips: scores compare where both are equal


def evaluation_of(record: Record) -> Evaluation:
    return record.protocol["fingerprint"], storage.name(record.clips_uri)


def most_common(records: Sequence[Record]) -> Evaluation | None:
    """The evaluation of most records; among equals the latest's."""
    counts = Counter(evaluation_of(record) for record in records)  # keeps the order: the latest first
    return counts.most_common(1)[0][0] if counts else None


@dataclass(frozen=True)
class Choice:
    """What a row shows: one record a seed, the latest of each."""

    records: tuple[Record, ...]
    others: int  # more records under the same protocol: other settings, or the same seed again
    elsewhere: int  # more records under other protocols or on other clips

    @property
    def evaluation(self) -> Evaluation:
        return evaluation_of(self.records[0])


def choose(records: Sequence[Record], main: Evaluation | None, beta: float | None = None) -> Choice | None:
    """The records of a row out of its candidates (the latest first); None where there is none.

    Those under `main` if there are any. Among runs of different settings: the ones with most steps, then with
    weight `beta`, then the latest.
    """
    if not records:
        return None
    evaluations = {evaluation_of(record) for record in records}
    evaluation = main if main in evaluations else most_common(records)
    same = [record for record in records if evaluation_of(record) == evaluation]
    groups: dict[Any, list[Record]] = {}
    for record in same:
        groups.setdefault(_settings(record), []).append(record)
    # `max` gives the first of equals, which is the latest.
    chosen = max(groups.values(), key=lambda group: (group[0].steps or 0, group[0].beta == beta))
    by_seed: dict[int | None, Record] = {}
    for record in chosen:
        by_seed.setdefault(record.seed, record)
    shown = sorted(by_seed.values(), key=lambda record: -1 if record.seed is None else record.seed)
    return Choice(tuple(shown), len(same) - len(shown), len(records) - len(same))


def _settings(record: Record) -> tuple[Any, ...]:
    """All but the seed that is known of how a record's model came about. Its name says nothing about that."""
    return (
        record.trained_on,
        record.teacher,
        record.beta,
        record.steps,
        record.hints,
        record.settings,
    )


def values(records: Sequence[Record], score: str) -> list[float]:
    """The records' scores in percent, without those that are not a number."""
    found = [100 * record.scores[score] for record in records]
    return [value for value in found if not math.isnan(value)]


def percent(value: float) -> str:
    return f"{round(value, 1) + 0.0:.1f}"  # + 0.0: no "-0.0"


def mean_and_std(numbers: Sequence[float]) -> str:
    """`32.8 ± 0.36 (n=3)` with the sample standard deviation (n - 1); the number alone where it is one."""
    if not numbers:
        return DASH
    mean = percent(statistics.fmean(numbers))
    if len(numbers) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(numbers):.2f} (n={len(numbers)})"
