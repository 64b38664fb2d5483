"""Videos under models, as panels of a comparison."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from PIL import Image

from pipeline.clips.schema import Clip
from pipeline.clips.table import ClipSet, VideoEntry
from pipeline.clips.views import View, apply_view, nearest_resize
from pipeline.compute import best_device
from pipeline.config.protocols import Protocol
from pipeline.evaluate.baselines import Predictor
from pipeline.evaluate.records import METHODS
from pipeline.evaluate.scoring import boxes_of_samples, model_predictor, recorded_protocol, samples, view_of
from pipeline.models.build import open_model
from pipeline.models.segmenter import Segmenter
from pipeline.report.select import NothingToShow, Selection
from pipeline.segment.figures import Panel

MAX_FRAMES = 120  # of a video, for a picture
MAX_SIDE = 320  # pixels of what a picture is drawn from
GROUND_TRUTH = "Ground truth"


def video_panel(
    clips: ClipSet,
    video: VideoEntry,
    rows: Mapping[str, Predictor | None],
    title: str,
    protocol: Protocol,
) -> Panel:
    """A video over a row for each model, as the protocol has them: its crop, roll-out, masks and clips.

    A row of None is the ground truth: objects by number, -1 where there is none. Of a long video only the first frames
    are shown.
    """
    view = view_of(protocol, clips, video)
    scale = min(1.0, MAX_SIDE / max(view.height, view.width))
    size = (max(1, round(scale * view.height)), max(1, round(scale * view.width)))
    frames, objects = _read(clips, video, view, size)
    labels = {}
    for name, predict in rows.items():
        if predict is None:
            labels[name] = objects
            continue
        labels[name] = np.concatenate(
            [
                chunk
                for sample in samples(_first_clips(clips, video), protocol.clip_frames)
                for chunk in predict((apply_view(clip.frames, view) for clip in sample), size)
            ]
        )
    # Clips of a protocol leave a shorter tail out.
    length = min(map(len, labels.values()), default=len(frames))
    return Panel(frames[:length], {name: row[:length] for name, row in labels.items()}, title)


def panel_title(video_id: str, scores: Mapping[str, Mapping[str, float]], a_line: int = 3) -> str:
    """A video's name over the scores that it has, by row, so many a line."""
    of_rows = [f"{name} {100 * of.get(video_id, math.nan):.1f}" for name, of in scores.items()]
    lines = [", ".join(of_rows[i : i + a_line]) for i in range(0, len(of_rows), a_line)]
    return "\n".join([video_id, *lines])


def _first_clips(clips: ClipSet, video: VideoEntry, *, masks: bool = False) -> Iterator[Clip]:
    left = MAX_FRAMES
    for clip in clips.iter_video(video, masks=masks):
        found = None if clip.masks is None else clip.masks[:left]
        yield Clip(clip.video_id, clip.clip_index, clip.full, clip.frames[:left], found)
        left -= len(clip.frames)
        if left <= 0:
            return


def _read(
    clips: ClipSet, video: VideoEntry, view: View, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Frames `(T, *size, 3)`, and the number of the object at each pixel, -1 where there is none."""
    numbers: dict[int, int] = {}
    frames, labels = [], []
    for clip in _first_clips(clips, video, masks=True):
        cropped = apply_view(clip.frames, view)
        frames += [
            np.asarray(Image.fromarray(f).resize(size[::-1], Image.Resampling.LANCZOS)) for f in cropped
        ]
        for objects in clip.masks or [{}] * len(cropped):
            label = np.full(size, -1, np.int16)
            for object_id, mask in objects.items():
                inside = nearest_resize(apply_view(mask[None], view)[0], size)
                label[inside] = numbers.setdefault(object_id, len(numbers))
            labels.append(label)
    return np.stack(frames), np.stack(labels)


class Gallery:
    """Scores, clips and models of what is shown, each read when it is first needed."""

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self._scores: dict[str, dict[str, float]] = {}
        self._models: dict[str, Segmenter] = {}
        self._clips: ClipSet | None = None

    @property
    def clips(self) -> ClipSet:
        if self._clips is None:
            self._clips = ClipSet(next(iter(self.selection.models.values())).clips_uri)
        return self._clips

    def names(self, *methods: str) -> list[str]:
        """Of those methods that were recorded."""
        return [name for name in map(self.selection.method, methods) if name]

    def required(self, method: str) -> tuple[str, dict[str, float]]:
        """The name and the scores of a model that a picture can't do without."""
        name = self.selection.method(method)
        if name is None:
            raise NothingToShow(f"there is no evaluation of {METHODS[method]}")
        return name, self.scores(name)

    def scores(self, name: str) -> dict[str, float]:
        """A model's score of each video."""
        if name not in self._scores:
            rows = self.selection.models[name].per_video()
            self._scores[name] = {row["video_id"]: row["video_mbo"] for row in rows}
        return self._scores[name]

    def panel(self, video_id: str, rows: Sequence[str], note: str = "") -> Panel:
        """A video with a row for each of these models (or `GROUND_TRUTH`), and their scores as its title."""
        video = next((v for v in self.clips.videos if v.video_id == video_id), None)
        if video is None:
            raise NothingToShow(f"{self.clips.uri} has no video {video_id!r}")
        predictors = {
            name: None if name == GROUND_TRUTH else self._predictor(self._model(name), video) for name in rows
        }
        title = panel_title(video_id, {name: self.scores(name) for name in rows if name != GROUND_TRUTH})
        return video_panel(self.clips, video, predictors, title + note, self.protocol)

    def _predictor(self, model: Segmenter, video: VideoEntry) -> Predictor:
        given = boxes_of_samples(model, self.clips, video, self.protocol)
        return model_predictor(model, video.video_id, self.protocol, given)

    @property
    def protocol(self) -> Protocol:
        return recorded_protocol(next(iter(self.selection.models.values())).protocol)

    def _model(self, name: str) -> Segmenter:
        record = self.selection.models[name]
        if name not in self._models:
            if record.model_uri is None:
                raise NothingToShow(f"it is not recorded where the model of {name} is")
            self._models[name] = open_model(record.model_uri, record.hints, best_device())
        return self._models[name]
