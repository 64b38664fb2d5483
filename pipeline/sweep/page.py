"""A sweep's page: its table in three forms, all numbers, and a plot of the four scores over the number that was
varied, or by setting."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline.config import Config
from pipeline.evaluate.records import Evaluation
from pipeline.evaluate.scoring import SCORES, TITLES
from pipeline.evaluate.table import Table, plain_text
from pipeline.report.charts import COLOURS, OTHER_COLOUR, chart_png, plain, style_axes
from pipeline.report.render import Page, Picture, markdown
from pipeline.sweep.results import Best, Result, as_csv, as_json, sweep_table, varied_number

TABLE_TEXT, TABLE_CSV, TABLE_MD = "table.txt", "table.csv", "table.md"
NUMBERS, PLOT = "scores.json", "plot.png"
_WIDTH, _HEIGHT = 10.0, 7.2  # inches
_NARROWEST = 1.0  # points, of an axis of scores
_SYMBOLS = {"distill.beta": "β"}


def page_files(
    name: str,
    results: Sequence[Result],
    others: Mapping[str, Mapping[str, float]],
    baselines: Mapping[str, Mapping[str, float]],
    evaluation: Evaluation,
    best: Best | None,
    config: Config,
) -> tuple[list[tuple[str, bytes]], Table]:
    """Names and contents of a sweep's files, and its table.

    Args:
        name: the sweep's.
        others: teachers by name; scores are fractions of 1, as those of `baselines`.
        evaluation: of any student, for the protocol and the number of videos, which all have in common.
        best: the chosen setting; None where no trial has a score.
    """
    score, rules = config.evaluate.score, evaluation.protocol
    notes = [f"Protocol {rules.name}: {rules.in_words}; {evaluation.videos} videos.", *rules.warnings]
    notes += [f"Chosen: {best.reason}."] if best else []
    table = sweep_table(results, others, baselines, score=score, dataset=config.dataset.title, notes=notes)
    plot = chart_png(sweep_chart(results, others))
    picture = Picture(plot, PLOT, "Scores", "Error bars: sample standard deviation over seeds.")
    numbers = as_json(results, {**others, **baselines})
    numbers["best"] = best_summary(best, score)
    files = [
        (TABLE_TEXT, (plain_text(table) + "\n").encode()),
        (TABLE_CSV, as_csv(results).encode()),
        (TABLE_MD, markdown(Page(f"Sweep {name}", [], [table], [picture], [])).encode()),
        (NUMBERS, (json.dumps(_without_nan(numbers), indent=2) + "\n").encode()),
        (PLOT, plot),
    ]
    return files, table


def best_summary(best: Best | None, score: str) -> dict[str, Any] | None:
    """The chosen setting as JSON has it; `mean` and `std` are fractions of 1."""
    if best is None:
        return None
    return {
        "setting": best.result.setting.name,
        "values": dict(best.result.setting.values),
        "seed": best.seed,
        "score": score,
        "mean": best.result.mean(score),
        "std": best.result.std(score),
    }


def _without_nan(values: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(values, dict):
        return {key: _without_nan(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_without_nan(value) for value in values]
    return None if isinstance(values, float) and values != values else values


# --- the plot -------------------------------------------------------------------------------------


def sweep_chart(
    results: Sequence[Result], others: Mapping[str, Mapping[str, float]], scores: Sequence[str] = SCORES
) -> Figure:
    """One panel a score: the mean with its sample std, every seed as a dot, and teachers as dashed lines.

    Args:
        others: models beside the sweep's students, by name; scores are fractions of 1.
        scores: which are shown.
    """
    key = varied_number(results)
    longest = max(len(result.setting.name) for result in results)
    # Names of settings need room of their own, in lines below each other.
    height = _HEIGHT if key else max(_HEIGHT, 0.5 * len(results) + 3.2)
    rows, columns = math.ceil(len(scores) / 2), min(2, len(scores))
    height = 0.8 + (height - 0.8) * rows / 2  # the legend keeps its own
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharex=key is not None, sharey=key is None, squeeze=False)
    for axes in panels.flat[len(scores) :]:
        axes.set_visible(False)
    for axes, score in zip(panels.flat, scores, strict=False):
        style_axes(axes)
        if key:
            _over_number(axes, results, score, key)
        else:
            _by_setting(axes, results, score, longest)
        for number, (name, of) in enumerate(others.items()):
            line = axes.axhline if key else axes.axvline
            line(
                100 * of[score],
                color=COLOURS["teacher"] if number == 0 else OTHER_COLOUR,
                linewidth=1.2,
                linestyle=(0, (5, 4)),
                zorder=1,
                label=plain(name),
            )
        axes.set_title(TITLES[score], fontsize=11)
        _no_narrower(axes, "y" if key else "x")
    for axes in panels[-1] if key else []:
        axes.set_xlabel(_SYMBOLS.get(key or "", key))
    for axes in panels[:, 0] if key else panels[-1]:
        axes.set_ylabel("score (%)") if key else axes.set_xlabel("score (%)")
    handles, names = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 4), frameon=False)
    return figure


def _no_narrower(axes: Axes, along: str) -> None:
    """Scores that are equal to rounding look so."""
    low, high = getattr(axes, f"get_{along}lim")()
    if high - low < _NARROWEST:
        middle = (low + high) / 2
        getattr(axes, f"set_{along}lim")(middle - _NARROWEST / 2, middle + _NARROWEST / 2)


def _over_number(axes: Axes, results: Sequence[Result], score: str, key: str) -> None:
    found = sorted((r for r in results if r.values(score)), key=lambda r: r.setting.values[key])
    places = [float(result.setting.values[key]) for result in found]
    if places and min(places) > 0 and max(places) / min(places) > 20:
        axes.set_xscale("log")
    _draw(axes, found, score, places, upright=True)
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()


def _by_setting(axes: Axes, results: Sequence[Result], score: str, longest: int) -> None:
    _draw(axes, results, score, list(range(len(results))), upright=False)
    axes.set_yticks(
        range(len(results)),
        [plain(result.setting.name) for result in results],
        fontsize=10 if longest < 30 else 8,
    )
    axes.set_ylim(len(results) - 0.5, -0.5)  # the first on top


def _draw(
    axes: Axes, results: Sequence[Result], score: str, places: Sequence[float], *, upright: bool
) -> None:
    with_scores = [(r, p) for r, p in zip(results, places, strict=True) if r.values(score)]
    means = [100 * (r.mean(score) or 0.0) for r, _ in with_scores]
    stds = [100 * (r.std(score) or 0.0) for r, _ in with_scores]
    at = [place for _, place in with_scores]
    style: dict[str, Any] = {
        "fmt": "o-" if upright else "o",
        "color": COLOURS["slotmatch"],
        "linewidth": 2,
        "elinewidth": 1.2,
        "capsize": 4,
        "markersize": 6,
        "zorder": 3,
        "label": "mean ± std over seeds",
    }
    if upright:
        axes.errorbar(at, means, yerr=stds, **style)
    else:
        axes.errorbar(means, at, xerr=stds, **style)
    dots = np.array([(place, 100 * value) for r, place in with_scores for value in r.values(score)])
    if len(dots):
        across, along = (dots[:, 0], dots[:, 1]) if upright else (dots[:, 1], dots[:, 0])
        axes.scatter(across, along, s=16, color="#222222", alpha=0.6, linewidth=0, zorder=4, label="one seed")
