"""Charts of scores: numbers in, a matplotlib figure out."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log, sqrt

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, which colour-blind people can tell apart; SlotMatch is the paper's cyan.
COLOURS = {
    "slotmatch": "#1e9bd7",
    "teacher": "#d55e00",
    "no_kd": "#e69f00",
    "feature_kd": "#009e73",
    "reconstruction_kd": "#cc79a7",
    "slotmatch_mse": "#0072b2",
    "slotmatch_hungarian": "#222222",
    "slotmatch_reconstruction_kd": "#b8a900",
}
OTHER_COLOUR = "#888888"
_MARKERS = "osD^vPX*"
_DPI = 140
_SIZE = (10.0, 5.6)  # inches: 1400 pixels wide
_LARGEST = 1600.0  # area of the largest circle, in points²
_TEXT = 11.0  # points
_EXTRA = 7.0  # points between a circle and its label
_LEADER = {
    "arrowstyle": "-",
    "color": "#777777",
    "linewidth": 0.8,
    "relpos": (0, 0.5),
    "shrinkA": 0,
    "shrinkB": 0,
}


@dataclass(frozen=True)
class Method:
    """One circle of Figure 1; the score is in percent."""

    name: str
    colour: str
    score: float
    frames_per_second: float
    parameters: int


def speed_chart(methods: Sequence[Method], baselines: Mapping[str, float], score_name: str) -> Figure:
    """The paper's Figure 1: score over speed, circle area = parameters; baselines as dashed lines."""
    beside = max([14.0, *(_text_width(f"{name} 00.0") + 10 for name in baselines)])
    right = 1 - beside / (72 * _SIZE[0])
    figure, axes = _new_figure(left=0.075, right=max(right, 0.6), bottom=0.115, top=0.87)
    largest = max(method.parameters for method in methods)
    areas = [_LARGEST * method.parameters / largest for method in methods]
    wide, high = _inner_points(figure)
    scores = [method.score for method in methods] + list(baselines.values())
    low, top = min(scores), max(scores)
    margin = max(0.14 * (top - low), 1.0)
    axes.set_ylim(max(0.0, low - margin), top + margin)
    # Every label ends before the right edge.
    room = [sqrt(area) / 2 + _EXTRA + _text_width(m.name) + 4 for m, area in zip(methods, areas, strict=True)]
    fastest = max(method.frames_per_second for method in methods)
    ends = [
        m.frames_per_second * wide / max(wide - r, 0.2 * wide) for m, r in zip(methods, room, strict=True)
    ]
    axes.set_xlim(0, max(1.08 * fastest, *ends))
    per_second, per_percent = wide / axes.get_xlim()[1], high / (axes.get_ylim()[1] - axes.get_ylim()[0])
    _draw_baselines(axes, baselines, per_percent)
    starts = [per_second * m.frames_per_second for m in methods]
    labels = [(x, x + r) for x, r in zip(starts, room, strict=True)]
    shifts = spread(per_percent * np.array([m.score for m in methods]), 1.3 * _TEXT, labels)
    circles = list(zip(methods, areas, shifts, strict=True))
    for method, area, shift in sorted(circles, key=lambda circle: -circle[0].parameters):
        _draw_circle(axes, method, area, shift)
    _size_legend(axes, largest)
    axes.set_xlabel("frames per second")
    axes.set_ylabel(f"{score_name} (%)")
    return figure


def _draw_baselines(axes: Axes, baselines: Mapping[str, float], per_percent: float) -> None:
    """Dashed lines, labelled outside on the right; `per_percent`: points of a percent."""
    names, values = list(baselines), np.array(list(baselines.values()))
    for name, value, shift in zip(names, values, spread(per_percent * values, 1.15 * _TEXT), strict=True):
        axes.axhline(value, color="#888888", linewidth=1, linestyle=(0, (5, 4)), zorder=1)
        axes.annotate(
            f"{plain(name)} {value:.1f}",
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(6, shift),
            textcoords="offset points",
            va="center",
            fontsize=_TEXT - 1,
            color="#555555",
        )


def _draw_circle(axes: Axes, method: Method, area: float, shift: float) -> None:
    """A circle of `area` points², labelled on its right, `shift` points above its centre."""
    place = (method.frames_per_second, method.score)
    circle = axes.scatter(*place, s=area, color=method.colour, alpha=0.7, edgecolor="white", zorder=3)
    circle.set_label(plain(method.name))
    axes.scatter(*place, s=7, color="black", zorder=4)  # what is read off the axes
    axes.annotate(
        plain(method.name),
        place,
        xytext=(sqrt(area) / 2 + _EXTRA, shift),
        textcoords="offset points",
        va="center",
        fontsize=_TEXT,
        zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
        arrowprops=_LEADER if abs(shift) > 1 else None,
    )


