"""Scores of one video under a protocol, streamed. What `evaluate` and validation have in common; no Ray.

Frames go through the model clip by clip and only pixel counts are kept, so memory does not grow with the
video's length (but for the cyclic roll-out, which needs the whole of a sample).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice, repeat
from typing import Any, TypeGuard

import numpy as np
import torch

from pipeline.artifacts.manifests import Rules
from pipeline.clips.schema import Clip, stack_masks
from pipeline.clips.table import ClipSet, VideoEntry
from pipeline.clips.views import (
    View,
    apply_view,
    central_square,
    nearest_resize,
    stable_hash,
    without_borders,
)
from pipeline.config.protocols import Protocol
from pipeline.evaluate.baselines import Predictor
from pipeline.evaluate.table import Cell, Column, Row, Table, cells, one_decimal
from pipeline.metrics import (
    MatchedScores,
    OverlapCounts,
    ari_per_sample,
    best_overlap_per_sample,
    count_overlaps,
    matched_scores,
)
from pipeline.models.segmenter import Segmenter, VideoSegmenter
from pipeline.models.tf32 import without_tf32
from pipeline.storage.threads import behind

SCORES = ("image_fg_ari", "image_mbo", "video_fg_ari", "video_mbo")
MATCHED_SCORES = ("matched_fg_ari", "matched_miou")  # of protocols with `matched` alone
TITLES = {
    "image_fg_ari": "image FG-ARI",
    "image_mbo": "image mBO",
    "video_fg_ari": "video FG-ARI",
    "video_mbo": "video mBO",
    "matched_fg_ari": "matched FG-ARI",
    "matched_miou": "matched mIoU",
}
BACKGROUND = -1  # an object id that no data set uses
MOST_SLOTS = 256  # labels are bytes


@dataclass(frozen=True)
class VideoScore:
    """One video's scores, NaN where nothing was scored.

    `image_samples` frames and `video_samples` clips (1, or 0, for a whole video) have an object; the scores
    are means over them. Where the protocol matches slots to objects, `matched_fg_ari` is the mean over clips of the
    mean over their frames, `matched_miou` that over all `objects` of the clips; else there are none of the three.
    """

    video_id: str
    image_samples: int
    video_samples: int
    image_fg_ari: float
    image_mbo: float
    video_fg_ari: float
    video_mbo: float
    slots_in_use: float
    objects: int | None = None
    matched_fg_ari: float | None = None
    matched_miou: float | None = None


def mean_scores(scores: list[VideoScore]) -> dict[str, float]:
    """The data set's scores: image level over all frames, video level over all clips or videos, mIoU over all objects.

    Raises:
        ValueError: no object in any of them.
    """
    valid = [s for s in scores if s.image_samples]
    if not valid:
        raise ValueError("not one video has an annotated object (in the part that the protocol looks at)")
    result = {}
    over = {"matched_fg_ari": "video_samples", "matched_miou": "objects"}
    for name in (*SCORES, *(name for name in MATCHED_SCORES if getattr(valid[0], name) is not None)):
        values = np.array([getattr(s, name) for s in valid])
        weights = np.array([getattr(s, over.get(name, f"{name.split('_')[0]}_samples")) for s in valid])
        result[name] = float((values * weights).sum() / weights.sum())
    result["slots_in_use"] = float(np.mean([s.slots_in_use for s in valid]))
    return result


def score_table(rows: Sequence[tuple[str, Mapping[str, float]]], warnings: Sequence[str] = ()) -> Table:
    """Scores of `mean_scores` in percent and the slots in use, one row a model, for the terminal; warnings below."""
    shown = [*SCORES, *(s for s in MATCHED_SCORES if all(s in scores for _, scores in rows))]
    titles = [*(TITLES[score] for score in shown), "slots in use"]
    lines = []
    for name, scores in rows:
        numbers = [*(100 * scores[score] for score in shown), scores["slots_in_use"]]
        lines.append(Row((Cell(name), *cells(*map(one_decimal, numbers)))))
    columns = (Column("", numeric=False), *(Column(title, width=max(12, len(title))) for title in titles))
    return Table("", "Scores", "", columns, tuple(lines), tuple(warnings))


def model_predictor(
    model: Segmenter, video_id: str, protocol: Protocol, given: Iterator[dict[str, Any]] | None = None
) -> Predictor:
    """Labels of a model, slots carried from chunk to chunk.

    Args:
        given: `given_boxes` of the video's samples in turn.
    """

    def predict(chunks: Iterator[np.ndarray], size: tuple[int, int]) -> Iterator[np.ndarray]:
        boxes = {} if given is None else next(given)
        seed = stable_hash("evaluate", video_id)
        for _, _, masks in model.stream(
            chunks, noise_seed=seed, rollout=protocol.rollout, masks=protocol.masks, **boxes
        ):
            yield model.label_maps(masks, size).cpu().numpy()

    return predict


def _starts_from_boxes(model: Segmenter) -> TypeGuard[VideoSegmenter]:
    return isinstance(model, VideoSegmenter) and model.start_boxes > 0


def given_boxes(
    model: Segmenter, clips: ClipSet, video: VideoEntry, view: View, start: int = 0
) -> dict[str, Any]:
    """What `model.stream` needs beside a video's frames from `start` on: boxes, of a model that starts from such.

    These are of the first frame that shows an object; where no frame of its clip does, there are none.

    Raises:
        ValueError: the video has no masks.
    """
    if not _starts_from_boxes(model):
        return {}
    clip, frame = divmod(start, clips.clip_frames)
    boxes = clips.read_boxes(video.shard, video.first_row + clip, view, model.start_boxes, frame)
    return {"boxes": torch.from_numpy(boxes).to(model.device)}


def boxes_of_samples(
    model: Segmenter, clips: ClipSet, video: VideoEntry, protocol: Protocol
) -> Iterator[dict[str, Any]]:
    """`given_boxes` of each sample of a video under a protocol."""
    if not _starts_from_boxes(model):
        return repeat({})  # without a look at the video, which `view_of` may take
    view = view_of(protocol, clips, video)
    starts = range(0, video.frames, protocol.clip_frames or video.frames)
    return (given_boxes(model, clips, video, view, start) for start in starts)


def score_video(clips: ClipSet, video: VideoEntry, predict: Predictor, protocol: Protocol) -> VideoScore:
    """Scores of one annotated video; one pass makes all of them."""
    return score_videos(clips, [video], lambda _: predict, protocol)[0]


def score_videos(
    clips: ClipSet,
    videos: Sequence[VideoEntry],
    predictor: Callable[[VideoEntry], Predictor],
    protocol: Protocol,
) -> list[VideoScore]:
    """Scores of annotated videos of a clip set, each by its predictor.

    Clips are decoded and pixels counted in threads while a model works on the clip in between, with at most a few
    clips on either side.
    """
    decoded = clips.iter_videos(videos, masks=True)
    scores = []
    with contextlib.closing(decoded), without_tf32(), behind() as later:
        for video in videos:
            own = islice(decoded, video.clips)
            predict, view = predictor(video), view_of(protocol, clips, video)
            scored = [
                _score_sample(sample, view, predict, protocol, later)
                for sample in samples(own, protocol.clip_frames)
            ]
            scores.append(later(_summarise, video.video_id, scored, protocol))
    return [score.result() for score in scores]


class _Sample:
    """What is kept of a clip or a whole video: its frames' scores, and the pixel counts of all of it.

    Nothing of it grows but two numbers a frame, and each frame's counts where slots are matched to objects.
    """

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self.frames: list[tuple[float, float]] = []  # FG-ARI and mBO of each frame with an object
        self.first: set[int] | None = None  # objects of the first frame, where these alone are scored
        # Objects and counts, where slots are matched.
        self._chunks: list[tuple[list[int], OverlapCounts]] = []
        self._shared: dict[int, np.ndarray] = {}  # object id -> pixels shared with each slot
        self._slot_area = np.zeros(MOST_SLOTS, np.int64)

    def add(self, object_ids: list[int], counts: OverlapCounts) -> None:
        """Adds the counts of a chunk of frames, whose objects these are."""
        ari, valid = ari_per_sample(counts)
        mbo, _ = best_overlap_per_sample(counts)
        self.frames += zip(ari[valid].tolist(), mbo[valid].tolist(), strict=True)
        used = counts.slot_area.shape[1]
        self._slot_area[:used] += counts.slot_area.sum(0).numpy()
        for object_id, row in zip(object_ids, counts.shared.sum(0).numpy(), strict=True):
            self._shared.setdefault(object_id, np.zeros(MOST_SLOTS, np.int64))[:used] += row
        if self.protocol.matched:
            self._chunks.append((object_ids, counts))

    @property
    def objects(self) -> int:
        """Those that have a pixel."""
        return sum(bool(row.any()) for i, row in self._shared.items() if i != BACKGROUND)

    def matched(self) -> MatchedScores:
        """Those of slots that are matched to the objects of all of its frames."""
        ids = sorted(self._shared)
        most = max(counts.slot_area.shape[1] for _, counts in self._chunks)
        shared, areas = [], []
        for own, counts in self._chunks:
            frames, used = counts.slot_area.shape
            part = torch.zeros(frames, len(ids), most, dtype=torch.int64)
            part[:, torch.tensor([ids.index(i) for i in own], dtype=torch.int64), :used] = counts.shared
            shared.append(part)
            areas.append(torch.nn.functional.pad(counts.slot_area, (0, most - used)))
        together = torch.cat(shared)
        return matched_scores(OverlapCounts(together, together.sum(-1), torch.cat(areas)))

    def scores(self) -> tuple[float, float] | None:
        """FG-ARI and mBO of the whole; None without an object."""
        rows = [self._shared[i] for i in sorted(self._shared)]
        shared = torch.from_numpy(np.array(rows, np.int64).reshape(1, -1, MOST_SLOTS))
        counts = OverlapCounts(shared, shared.sum(-1), torch.from_numpy(self._slot_area)[None])
        ari, valid = ari_per_sample(counts)
        return (float(ari), float(best_overlap_per_sample(counts)[0])) if bool(valid) else None

    def slots_in_use(self) -> int:
        """Slots with more than a hundredth of all pixels: less says nothing."""
        return int((self._slot_area > 0.01 * self._slot_area.sum()).sum())


def _summarise(video_id: str, samples: list[_Sample], protocol: Protocol) -> VideoScore:
    if protocol.min_objects:
        samples = [sample for sample in samples if sample.objects >= protocol.min_objects]
    frames = [scores for sample in samples for scores in sample.frames]
    wholes = [scores for sample in samples if (scores := sample.scores())]

    def mean(values: list[float]) -> float:
        return float(np.mean(values)) if values else float("nan")

    return VideoScore(
        video_id,
        image_samples=len(frames),
        video_samples=len(wholes),
        image_fg_ari=mean([ari for ari, _ in frames]),
        image_mbo=mean([mbo for _, mbo in frames]),
        video_fg_ari=mean([ari for ari, _ in wholes]),
        video_mbo=mean([mbo for _, mbo in wholes]),
        slots_in_use=mean([float(sample.slots_in_use()) for sample in samples]),
        **(_matched([sample.matched() for sample in samples]) if protocol.matched else {}),
    )


def _matched(samples: list[MatchedScores]) -> dict[str, Any]:
    """The fields of a `VideoScore` that only protocols with `matched` have."""
    with_objects = [sample for sample in samples if len(sample.ious)]
    if not with_objects:
        return {"objects": 0, **dict.fromkeys(MATCHED_SCORES, float("nan"))}
    ious = torch.cat([sample.ious for sample in with_objects])
    aris = [float(sample.fg_ari[sample.valid].mean()) for sample in with_objects]
    return {
        "objects": len(ious),
        "matched_fg_ari": float(np.mean(aris)),
        "matched_miou": float(ious.mean()),
    }


def samples(clips: Iterator[Clip], frames: int) -> Iterator[Iterator[Clip]]:
    """A video's clips as one sample, or cut anew into clips of `frames` without the shorter tail."""
    if not frames:
        yield clips
        return
    parts: list[Clip] = []
    held = 0
    for clip in clips:
        while len(clip.frames):
            take = min(frames - held, len(clip.frames))
            parts.append(_cut(clip, slice(0, take)))
            clip, held = _cut(clip, slice(take, None)), held + take
            if held == frames:
                yield iter(parts)
                parts, held = [], 0


