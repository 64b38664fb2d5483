"""Which recorded evaluations stand in a row, so that no cell mixes what must not be mixed.

A row shows one protocol on one set of clips, and the seeds of runs that are equal in all else that a record
knows. Whatever it leaves out is counted, for a note.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.evaluate.records import METHODS, Record
from pipeline.report.table import DASH, plural

pass


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


TEACHER, NO_KD, SLOTMATCH = "teacher", "no_kd", "slotmatch"  # in the tag `method`


class NothingToShow(ValueError):
    """A picture that the recorded evaluations don't suffice for."""


@dataclass(frozen=True)
class Shown:
    """One evaluation's models, in the order of `METHODS`, and trivial baselines, by what they are called."""

    models: dict[str, Record]
    baselines: dict[str, Record]

    def method(self, method: str) -> str | None:
        """The name of the model that was trained like that."""
        return next((name for name, record in self.models.items() if record.method == method), None)

    @property
    def data(self) -> str:
        """Where the numbers come from, for captions."""
        record = next(iter(self.models.values()))
        protocol = record.protocol
        data = (
            f"Data: {record.dataset}, {plural(record.videos, 'video')}, protocol {protocol['name']} "
            f"(evaluation {protocol['fingerprint']})."
        )
        runs = [f"{name} {_run(record)}" for name, record in self.models.items() if _run(record)]
        return f"{data} Runs: {'; '.join(runs)}." if runs else data


def _run(record: Record) -> str:
    """What decides between runs of one method."""
    parts = [plural(record.steps, "step")] if record.steps else []
    parts += [f"β = {record.beta:g}"] if record.beta else []
    parts += [f"seed {record.seed}"] if record.seed is not None else []
    return ", ".join(parts)


def main_evaluation(records: Sequence[Record]) -> list[Record]:
    """The records of the evaluation (clips and protocol) with most methods; among equals the latest."""
    groups: dict[Evaluation, list[Record]] = {}
    for record in records:
        groups.setdefault(evaluation_of(record), []).append(record)
    return max(groups.values(), key=lambda group: len({r.method for r in group} - {"baseline"}), default=[])


def choose_shown(records: Sequence[Record], beta: float) -> Shown:
    """Of the main evaluation one run of each method.

    SlotMatch with weight `beta` where there is one; then the most steps, then the latest. The others are of
    the same teacher and training data as SlotMatch, as far as they say.
    """
    group = main_evaluation(records)
    models: dict[str, Record] = {}
    ours = [record for record in group if record.method == SLOTMATCH]
    best = _most_steps([record for record in ours if record.beta == beta] or ours)
    for method in METHODS:
        found = [r for r in group if r.method == method and (best is None or _same_origin(r, best))]
        if method == "other":
            models |= {r.name: r for r in reversed(found)}
        elif method != "baseline":
            record = best if method == SLOTMATCH else _most_steps(found)
            models |= {METHODS[method]: record} if record else {}
    return Shown(models, {r.name: r for r in reversed(group) if r.method == "baseline"})


def _most_steps(records: Sequence[Record]) -> Record | None:
    return max(records, key=lambda record: record.steps or 0, default=None)


def _same_origin(record: Record, other: Record) -> bool:
    def fits(one: str, two: str) -> bool:
        return one == two or not one or not two

    return fits(record.trained_on, other.trained_on) and fits(record.teacher, other.teacher)


def nearest_to_quantiles(scores: Mapping[str, float], quantiles: Sequence[float]) -> list[str]:
    """For each quantile of the scores the video that is nearest to it, without those already named.

    Fewer where there are fewer videos; NaN is no score. Among equally near ones the first by name.
    """
    valid = {video: score for video, score in scores.items() if not math.isnan(score)}
    if not valid:
        raise NothingToShow("no video has a score")
    chosen: list[str] = []
    for quantile in np.quantile(list(valid.values()), quantiles):
        left = sorted(valid.keys() - chosen)
        if left:
            # Rounded, so that two that are equally far on both sides count as equal.
            chosen.append(min(left, key=lambda video: round(abs(valid[video] - quantile), 9)))
    return chosen


def worst_videos(scores: Mapping[str, float], count: int) -> list[str]:
    """The videos with the lowest scores, the lowest first; NaN is no score, equals are sorted by name."""
    valid = [video for video, score in scores.items() if not math.isnan(score)]
    if not valid:
        raise NothingToShow("no video has a score")
    return sorted(valid, key=lambda video: (scores[video], video))[:count]