def _size_legend(axes: Axes, largest: int) -> None:
    """Circles of a few numbers of parameters, above the axes."""
    sizes = _round_sizes(largest)
    handles = [
        Line2D([], [], linestyle="", marker="o", color="#bbbbbb", markersize=sqrt(_LARGEST * size / largest))
        for size in sizes
    ]
    texts = [_count(size) for size in sizes]
    axes.legend(
        handles,
        [f"{texts[0]} parameters", *texts[1:]],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(sizes),
        handlelength=3,
        handletextpad=1.0,
        columnspacing=3.0,
        frameon=False,
        borderpad=1.2,
    )


@dataclass(frozen=True)
class Series:
    """One method's scores of each video in percent, NaN where it has none, and its mean over the data set."""

    name: str
    colour: str
    values: np.ndarray
    mean: float


def score_chart(series: Sequence[Series], score_name: str) -> Figure:
    """Scores of every video, sorted by those of the first series, which is drawn as a line."""
    figure, axes = _new_figure(left=0.075, right=0.985, bottom=0.115, top=0.92)
    order = np.argsort(series[0].values, kind="stable")  # NaN last
    order = order[~np.isnan(series[0].values[order])]
    ranks = np.arange(1, len(order) + 1)
    size = float(np.clip(75 / sqrt(max(len(order), 1)), 2.5, 8))
    for index, line in reversed(list(enumerate(series))):
        axes.plot(
            ranks,
            line.values[order],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=size,
            markeredgewidth=0,
            linestyle="-" if index == 0 else "",
            linewidth=2,
            color=line.colour,
            alpha=1.0 if index == 0 else 0.75,
            clip_on=False,  # a score of 0 is a whole marker too
            label=f"{plain(line.name)}, mean {line.mean:.1f}",
            zorder=3 if index == 0 else 2,
        )
    axes.set_xlim(0.5 - 0.01 * len(order), len(order) + 0.5 + 0.01 * len(order))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"videos, sorted by the score of {plain(series[0].name)}")
    axes.set_ylabel(f"{score_name} (%)")
    handles, names = axes.get_legend_handles_labels()
    columns = min(len(series), 3)
    axes.legend(
        handles[::-1],
        names[::-1],
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=columns,
        frameon=False,
        columnspacing=1.6,
        handletextpad=0.6,
        borderaxespad=0.2,
    )
    if len(series) > columns:
        figure.subplots_adjust(top=0.92 - 0.05 * ((len(series) - 1) // columns))
    return figure


def spread(
    positions: Sequence[float] | np.ndarray, gap: float, spans: Sequence[tuple[float, float]] | None = None
) -> list[float]:
    """How far to shift each label from its position, so that labels are at least `gap` apart.

    Args:
        spans: from where to where each label reaches in the other direction; those that don't meet may have
            any distance. None: all meet.
    """
    placed = [float(position) for position in positions]
    order = sorted(range(len(placed)), key=lambda i: placed[i])
    meeting = [
        (low, high)
        for n, low in enumerate(order)
        for high in order[n + 1 :]
        if spans is None or (spans[low][0] < spans[high][1] and spans[high][0] < spans[low][1])
    ]
    for _ in range(100 * len(placed)):  # neighbours push each other away, both by the same
        pushes = [(low, high, gap - (placed[high] - placed[low])) for low, high in meeting]
        pushes = [push for push in pushes if push[2] > 0.01]
        if not pushes:
            break
        for low, high, missing in pushes:
            placed[low] -= missing / 4
            placed[high] += missing / 4
    return [after - before for before, after in zip(positions, placed, strict=True)]


def chart_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _new_figure(**margins: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, dpi=_DPI)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(**margins)
    axes = figure.subplots()
    style_axes(axes)
    return figure, axes


def style_axes(axes: Axes) -> None:
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _inner_points(figure: Figure) -> tuple[float, float]:
    """Width and height inside the axes, in points."""
    margins = figure.subplotpars
    wide, high = figure.get_size_inches() * 72
    return wide * (margins.right - margins.left), high * (margins.top - margins.bottom)


def _text_width(text: str) -> float:
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), text, size=_TEXT).get_extents().width)


def plain(text: str) -> str:
    """Names are no formulas, whatever signs they have."""
    return text.replace("$", r"\$")


def _round_sizes(largest: int) -> list[int]:
    """Up to three sizes for a legend, 1, 2 or 5 times a power of ten, the largest first."""
    sizes = [step * 10**power for power in range(12, -1, -1) for step in (5, 2, 1)]
    nearest = [min(sizes, key=lambda size: abs(log(size / (share * largest)))) for share in (1, 0.3, 0.1)]
    return list(dict.fromkeys(nearest))


def _count(parameters: int) -> str:
    if parameters >= 1e6:
        return f"{parameters / 1e6:g} M"
    return f"{parameters / 1e3:g} k" if parameters >= 1e3 else str(parameters)
