"""Stage `evaluate`: FG-ARI and mBO at image and video level over a clip set with masks, on Ray Data.

Whole videos run through the model from their first frame, central square crop, masks at the crop's own
resolution. A score always comes with its protocol: which clips, how many videos, which flags.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from pipeline import storage
from pipeline.baselines import BASELINES
from pipeline.builders import best_device, load_model, model_hash
from pipeline.clips.schema import stack_masks
from pipeline.clips.table import ClipSet, VideoEntry
from pipeline.clips.views import apply_view, central_square, stable_hash
from pipeline.config import Config
from pipeline.metrics import OverlapCounts, ari_per_sample, best_overlap_per_sample, count_overlaps
from pipeline.models import SlotModel
from pipeline.progress import Progress, log
from pipeline.ray_session import actor_options, ray_session

SCORES = ("image_fg_ari", "image_mbo", "video_fg_ari", "video_mbo")
FORMAT = 1


@dataclass(frozen=True)
class VideoScore:
    """One video's scores; `image_frames` frames have an object. NaN where none has."""

    video_id: str
    image_frames: int
    image_fg_ari: float
    image_mbo: float
    video_fg_ari: float
    video_mbo: float
    slots_in_use: float


def score_video(counts: OverlapCounts, video_id: str) -> VideoScore:
    """Scores from the counts of a video's frames."""
    video = counts.to_video(len(counts.shared))
    values = {}
    for name, per_sample in (("fg_ari", ari_per_sample), ("mbo", best_overlap_per_sample)):
        for level, table in (("image", counts), ("video", video)):
            scores, valid = per_sample(table)
            values[f"{level}_{name}"] = float(scores[valid].mean()) if bool(valid.any()) else float("nan")
    frames = int((counts.true_area.sum(1) > 0).sum())
    # A slot that owns less than a hundredth of the video says nothing.
    share = video.slot_area[0] / video.slot_area.sum().clamp(min=1)
    return VideoScore(video_id, frames, slots_in_use=float((share > 0.01).sum()), **values)


def mean_scores(scores: list[VideoScore]) -> dict[str, float]:
    """The data set's scores: image level over all frames, video level over all videos with objects."""
    valid = [s for s in scores if s.image_frames]
    if not valid:
        raise ValueError("not one video has an annotated object")
    frames = np.array([s.image_frames for s in valid])
    result = {}
    for name in SCORES:
        values = np.array([getattr(s, name) for s in valid])
        weights = frames if name.startswith("image") else np.ones_like(frames)
        result[name] = float((values * weights).sum() / weights.sum())
    result["slots_in_use"] = float(np.mean([s.slots_in_use for s in valid]))
    return result


def video_counts(
    clips: ClipSet,
    video: VideoEntry,
    predict: Callable[[Iterator[np.ndarray]], Iterator[tuple[np.ndarray, np.ndarray]]],
    *,
    ignore_overlaps: bool = False,
) -> OverlapCounts:
    """Counts of a video's frames, streamed clip by clip: its length does not matter for memory.

    `predict` takes chunks of frames `(t, h, w, 3)` and yields `(frames, labels (t, h, w))` for each.
    """
    crop = central_square(video.height, video.width)
    box = (slice(crop.top, crop.top + crop.height), slice(crop.left, crop.left + crop.width))
    annotations: list[list[dict[int, np.ndarray]]] = []

    def chunks() -> Iterator[np.ndarray]:
        for clip in clips.iter_video(video, masks=True):
            assert clip.masks is not None
            annotations.append([{i: m[box] for i, m in frame.items()} for frame in clip.masks])
            yield apply_view(clip.frames, crop)

    pieces: list[tuple[list[int], OverlapCounts]] = []
    for _, labels in predict(chunks()):
        masks = annotations.pop(0)
        object_ids = sorted({i for frame in masks for i in frame})
        true_masks = stack_masks(masks, object_ids, labels.shape[1:])
        counts = count_overlaps(
            torch.from_numpy(true_masks)[None],
            torch.from_numpy(labels)[None],
            ignore_overlaps=ignore_overlaps,
        )
        pieces.append((object_ids, counts))
    return _merge(pieces)


def _merge(pieces: list[tuple[list[int], OverlapCounts]]) -> OverlapCounts:
    """Counts of consecutive chunks, each with its own objects and slots, as those of one video."""
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


def model_predictor(
    model: SlotModel, video: VideoEntry
) -> Callable[..., Iterator[tuple[np.ndarray, np.ndarray]]]:
    """Labels of a slot model, slots carried through the video."""

    def predict(chunks: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for frames, _, masks in model.stream(chunks, noise_seed=stable_hash("evaluate", video.video_id)):
            yield frames, model.label_maps(masks, frames.shape[1:3]).cpu().numpy()

    return predict


@dataclass(frozen=True)
class Subject:
    """What is scored: a model, or one of the trivial baselines with as many slots."""

    model_uri: str | None = None
    num_heads: int | None = None  # of a public checkpoint's ViT
    baseline: str | None = None
    num_slots: int = 1  # of the baseline

    def identity(self) -> dict[str, Any]:
        model = model_hash(self.model_uri) if self.model_uri else None
        return {"model": model, "heads": self.num_heads, "baseline": self.baseline, "slots": self.num_slots}


class _ScoreActor:
    """A Ray Data actor that scores a shard's videos with one of the subjects, whose models it keeps."""

    def __init__(self, clips_uri: str, subjects: list[Subject], ignore_overlaps: bool) -> None:
        self.clips = ClipSet(clips_uri)
        self.subjects = subjects
        self.ignore_overlaps = ignore_overlaps
        self.device = best_device()
        self.models: dict[int, SlotModel] = {}

    def _predictor(self, index: int, video: VideoEntry) -> Any:
        subject = self.subjects[index]
        if subject.baseline is not None:
            return BASELINES[subject.baseline](subject.num_slots)
        if index not in self.models:
            assert subject.model_uri is not None
            model = load_model(subject.model_uri, num_heads=subject.num_heads)
            self.models[index] = model.to(self.device)
        return model_predictor(self.models[index], video)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        scores = []
        for video in self.clips.videos:
            if video.shard == row["shard"] and video.annotated:
                predict = self._predictor(row["subject"], video)
                counts = video_counts(self.clips, video, predict, ignore_overlaps=self.ignore_overlaps)
                scores.append(asdict(score_video(counts, video.video_id)))
        return {"subject": row["subject"], "scores": json.dumps(scores)}


def protocol(config: Config, clips: ClipSet) -> dict[str, Any]:
    """What makes two scores comparable; `fingerprint` is equal where all of it is."""
    content = {
        "format": FORMAT,
        "clips": clips.fingerprint,
        "videos": clips.manifest["annotated_videos"],
        "frames": "whole videos, central square crop, forward roll-out",
        "ignore_overlaps": config.evaluate.ignore_overlaps,
    }
    return {**content, "fingerprint": storage.fingerprint(content)}


def evaluate(config: Config, clips_uri: str, subjects: dict[str, Subject]) -> dict[str, dict[str, Any]]:
    """Scores models and baselines on a clip set, all in one pass.

    Returns for each name `scores`, `protocol`, the number of `videos`, `per_video` rows, and `uri`, where
    all this is. The same model on the same clips is found and reused.

    Raises:
        ValueError: no video of the clip set has masks.
    """
    clips = ClipSet(clips_uri)
    if not clips.manifest["annotated_videos"]:
        raise ValueError(
            f"{clips_uri} has no masks to score against (dataset.masks = {config.dataset.masks!r})"
        )
    rules = protocol(config, clips)
    folder = storage.join(storage.absolute(config.storage.root), "evaluations")
    uris = {
        name: storage.join(folder, f"{storage.fingerprint({**rules, **subject.identity()})}.json")
        for name, subject in subjects.items()
    }
    missing = [name for name in subjects if not storage.exists(uris[name])]
    if not missing:
        log("evaluate: all scores found, reusing them")
    found: dict[str, list[VideoScore]] = {name: [] for name in missing}
    with (
        Progress("evaluate", len(missing) * rules["videos"], "videos")
        if missing
        else nullcontext() as progress
    ):
        for row in _run(config, clips, [subjects[name] for name in missing]):
            scores = [VideoScore(**s) for s in json.loads(row["scores"])]
            found[missing[row["subject"]]] += scores
            if progress is not None:
                progress.advance(len(scores))
    for name, video_scores in found.items():
        video_scores.sort(key=lambda s: s.video_id)
        means = mean_scores(video_scores)
        if subjects[name].model_uri and means["slots_in_use"] < 2:
            used = means["slots_in_use"]
            log(f"evaluate: WARNING, {name} uses {used:.1f} slots on average: its slots have collapsed")
        result = {
            "uri": uris[name],
            "scores": means,
            "protocol": rules,
            "videos": len(video_scores),
            "per_video": [asdict(s) for s in video_scores],
        }
        storage.write_json(uris[name], result)
    return {name: storage.read_json(uri) for name, uri in uris.items()}


def _run(config: Config, clips: ClipSet, subjects: list[Subject]) -> Iterator[dict[str, Any]]:
    if not subjects:
        return
    rows = [{"subject": i, "shard": shard} for i in range(len(subjects)) for shard in clips.shards]
    with ray_session(config):
        import ray

        options = actor_options(config.ray.teacher_cpus, len(rows))
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        yield from dataset.map(
            _ScoreActor,  # type: ignore[arg-type]
            fn_constructor_args=(clips.uri, subjects, config.evaluate.ignore_overlaps),
            **options,
        ).iter_rows()


def score_table(rows: list[tuple[str, dict[str, float]]]) -> str:
    """Scores in percent as text, one row a method."""
    width = max(len(name) for name, _ in rows)
    titles = ("image FG-ARI", "image mBO", "video FG-ARI", "video mBO", "slots in use")
    lines = [" " * width + "".join(f"{title:>14}" for title in titles)]
    for name, scores in rows:
        cells = [f"{round(100 * scores[key], 1) + 0.0:14.1f}" for key in SCORES] + [
            f"{scores['slots_in_use']:14.1f}"
        ]
        lines.append(name.ljust(width) + "".join(cells))
    return "\n".join(lines)