def _cut(clip: Clip, part: slice) -> Clip:
    masks = None if clip.masks is None else clip.masks[part]
    return Clip(clip.video_id, clip.clip_index, clip.full, clip.frames[part], masks)


def recorded_protocol(rules: Rules) -> Protocol:
    """The protocol of a recorded evaluation."""
    return Protocol(**rules.model_dump(include={field.name for field in fields(Protocol)}))


def view_of(protocol: Protocol, clips: ClipSet, video: VideoEntry) -> View:
    """What of a video's frames the model sees under a protocol; for black borders all of them are looked at."""
    if protocol.crop == "central":
        return central_square(video.height, video.width)
    whole = View(0, 0, video.height, video.width, False, 0)
    if protocol.crop == "full":
        return whole
    return without_borders(whole, (clip.frames for clip in clips.iter_video(video)))


def _score_sample(
    sample: Iterator[Clip],
    view: View,
    predict: Predictor,
    protocol: Protocol,
    later: Callable[..., Any],
) -> _Sample:
    """What will hold a sample's counts, once the calls that are left to `later` have been made."""
    size = protocol.size_of_masks(view.height, view.width)
    annotations: list[list[dict[int, np.ndarray]]] = []

    def chunks() -> Iterator[np.ndarray]:
        for clip in sample:
            assert clip.masks is not None
            annotations.append(clip.masks)
            yield apply_view(clip.frames, view)

    result = _Sample(protocol)
    for labels in predict(chunks(), size):
        later(_count, result, annotations.pop(0), labels, view)
    return result


