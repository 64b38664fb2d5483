"""What feeds a training step at MOVi-E's sizes, and the step that it feeds beside one on a batch in memory.

Measured: the loader alone in one thread, which decodes each time or copies from the map of decoded frames; and the
trainer's own loader, batch and step, on random weights, batch 1 of 4 frames (16 on a GPU), from its second step on.
All files are in the operating system's memory. Not measured: remote storage, a disk that must be read, the first
epoch, which fills the map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.report import Comparison, Row, interleaved
from benchmarks.step import FRAMES, Sizes, paper_sizes, tiny_sizes
from pipeline.clips.library import artifacts_of
from pipeline.clips.stage import shard_split
from pipeline.clips.table import ClipSet
from pipeline.config import Config, Targets, resolve_config
from pipeline.distill.data import Loader, RawBatch, Sampler
from pipeline.distill.frame_map import open_frame_map
from pipeline.distill.run import Run
from pipeline.distill.trainer import Trainer
from pipeline.models import save_slot_model
from pipeline.targets.stage import cache
from pipeline.targets.table import TargetSet


@dataclass(frozen=True)
class Feeding:
    """How much is read in a repeat."""

    sizes: Sizes = field(default_factory=lambda: paper_sizes()[0])
    videos: int = 16  # generated, of two clips each
    batches: int = 8  # of the loader alone, of a clip of each video
    steps: int = 4


def tiny_feeding() -> Feeding:
    """For the smoke test."""
    return Feeding(tiny_sizes(), videos=4, batches=2, steps=2)


def loader_comparisons(load: Feeding, repeats: int, scratch: Path) -> list[Comparison]:
    """The loader alone; the step fed with cached features in fp16; the step fed with frames from the map."""
    torch.manual_seed(0)
    save_slot_model(load.sizes.model(load.sizes.student), scratch / "fed-by")
    with_features, without = (_config(load, repeats, scratch, features=f) for f in (True, False))
    clips = ClipSet(shard_split(with_features, "")["uri"])
    return [
        _loader_alone(without, clips, load, repeats),
        _fed_step("cached features, fp16", with_features, load, repeats),
        _fed_step("frames from the map", without, load, repeats),
    ]


def _config(load: Feeding, repeats: int, scratch: Path, *, features: bool) -> Config:
    backbone = load.sizes.student
    synthetic = {"videos": load.videos, "frames": 2 * FRAMES, "size": backbone.image_size}
    student = {"backbone": backbone.name or backbone.arguments, "image_size": backbone.image_size}
    hidden = list(load.sizes.hidden_sizes)
    # A call of the step for each repeat and one before; the loader reads a few more ahead.
    training = {"steps": (repeats + 1) * load.steps, "warmup_steps": 1, "workers": 0}
    batch_size = 16 if torch.cuda.is_available() else 1
    values: dict[str, Any] = {
        "dataset": {"kind": "synthetic", "synthetic": synthetic},
        "clips": {"clip_frames": FRAMES},
        "teacher": {"checkpoint": str(scratch / "fed-by")},
        "student": {**student, "backbone_weights": "random", "decoder_hidden_sizes": hidden},
        "targets": {"student_features": features, "feature_dtype": "float16"},
        "distill": {**training, "batch_size": batch_size},
        "storage": {"root": str(scratch / "feeding"), "cache": str(scratch / "frames")},
    }
    return resolve_config(values)


def _loader_alone(config: Config, clips: ClipSet, load: Feeding, repeats: int) -> Comparison:
    """Views as configs/movi_e.yaml has them: the central square, half of them flipped."""
    recipe = Targets(views=4, flip=0.5)
    sampler = Sampler(clips.videos, seed=0, batch_size=load.videos, views=recipe.views)

    def read(*, mapped: bool) -> Callable[[], None]:
        def run() -> None:
            frame_map = open_frame_map(config.storage, clips) if mapped else None
            options: dict[str, Any] = {"recipe": recipe, "dataset_seed": 0, "pixels": True, "threads": 1}
            with Loader(
                clips.uri, None, sampler, stop=load.batches, frame_map=frame_map, **options
            ) as loader:
                for _ in loader:
                    pass

        return run

    ways = {"decoding, 1 thread": read(mapped=False), "from the map, 1 thread": read(mapped=True)}
    ways["from the map, 1 thread"]()  # fills it
    seconds = interleaved(list(ways.values()), repeats)
    work = load.batches * load.videos
    rows = [Row(name, times, work, "clips") for name, times in zip(ways, seconds, strict=True)]
    side = load.sizes.student.image_size
    note = f"{clips.manifest.clips} clips of {FRAMES} frames of {side} × {side} pixels, JPEG 95; half are flipped"
    return Comparison(f"loader alone, {load.sizes.name}", rows, [note])


def _fed_step(fed_with: str, config: Config, load: Feeding, repeats: int) -> Comparison:
    trainer = _trainer(config)
    in_memory = _read_first(trainer)
    with trainer.loader() as loader:
        batches = iter(loader)
        waits: list[float] = []

        def step(raw: RawBatch) -> None:
            trainer.train_step(trainer.objective, trainer.batch(raw), trainer.learning_rates())

        def from_loader() -> None:
            waits.append(0.0)
            for _ in range(load.steps):
                raw, waited = next(batches)
                waits[-1] += waited
                step(raw)
            _finish()

        def from_memory() -> None:
            for _ in range(load.steps):
                step(in_memory)
            _finish()

        from_memory()
        from_loader()
        memory, fed = interleaved([from_memory, from_loader], repeats)
    ratio = median(one / other for one, other in zip(fed, memory, strict=True))
    share = sum(waits[1:]) / sum(fed)
    rows = [
        Row(f"a batch in memory ({fed_with})", memory, load.steps, "steps"),
        Row(f"the loader ({fed_with})", fed, load.steps, "steps"),
    ]
    notes = [
        f"a step from the loader costs {ratio:.3f} of one from a batch in memory, "
        f"{trainer.precision}; data_wait_share {share:.3f}"
    ]
    title = f"fed step, {load.sizes.name}, batch {trainer.run.settings.batch_size}, {trainer.device.type}"
    return Comparison(title, rows, notes)


def _trainer(config: Config) -> Trainer:
    artifacts = artifacts_of(config)
    targets_uri = cache(config, artifacts)["uri"]
    run = Run.student(
        config,
        f"{config.storage.root}/run",
        artifacts.clips.uri,
        targets_uri=targets_uri,
        teacher_uri=artifacts.require_teacher(),
        teacher_config=TargetSet(targets_uri).teacher_config,
    )
    return Trainer(run, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _read_first(trainer: Trainer) -> RawBatch:
    """The first batch, after reading all, which fills the map."""
    with trainer.loader() as loader:
        first, *_ = (raw for raw, _ in loader)
    return first


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
