"""Which claimed orderings hold: differences paired by seed and by video, with what chance leaves open of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from pipeline.evaluate.scoring import TITLES
from pipeline.evaluate.table import DASH, Column, Row, Table, cells
from pipeline.sweep.results import Result
from pipeline.sweep.settings import TEACHER, parse_claim

CONFIDENCE = 0.95
DRAWS = 10_000  # of the bootstrap

# A model's scores of each video, by its id: fractions of 1, and what they weigh (`VideoScore`).
PerVideo = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Scored:
    """All that was scored by one kind of masks; scores are fractions of 1.

    per_video: of each setting's seeds, and of the teacher under `TEACHER` and None.
    """

    results: Sequence[Result]
    teacher: Mapping[str, float]
    per_video: Mapping[tuple[str, int | None], PerVideo] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """One claim, `better > worse`, in one score: the differences of the seeds that both have, in points.

    interval: of their mean, by the bootstrap over seeds and videos; None where videos are not known.
    """

    claim: str
    score: str
    differences: tuple[float, ...]
    interval: tuple[float, float] | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.differences)

    @property
    def margin(self) -> float:
        """Half the confidence interval of the mean difference (Student's t); infinite for one seed."""
        count = len(self.differences)
        if count < 2:
            return math.inf
        quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, count - 1))
        return quantile * statistics.stdev(self.differences) / math.sqrt(count)

    @property
    def verdict(self) -> str:
        """What both intervals say."""
        low, high = self.interval or (self.mean, self.mean)
        if min(self.mean - self.margin, low) > 0:
            return "holds"
        if max(self.mean + self.margin, high) < 0:
            return "reversed"
        return "can't be told"


def compare(claims: Sequence[str], scored: Scored, scores: Sequence[str]) -> list[Comparison]:
    """Every claim in every score; one whose sides share no seed is left out."""
    by_name = {result.setting.name: result.scores for result in scored.results}
    comparisons = []
    for claim in claims:
        better, worse = parse_claim(claim)
        seeds = [
            seed
            for seed in next(by_name[side] for side in (better, worse) if side != TEACHER)
            if all(side == TEACHER or seed in by_name[side] for side in (better, worse))
        ]
        for score in scores if seeds else ():
            sides = [
                [100 * (scored.teacher if side == TEACHER else by_name[side][seed])[score] for seed in seeds]
                for side in (better, worse)
            ]
            differences = tuple(a - b for a, b in zip(*sides, strict=True))
            interval = _interval(scored, (better, worse), seeds, score) if scored.per_video else None
            comparisons.append(Comparison(claim, score, differences, interval))
    return comparisons


def _interval(
    scored: Scored, claim: tuple[str, str], seeds: Sequence[int], score: str
) -> tuple[float, float]:
    """The bootstrap's, in points, of a claim's difference."""
    samples = f"{score.split('_')[0]}_samples"
    sides = [
        [scored.per_video[(side, None if side == TEACHER else seed)] for seed in seeds] for side in claim
    ]
    # What is there to score is the same for all models.
    weights = {video: row[samples] for video, row in sides[0][0].items() if row[samples]}
    better, worse = (np.array([[one[v][score] for v in weights] for one in side]) for side in sides)
    return bootstrap(100 * (better - worse), np.array(list(weights.values()), dtype=float))


def bootstrap(differences: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """The interval of a weighted mean by the percentile bootstrap over seeds and, independently, over videos.

    A method's luck with a seed is the same in all videos, and a video's difficulty in all seeds, so that whole rows
    and whole columns are drawn (the "pigeonhole" bootstrap of Owen 2007). The same draws for everybody.

    Args:
        differences: `(seeds, videos)`. weights: `(videos,)`, how much a video counts.
    """
    seeds, videos = differences.shape
    rng = np.random.default_rng(0)
    rows = rng.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS)
    columns = rng.multinomial(videos, np.full(videos, 1 / videos), DRAWS) * weights
    means = ((rows @ differences) * columns).sum(1) / (seeds * columns.sum(1))
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def claim_table(comparisons: Sequence[Comparison], part: str) -> Table:
    rows = [
        Row(
            cells(
                comparison.claim,
                TITLES[comparison.score],
                str(len(comparison.differences)),
                f"{comparison.mean:+.1f}",
                f"± {comparison.margin:.1f}" if math.isfinite(comparison.margin) else DASH,
                "{:+.1f} … {:+.1f}".format(*comparison.interval) if comparison.interval else DASH,
                comparison.verdict,
            )
        )
        for comparison in comparisons
    ]
    columns = (
        Column("claim", numeric=False),
        Column("score", numeric=False),
        Column("seeds"),
        Column("difference"),
        Column("95 % over seeds"),
        Column("95 % over seeds and videos"),
        Column("verdict", numeric=False),
    )
    notes = (
        "Differences in points, paired by seed and video. Over seeds: Student's t interval of these videos. Over seeds "
        f"and videos: the percentile bootstrap, {DRAWS:,} draws of both. A claim holds, or is reversed, where both "
        "leave out 0. The teacher is one model: its own spread over seeds is not in these intervals.",
    )
    return Table("Orderings", "Which claims hold", part, columns, tuple(rows), notes)
