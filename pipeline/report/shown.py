"""What the pictures show: one evaluation, one run of each method, and videos chosen by their scores alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.records import METHODS, Record
from pipeline.report.select import Evaluation, evaluation_of
from pipeline.report.table import plural

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
