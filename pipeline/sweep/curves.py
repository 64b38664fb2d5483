"""Learning curves: what the settings' seeds scored on the validation split while they trained."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline import storage, tracking
from pipeline.artifacts.manifests import TrialEntry
from pipeline.evaluate.scoring import TITLES
from pipeline.evaluate.table import Column, Row, Table, cells, mean_and_std
from pipeline.report.charts import plain, style_axes

_SIZE, _LINES = (10.0, 4.6), ("-", "--", ":")  # inches; every ten settings another one
_MOST_STEPS = 6  # columns of the table

# Of each setting, in the order of the steps, the seeds' scores (fractions of 1).
Curves = Mapping[str, Mapping[int, Sequence[float]]]


def read_curves(trials: Sequence[TrialEntry], score: str) -> Curves:
    """Of the trials that finished and that validated while they trained (`distill.validate_every`)."""
    curves: dict[str, dict[int, list[float]]] = {}
    for trial in trials:
        if trial.status != "finished":
            continue
        for row in storage.read_json(storage.join(trial.run, tracking.HISTORY_FILE)):
            if (value := row.get(f"validation_{score}")) is not None:
                curves.setdefault(trial.setting, {}).setdefault(int(row["step"]), []).append(value)
    return {name: dict(sorted(steps.items())) for name, steps in curves.items()}


def curve_table(curves: Curves, score: str, part: str) -> Table:
    """Mean and spread over seeds at a few of the steps, evenly spaced, the last one among them."""
    every = sorted({step for steps in curves.values() for step in steps})
    places = np.linspace(len(every) - 1, 0, min(_MOST_STEPS, len(every))).round().astype(int)
    shown = sorted({every[i] for i in places})
    rows = [
        Row(cells(name, *(mean_and_std([100 * value for value in steps.get(s, ())]) for s in shown)))
        for name, steps in curves.items()
    ]
    columns = (Column("setting", numeric=False), *(Column(f"step {step:,}") for step in shown))
    title = f"{TITLES[score]} while training, on the validation split"
    return Table("Curves", title, part, columns, tuple(rows))


def curve_chart(curves: Curves, score: str) -> Figure:
    """The mean over seeds by step, and the range of the seeds as an area."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    style_axes(axes)
    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for number, (name, steps) in enumerate(curves.items()):
        at, colour = list(steps), colours[number % len(colours)]
        means = [100 * statistics.fmean(values) for values in steps.values()]
        line = _LINES[number // len(colours) % len(_LINES)]
        axes.plot(at, means, line, color=colour, linewidth=1.8, label=plain(name))
        lowest, highest = ([100 * end(values) for values in steps.values()] for end in (min, max))
        axes.fill_between(at, lowest, highest, color=colour, alpha=0.1, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel(f"{TITLES[score]} (%)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure
