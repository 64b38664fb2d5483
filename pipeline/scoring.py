"""FG-ARI and mBO of one video under a protocol, streamed. What `evaluate` and validation have in common; no Ray.

Frames go through the model clip by clip and only pixel counts are kept, so memory does not grow with the
video's length (but for the cyclic roll-out, which needs the whole of a sample).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.baselines import Predictor
from pipeline.clips.schema import stack_masks
from pipeline.clips.table import Clip, ClipSet, VideoEntry
from pipeline.clips.views import apply_view, nearest_resize, stable_hash
from pipeline.metrics import (
    OverlapCounts,
    ari_per_sample,
    best_overlap_per_sample,
    count_label_overlaps,
    count_overlaps,
)
from pipeline.models import SlotModel
from pipeline.protocols import Protocol

SCORES = ("image_fg_ari", "image_mbo", "video_fg_ari", "video_mbo")
BACKGROUND = -1  # an object id that no data set uses


@dataclass(frozen=True)
class VideoScore:
    """One video's scores, NaN where nothing was scored.

    `image_samples` frames and `video_samples` clips (1, or 0, for a whole video) have an object; the scores
    are means over them.
    """

    video_id: str
    image_samples: int
    video_samples: int
    image_fg_ari: float
    image_mbo: float
    video_fg_ari: float
    video_mbo: float
    slots_in_use: float


def mean_scores(scores: list[VideoScore]) -> dict[str, float]:
    """The data set's scores: image level over all frames, video level over all clips or videos.

    Raises:
        ValueError: no object in any of them.
    """
    valid = [s for s in scores if s.image_samples]
    if not valid:
        raise ValueError("not one video has an annotated object (in the part that the protocol looks at)")
    result = {}
    for name in SCORES:
        values = np.array([getattr(s, name) for s in valid])
        weights = np.array([getattr(s, f"{name.split('_')[0]}_samples") for s in valid])
        result[name] = float((values * weights).sum() / weights.sum())
    result["slots_in_use"] = float(np.mean([s.slots_in_use for s in valid]))
    return result


def model_predictor(model: SlotModel, video_id: str, protocol: Protocol) -> Predictor:
    """Labels of a slot model, slots carried from chunk to chunk."""

    def predict(chunks: Iterator[np.ndarray], size: tuple[int, int]) -> Iterator[np.ndarray]:
        seed = stable_hash("evaluate", video_id)
        for _, _, masks in model.stream(
            chunks, noise_seed=seed, rollout=protocol.rollout, masks=protocol.masks
        ):
            yield model.label_maps(masks, size).cpu().numpy()

    return predict


def score_video(clips: ClipSet, video: VideoEntry, predict: Predictor, protocol: Protocol) -> VideoScore:
    """Scores of one annotated video; one pass makes all four."""
    samples = [
        _count_sample(sample, video, predict, protocol)
        for sample in _samples(clips.iter_video(video, masks=True), protocol.clip_frames)
    ]
    return summarise(video.video_id, samples)


def summarise(video_id: str, samples: list[OverlapCounts]) -> VideoScore:
    """Scores from the counts of a video's samples (clips, or one for the whole of it), frame by frame."""
    values: dict[str, float] = {}
    counts = {"image": 0, "video": 0}
    videos = [sample.to_video(len(sample.shared)) for sample in samples]
    for level, tables in (("image", samples), ("video", videos)):
        for name, per_sample in (("fg_ari", ari_per_sample), ("mbo", best_overlap_per_sample)):
            pairs = [per_sample(table) for table in tables]
            scores = [float(s) for scores, valid in pairs for s in scores[valid]]
            counts[level] = len(scores)
            values[f"{level}_{name}"] = float(np.mean(scores)) if scores else float("nan")
    # A slot that owns less than a hundredth of a sample says nothing.
    shares = [v.slot_area[0] / v.slot_area.sum().clamp(min=1) for v in videos]
    used = float(np.mean([float((share > 0.01).sum()) for share in shares])) if shares else float("nan")
    return VideoScore(video_id, counts["image"], counts["video"], slots_in_use=used, **values)


def _samples(clips: Iterator[Clip], frames: int) -> Iterator[Iterator[Clip]]:
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


def _count_sample(
    sample: Iterator[Clip], video: VideoEntry, predict: Predictor, protocol: Protocol
) -> OverlapCounts:
    """Counts of each frame of a sample, over all objects and slots that occur in it."""
    view = protocol.view(video.height, video.width)
    size = protocol.label_size(view)
    box = (slice(view.top, view.top + view.height), slice(view.left, view.left + view.width))
    annotations: list[list[dict[int, np.ndarray]]] = []

    def chunks() -> Iterator[np.ndarray]:
        for clip in sample:
            assert clip.masks is not None
            annotations.append(clip.masks)
            yield apply_view(clip.frames, view)

    pieces: list[tuple[list[int], OverlapCounts]] = []
    for labels in predict(chunks(), size):
        masks = [{i: nearest_resize(m[box], size) for i, m in frame.items()} for frame in annotations.pop(0)]
        if protocol.background == "object":
            for frame in masks:
                frame[BACKGROUND] = ~np.logical_or.reduce([*frame.values(), np.zeros(size, bool)])
        object_ids = sorted({i for frame in masks for i in frame})
        pieces.append((object_ids, _count(masks, object_ids, labels, protocol.ignore_overlaps)))
    return _merge(pieces)


def _count(
    masks: list[dict[int, np.ndarray]], object_ids: list[int], labels: np.ndarray, ignore_overlaps: bool
) -> OverlapCounts:
    """Counts of a chunk's frames; by label maps where no objects overlap, which is faster."""
    size = labels.shape[1:]
    predicted = torch.from_numpy(labels)[None]
    maps = np.zeros(labels.shape, np.int32)
    for frame, label_map in zip(masks, maps, strict=True):
        for object_id, mask in frame.items():
            label_map[mask] = object_ids.index(object_id) + 1
        if sum(np.count_nonzero(mask) for mask in frame.values()) != np.count_nonzero(label_map):
            true_masks = torch.from_numpy(stack_masks(masks, object_ids, size))[None]
            return count_overlaps(true_masks, predicted, ignore_overlaps=ignore_overlaps)
    return count_label_overlaps(torch.from_numpy(maps)[None], predicted, len(object_ids))


def _merge(pieces: list[tuple[list[int], OverlapCounts]]) -> OverlapCounts:
    """Counts of consecutive chunks, each with its own objects and slots, as those of one sample."""
    all_ids = sorted({i for ids, _ in pieces for i in ids})
    num_slots = max(c.slot_area.shape[1] for _, c in pieces)
    parts = []
    for ids, counts in pieces:
        frames, _, used = counts.shared.shape
        shared = torch.zeros(frames, len(all_ids), num_slots, dtype=torch.long)
        true_area = torch.zeros(frames, len(all_ids), dtype=torch.long)
        slot_area = torch.zeros(frames, num_slots, dtype=torch.long)
        columns = [all_ids.index(i) for i in ids]
        shared[:, columns, :used] = counts.shared
        true_area[:, columns] = counts.true_area
        slot_area[:, :used] = counts.slot_area
        parts.append((shared, true_area, slot_area))
    return OverlapCounts(*(torch.cat(group) for group in zip(*parts, strict=True)))
