"""Which recorded evaluations are shown: in a table's row, so that no cell mixes what must not be mixed, and in
the pictures, whose videos are chosen by their scores.

A row shows one protocol on one set of clips, and the seeds of runs that are equal in all else that a record
knows. Whatever it leaves out is counted, for a note.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.evaluate.records import METHODS, Record
from pipeline.evaluate.table import plural

TEACHER, NO_KD, SLOTMATCH = "teacher", "no_kd", "slotmatch"  # in the tag `method`

Conditions = tuple[str, str]  # the fingerprints of protocol and clips: scores compare where both are equal


def conditions_of(record: Record) -> Conditions:
    return record.protocol.fingerprint, storage.name(record.clips_uri)


# --- what a row shows -----------------------------------------------------------------------------


def most_common(records: Sequence[Record]) -> Conditions | None:
    """The conditions of most records; among equals the latest's."""
    counts = Counter(conditions_of(record) for record in records)  # keeps the order: the latest first
    return counts.most_common(1)[0][0] if counts else None


@dataclass(frozen=True)
class Choice:
    """What a row shows: one record a seed, the latest of each."""

    records: tuple[Record, ...]
    others: int  # more records under the same protocol: other settings, or the same seed again
    elsewhere: int  # more records under other protocols or on other clips

    @property
    def conditions(self) -> Conditions:
        return conditions_of(self.records[0])


def choose(records: Sequence[Record], main: Conditions | None, beta: float | None = None) -> Choice | None:
    """The records of a row out of its candidates (the latest first); None where there is none.

    Those under `main` if there are any. Among runs of different settings: the ones with most steps, then with
    weight `beta`, then the latest.
    """
    if not records:
        return None
    known = {conditions_of(record) for record in records}
    conditions = main if main in known else most_common(records)
    same = [record for record in records if conditions_of(record) == conditions]
    groups: dict[Any, list[Record]] = {}
    for record in same:
        groups.setdefault(_settings(record), []).append(record)
    # `max` gives the first of equals, which is the latest.
    chosen = max(groups.values(), key=lambda group: (group[0].steps or 0, group[0].beta == beta))
    by_seed: dict[int | None, Record] = {}
    for record in chosen:
        by_seed.setdefault(record.seed, record)
    seeds = sorted(by_seed.values(), key=lambda record: -1 if record.seed is None else record.seed)
    return Choice(tuple(seeds), len(same) - len(seeds), len(records) - len(same))


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


def scores_in_percent(records: Sequence[Record], score: str) -> list[float]:
    """One score of each record, without those that are not a number."""
    found = [100 * record.scores[score] for record in records]
    return [value for value in found if not math.isnan(value)]


# --- what pictures show ---------------------------------------------------------------------------


class NothingToShow(ValueError):
    """A picture that the recorded evaluations don't suffice for."""


@dataclass(frozen=True)
class Selection:
    """Models under one protocol on one set of clips, in the order of `METHODS`, and trivial baselines, by name."""

    models: dict[str, Record]
    baselines: dict[str, Record]

    def method(self, method: str) -> str | None:
        """The name of the model that was trained like that."""
        return next((name for name, record in self.models.items() if record.method == method), None)

    @property
    def data(self) -> str:
        """Where the numbers come from, for captions."""
        record = next(iter(self.models.values()))
        data = (
            f"Data: {record.dataset}, {plural(record.videos, 'video')}, protocol {record.protocol.name} "
            f"(evaluation {record.protocol.fingerprint})."
        )
        runs = [f"{name} {run}" for name, record in self.models.items() if (run := _run(record))]
        return f"{data} Runs: {'; '.join(runs)}." if runs else data


def _run(record: Record) -> str:
    """What decides between runs of one method."""
    settings = [plural(record.steps, "step")] if record.steps else []
    settings += [f"β = {record.beta:g}"] if record.beta else []
    settings += [f"seed {record.seed}"] if record.seed is not None else []
    return ", ".join(settings)


def main_evaluation(records: Sequence[Record]) -> list[Record]:
    """The records under the conditions (clips and protocol) with most methods; among equals the latest."""
    groups: dict[Conditions, list[Record]] = {}
    for record in records:
        groups.setdefault(conditions_of(record), []).append(record)
    return max(groups.values(), key=lambda group: len({r.method for r in group} - {"baseline"}), default=[])


def select_runs(records: Sequence[Record], beta: float) -> Selection:
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
    return Selection(models, {r.name: r for r in reversed(group) if r.method == "baseline"})


def _most_steps(records: Sequence[Record]) -> Record | None:
    """A slot model where there is one: a rival's record is a teacher's too."""
    return max(records, key=lambda record: (not record.system, record.steps or 0), default=None)


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