def _count(
    result: _Sample,
    annotations: list[dict[int, np.ndarray]],
    labels: np.ndarray,
    view: View,
) -> None:
    """Adds a chunk of frames, whose masks these are as stored, to its sample."""
    protocol, size = result.protocol, labels.shape[1:]
    box = (slice(view.top, view.top + view.height), slice(view.left, view.left + view.width))
    seen = [{i: m[box] for i, m in frame.items()} for frame in annotations]
    if area := protocol.min_object_area:
        seen = [{i: m for i, m in frame.items() if np.count_nonzero(m) >= area} for frame in seen]
    masks = [{i: nearest_resize(m, size) for i, m in frame.items()} for frame in seen]
    if protocol.objects == "first":
        if result.first is None:
            result.first = {i for i, m in masks[0].items() if m.any()}
        masks = [{i: m for i, m in frame.items() if i in result.first} for frame in masks]
    if protocol.background == "object":
        for frame in masks:
            frame[BACKGROUND] = ~np.logical_or.reduce([*frame.values(), np.zeros(size, bool)])
    object_ids = sorted({i for frame in masks for i in frame})
    counts = count_overlaps(
        torch.from_numpy(stack_masks(masks, object_ids, size))[None],
        torch.from_numpy(labels)[None],
        ignore_overlaps=protocol.ignore_overlaps,
    )
    result.add(object_ids, counts)
