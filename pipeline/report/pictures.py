"""The report's pictures: the paper's Figures 1, 3 and 4 from our evaluations, every video's score, the worst.

All show one evaluation: the data set, clips and protocol under which most methods were recorded, and of each
method the one run that `select_runs` says. Videos are chosen by their scores alone, never by hand.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pipeline import storage
from pipeline.compute import best_device
from pipeline.config import Config
from pipeline.evaluate.records import Record
from pipeline.evaluate.scoring import TITLES
from pipeline.evaluate.table import plural
from pipeline.log import log
from pipeline.models import SlotModel
from pipeline.models.build import load_model
from pipeline.report.charts import COLOURS, OTHER_COLOUR, Method, Series, chart_png, score_chart, speed_chart
from pipeline.report.costs import frames_per_run
from pipeline.report.efficiency import device_name, measure_latencies
from pipeline.report.gallery import GROUND_TRUTH, MAX_FRAMES, Gallery
from pipeline.report.render import Picture
from pipeline.report.select import (
    NO_KD,
    SLOTMATCH,
    TEACHER,
    NothingToShow,
    Selection,
    main_evaluation,
    nearest_to_quantiles,
    select_runs,
    worst_videos,
)
from pipeline.segment.figures import Panel, comparison, to_png

WORST = 6
SCORE = TITLES["video_mbo"]

Latencies = Mapping[str, tuple[float, int]]  # by model URI: seconds a frame, number of parameters
Drawing = tuple[bytes, str, str]  # a PNG, its title and its caption


def draw_pictures(config: Config, records: Sequence[Record], latencies: Latencies) -> list[Picture]:
    """What pictures the records (the latest first) suffice for; says which they don't.

    Args:
        latencies: what `model_speeds` measured; empty: there is no Figure 1.
    """
    selection = select_runs(records, config.distill.beta)
    if not selection.models:
        log("report: no model was evaluated, so there are no pictures")
        return []
    gallery = Gallery(selection)
    drawings: dict[str, Callable[[], Drawing]] = {
        "figure1.png": lambda: _figure_1(selection, latencies),
        "figure3.png": lambda: _figure_3(gallery),
        "figure4.png": lambda: _figure_4(gallery),
        "scores_by_video.png": lambda: _scores_by_video(gallery),
        "worst_videos.png": lambda: _worst_videos(gallery),
    }
    pictures = []
    for name, draw in drawings.items():
        log(f"report: drawing {name}")
        try:
            content, title, caption = draw()
        except (ValueError, OSError, storage.IncompleteError) as error:  # NothingToShow is a ValueError
            log(f"report: {name} is left out: {error}")
            continue
        pictures.append(Picture(content, name, title, f"{caption} {selection.data}"))
    return pictures


def model_speeds(records: Sequence[Record], runs: int) -> dict[str, tuple[float, int]]:
    """Seconds a frame on this device (the median of `runs`) and parameters of each model that may be shown, by URI.

    Models of one architecture are measured once; all take turns. Nothing is measured where `runs` is 0.
    """
    if not runs:
        return {}
    device = best_device()
    models: dict[str, SlotModel] = {}  # one of each architecture
    kinds: dict[str, str] = {}
    for record in main_evaluation(records):
        if record.model_uri is None or record.model_uri in kinds:
            continue
        try:
            model = load_model(record.model_uri, record.hints)
        except (ValueError, OSError) as error:  # it was deleted or damaged; the report has more to show
            log(f"report: no speed of {record.name}: {error}")
            continue
        if not isinstance(model, SlotModel):
            log(f"report: no speed of {record.name}: a {type(model).__name__} is not timed")
            continue
        kinds[record.model_uri] = repr(model.config)
        models.setdefault(repr(model.config), model.to(device))
    seconds = measure_latencies(list(models.values()), frames_per_run(device), runs)
    costs = {
        kind: (s, model.num_parameters()) for (kind, model), s in zip(models.items(), seconds, strict=True)
    }
    return {uri: costs[kind] for uri, kind in kinds.items()}


# --- the pictures ---------------------------------------------------------------------------------


def _figure_1(selection: Selection, latencies: Latencies) -> Drawing:
    methods = []
    for name, record in selection.models.items():
        score = 100 * record.scores["video_mbo"]
        if record.model_uri is not None and record.model_uri in latencies and not math.isnan(score):
            seconds, parameters = latencies[record.model_uri]
            methods.append(Method(name, _colour(record), score, 1 / seconds, parameters))
    if not methods:
        raise NothingToShow("no model's speed was measured")
    scores = {name: 100 * record.scores["video_mbo"] for name, record in selection.baselines.items()}
    scores = {name: score for name, score in scores.items() if not math.isnan(score)}
    device = best_device()
    caption = f"{SCORE} over speed on {device_name(device)}; a circle's area is the number of parameters."
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if device.type == "cpu" and load > 1.25 * cores:
        caption += f" The machine was busy (load {load:.1f} on {plural(cores, 'core')}): speeds are rough."
    caption += " Dashed: trivial segmentations." if scores else ""
    return chart_png(speed_chart(methods, scores, SCORE)), "Figure 1: score, speed and size", caption


def _figure_3(gallery: Gallery) -> Drawing:
    ours, scores = gallery.required(SLOTMATCH)
    videos = nearest_to_quantiles(scores, (0.5, 0.5))
    rows = gallery.names(NO_KD, TEACHER, SLOTMATCH)
    panels = [gallery.panel(video, [*rows, GROUND_TRUTH]) for video in videos]
    which = "the video whose" if len(videos) == 1 else f"the {len(videos)} videos whose"
    caption = f"Not picked by hand: {which} {SCORE} of {ours} is nearest to the median. {_COLOURS_MEAN}"
    return _png(panels, ours), "Figure 3: frames, models and ground truth", caption


def _figure_4(gallery: Gallery) -> Drawing:
    ours, scores = gallery.required(SLOTMATCH)
    plain, plain_scores = gallery.required(NO_KD)
    gains = {video: score - plain_scores.get(video, math.nan) for video, score in scores.items()}
    videos = nearest_to_quantiles(gains, (0.25, 0.75))
    panels = [
        gallery.panel(video, [plain, ours], f", difference {100 * gains[video]:+.1f}") for video in videos
    ]
    caption = (
        f"Not picked by hand: the videos at the quartiles (25 %, 75 %) of the difference in {SCORE} between "
        f"{ours} and {plain}. {_COLOURS_MEAN}"
    )
    return _png(panels, ours), "Figure 4: what distillation changes", caption


def _scores_by_video(gallery: Gallery) -> Drawing:
    selection = gallery.selection
    first = selection.method(SLOTMATCH) or next(iter(selection.models))
    names = [first, *(name for name in selection.models if name != first)]
    videos = sorted({video for name in names for video in gallery.scores(name)})
    series = []
    for name in names:
        record, scores = selection.models[name], gallery.scores(name)
        values = np.array([100 * scores.get(video, math.nan) for video in videos])
        series.append(Series(name, _colour(record), values, 100 * record.scores["video_mbo"]))
    if np.isnan(series[0].values).all():
        raise NothingToShow("no video has a score")
    caption = f"{SCORE} of every video with objects, sorted by the score of {first}."
    return chart_png(score_chart(series, SCORE)), "Scores of all videos", caption


def _worst_videos(gallery: Gallery) -> Drawing:
    ours, scores = gallery.required(SLOTMATCH)
    videos = worst_videos(scores, WORST)
    rows = gallery.names(SLOTMATCH, TEACHER)
    panels = [gallery.panel(video, [GROUND_TRUTH, *rows]) for video in videos]
    which = "video" if len(videos) == 1 else f"{len(videos)} videos"
    caption = f"The {which} with the lowest {SCORE} of {ours}, the worst first. {_COLOURS_MEAN}"
    return _png(panels, ours, columns=3, across=3), "Where SlotMatch fails", caption


_COLOURS_MEAN = (
    "Every model runs from the first frame under the protocol of its scores; of long videos the first "
    f"{MAX_FRAMES} frames are shown. A colour is one slot for all of these frames. Slots of different models, and "
    "objects, are matched for their colours alone, by the pixels that they share."
)


def _png(panels: list[Panel], reference: str, columns: int = 4, across: int = 2) -> bytes:
    return to_png(comparison(panels, reference=reference, columns=columns, across=across))


def _colour(record: Record) -> str:
    return COLOURS.get(record.method, OTHER_COLOUR)
