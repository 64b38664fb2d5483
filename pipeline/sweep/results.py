"""What came out of a sweep, in numbers: means over seeds, the choice of the best student, and the tables."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.evaluate.scoring import SCORES, TITLES
from pipeline.evaluate.table import DASH, Cell, Column, Row, Table, mean_and_std, one_decimal, percent, plural
from pipeline.report.scores import SAMPLE_STD, score_columns
from pipeline.sweep.settings import Setting


@dataclass(frozen=True)
class Result:
    """One setting's students; scores are fractions of 1."""

    setting: Setting
    scores: dict[int, dict[str, float]]  # of each seed that finished
    failed: dict[int, str] = field(default_factory=dict)  # why, by seed
    stopped: dict[int, int | None] = field(default_factory=dict)  # after which step, by seed

    @property
    def trials(self) -> int:
        return len(self.scores) + len(self.failed) + len(self.stopped)

    def values(self, score: str) -> list[float]:
        """The seeds' scores, without those that are not a number."""
        return [s[score] for s in self.scores.values() if not math.isnan(s[score])]

    def mean(self, score: str) -> float | None:
        values = self.values(score)
        return statistics.fmean(values) if values else None

    def std(self, score: str) -> float | None:
        """Sample standard deviation; None of one value."""
        values = self.values(score)
        return statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Best:
    """The setting with the best mean, and the seed that stands for it."""

    result: Result
    seed: int
    reason: str


def choose_best(results: Sequence[Result], score: str) -> Best | None:
    """The setting with the highest mean, and of its seeds the one whose score is nearest to that mean.

    Only settings with the largest share of their seeds finished contend: where some were stopped or failed, what is
    left of a setting is not a fair sample of it. None where no trial has a score.
    """
    most = max((_share(result, score) for result in results), default=0.0)
    if not most:
        return None
    contenders = [result for result in results if _share(result, score) == most]
    best = max(contenders, key=lambda result: result.mean(score) or 0.0)  # the first of equals
    mean = best.mean(score)
    assert mean is not None
    distances = {s: abs(v[score] - mean) for s, v in best.scores.items() if not math.isnan(v[score])}
    # Rounded, so that two on both sides of the mean count as equal, and the first one is taken.
    seed = min(distances, key=lambda s: round(distances[s], 9))
    number = best.scores[seed][score]
    reason = (
        f"{best.setting.name} has the best mean {TITLES[score]} of {plural(len(contenders), 'setting')}, "
    )
    reason += f"{_spread(best, score)}"
    if len(distances) > 1:
        reason += f"; of its {len(distances)} seeds {seed} is nearest to that, with {100 * number:.2f}"
    left_out = len(results) - len(contenders)
    if left_out:
        reason += f" ({plural(left_out, 'setting')} with fewer seeds finished did not contend)"
    return Best(best, seed, reason)


def _share(result: Result, score: str) -> float:
    """Of a setting's seeds those that have a score."""
    return len(result.values(score)) / result.trials if result.trials else 0.0


def _spread(result: Result, score: str) -> str:
    mean, std = result.mean(score), result.std(score)
    assert mean is not None
    return f"{100 * mean:.2f}" + (f" ± {100 * std:.2f}" if std is not None else "")


def sweep_table(
    results: Sequence[Result],
    others: Mapping[str, Mapping[str, float]],
    baselines: Mapping[str, Mapping[str, float]],
    *,
    score: str,
    dataset: str,
    notes: Sequence[str] = (),
) -> Table:
    """Table 4's form: a row a setting with mean ± std over its seeds, then teachers and trivial baselines."""
    highest = {key: max((_printed_mean(r, key) for r in results), default=-math.inf) for key in SCORES}
    rows = []
    for result in results:
        line = [Cell(result.setting.name), Cell(f"{len(result.scores)} of {result.trials}")]
        for key in SCORES:
            text = mean_and_std([100 * value for value in result.values(key)])
            is_best = text != DASH and len(results) > 1 and _printed_mean(result, key) == highest[key]
            line.append(Cell(text, best=is_best))
        rows.append(Row(tuple(line)))
    for kind, scores_of in (("method", others), ("baseline", baselines)):
        for name, scores in scores_of.items():
            texts = [percent(scores[k]) for k in SCORES]
            rows.append(Row((Cell(name), Cell(DASH), *map(Cell, texts)), kind))
    lines = [SAMPLE_STD] if any(len(r.scores) > 1 for r in results) else []
    for result in results:
        name = result.setting.name
        lines += [f"{name}, seed {seed} failed: {error}" for seed, error in result.failed.items()]
        lines += [
            f"{name}, seed {seed} was stopped early" + (f" after step {step:,}." if step else ".")
            for seed, step in result.stopped.items()
        ]
    return Table(
        "Table 4",
        f"Settings by their mean over seeds; the best is chosen by {TITLES[score]}",
        dataset,
        (Column("setting", numeric=False), Column("finished"), *score_columns(SCORES, paper=False)),
        tuple(rows),
        (*lines, *notes),
    )


def _printed_mean(result: Result, score: str) -> float:
    """In percent, as it is printed; -inf where there is none."""
    mean = result.mean(score)
    return -math.inf if mean is None else float(one_decimal(100 * mean))


def as_csv(results: Sequence[Result]) -> str:
    """A row a setting: its values by key, then mean, sample std (fractions of 1) and n of each score."""
    keys = list(dict.fromkeys(key for result in results for key in result.setting.values))
    columns = [f"{score}_{what}" for score in SCORES for what in ("mean", "std", "n")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["setting", *keys, "trials", "failed", "stopped", *columns])
    for result in results:
        numbers: list[Any] = []
        for score in SCORES:
            numbers += [result.mean(score), result.std(score), len(result.values(score))]
        values = [result.setting.values.get(key) for key in keys]
        writer.writerow(
            [result.setting.name, *values, result.trials, len(result.failed), len(result.stopped), *numbers]
        )
    return out.getvalue()


def as_json(results: Sequence[Result], others: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """All numbers: each seed's scores beside means and standard deviations."""
    return {
        "settings": [
            {
                "name": result.setting.name,
                "values": dict(result.setting.values),
                "mean": {score: result.mean(score) for score in SCORES},
                "std": {score: result.std(score) for score in SCORES},
                "scores": {str(seed): scores for seed, scores in result.scores.items()},
                "failed": {str(seed): error for seed, error in result.failed.items()},
                "stopped": {str(seed): step for seed, step in result.stopped.items()},
            }
            for result in results
        ],
        "others": {name: dict(scores) for name, scores in others.items()},
    }


def varied_number(results: Sequence[Result]) -> str | None:
    """The one key that differs between the settings, where its values are numbers; None else."""
    keys = {key for result in results for key in result.setting.values}
    varied = [key for key in keys if len({repr(result.setting.values.get(key)) for result in results}) > 1]
    if len(varied) != 1:
        return None
    numbers = [result.setting.values.get(varied[0]) for result in results]
    plain = all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers)
    return varied[0] if plain else None
