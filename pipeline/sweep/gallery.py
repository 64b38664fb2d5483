"""What models see: the same frames under each, of the evidence's and the rivals' page.

Videos are chosen by the scores of one row alone, never by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.clips.table import ClipSet
from pipeline.compute import best_device
from pipeline.config.protocols import Protocol
from pipeline.evaluate.baselines import Predictor
from pipeline.evaluate.records import Evaluation
from pipeline.evaluate.scoring import TITLES
from pipeline.evaluate.stage import subject_predictor
from pipeline.evaluate.subjects import Subject
from pipeline.models.build import open_model
from pipeline.report.gallery import GROUND_TRUTH, MAX_FRAMES, panel_title, video_panel
from pipeline.report.render import Picture
from pipeline.report.select import nearest_to_quantiles, worst_videos
from pipeline.segment.figures import comparison, to_png

WORST = 4
SCORE = "video_mbo"
_MAX_BYTES = 300_000  # each: documents are kept with the code
_SEEN = (
    f"Not picked by hand. The first {MAX_FRAMES} frames of a video are shown; a colour is one slot for all of "
    "them, and slots of different rows are matched for their colours alone."
)


@dataclass(frozen=True)
class Shown:
    """A row of the pictures: what makes its masks, and its score of each video (a fraction of 1)."""

    subject: Subject
    scores: Mapping[str, float]

    @classmethod
    def of(cls, subject: Subject, evaluation: Evaluation) -> Shown:
        """With the scores that were recorded of it."""
        return cls(subject, {video: one[SCORE] for video, one in evaluation.per_video().items()})


def frames_pictures(clips: ClipSet, protocol: Protocol, rows: Mapping[str, Shown]) -> list[Picture]:
    """The two videos nearest to the median of the last row's scores, and those with its lowest ones."""
    ours = list(rows)[-1]
    scores = rows[ours].scores
    median = nearest_to_quantiles(scores, (0.5, 0.5))
    worst = [video for video in worst_videos(scores, WORST + len(median)) if video not in median][:WORST]
    chosen = f"{TITLES[SCORE]} of {ours}"
    parts = {
        "evidence-frames.png": (
            "Frames of the test split",
            f"The videos nearest to the median {chosen}.",
            median,
        ),
        "evidence-worst.png": (
            "Where it fails",
            f"The videos with the lowest {chosen}, the worst first.",
            worst,
        ),
    }
    return [
        Picture(_draw(clips, protocol, rows, videos, ours), link, title, f"{which} {_SEEN}")
        for link, (title, which, videos) in parts.items()
        if videos
    ]


def median_picture(clips: ClipSet, protocol: Protocol, rows: Mapping[str, Shown], link: str) -> Picture:
    """The two videos nearest to the median of the first row's scores, objects and slots on them in one colour."""
    first = next(iter(rows))
    videos = nearest_to_quantiles(rows[first].scores, (0.5, 0.5))
    which = f"The videos nearest to the median {TITLES[SCORE]} of {first}."
    return Picture(
        _draw(clips, protocol, rows, videos, GROUND_TRUTH), link, "What they see", f"{which} {_SEEN}"
    )


def _draw(
    clips: ClipSet, protocol: Protocol, rows: Mapping[str, Shown], videos: Sequence[str], reference: str
) -> bytes:
    """`reference`: the row that the others' colours follow."""
    entries = {video.video_id: video for video in clips.videos}
    models = {
        name: open_model(row.subject.model_uri, row.subject.hints, best_device())
        for name, row in rows.items()
        if row.subject.model_uri is not None
    }
    panels = []
    for video in videos:
        predictors: dict[str, Predictor | None] = {GROUND_TRUTH: None}
        for name, model in models.items():
            predictors[name] = subject_predictor(rows[name].subject, model, clips, entries[video], protocol)
        title = panel_title(video, {name: rows[name].scores for name in models}, a_line=2)
        panels.append(video_panel(clips, entries[video], predictors, title, protocol))
    return to_png(comparison(panels, reference=reference), _MAX_BYTES)
