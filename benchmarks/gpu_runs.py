"""Parts of `benchmarks.gpu` that run the trainer and the maker of targets on files, of made-up videos."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.gpu_steps import Finding, Scale
from benchmarks.step import FRAMES
from pipeline import storage
from pipeline.artifacts.manifests import ClipManifest, ShardEntry, TargetManifest
from pipeline.clips.schema import clip_schema, encode_frame
from pipeline.clips.table import INDEX_FILE, SHARD_FOLDER, ClipSet, VideoEntry
from pipeline.compute import best_device
from pipeline.config import Config, resolve_config
from pipeline.distill.run import Run
from pipeline.distill.trainer import Hooks, NoLogger, Trainer
from pipeline.models import BackboneConfig, load_slot_model, save_slot_model
from pipeline.targets.maker import TargetMaker

METHODS = (
    "slotmatch",
    "slotmatch_mse",
    "slotmatch_hungarian",
    "slotmatch_reconstruction_kd",
    "feature_kd",
    "no_kd",
)


class _Kept(NoLogger):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.rows.append({**values, "step": step})


class _Work:
    """Clips, a teacher of random weights and its targets in a folder."""

    def __init__(self, scale: Scale, root: Path, *, videos: int, side: int, frames: int = 8) -> None:
        self.scale, self.root = scale, root
        self.clips = _write_clips(str(root / "clips"), videos, frames, side)
        torch.manual_seed(0)
        save_slot_model(scale.sizes.model(scale.sizes.teacher), self.teacher)

    def config(self, **training: Any) -> Config:
        sizes = self.scale.sizes
        common = {
            "steps": 12,
            "batch_size": self.scale.batch,
            "log_every": 4,
            "checkpoint_every": 6,
            "workers": 0,
        }
        return resolve_config(
            {
                "storage": {"root": str(self.root)},
                "teacher": {
                    "checkpoint": self.teacher,
                    "num_slots": sizes.num_slots,
                    "slot_size": sizes.slot_size,
                },
                "student": {**_section(sizes.student), "decoder_hidden_sizes": list(sizes.hidden_sizes)},
                "targets": {"views": 1, "teacher_features": True},
                "distill": {**common, "warmup_steps": 2, **training},
            }
        )

    def run(self, name: str, *, targets: bool = True, **training: Any) -> Run:
        config, uri = self.config(**training), str(self.root / "targets")
        if targets and not storage.is_complete(uri):
            self._make_targets(config, uri)
        return Run.student(
            config,
            str(self.root / name),
            self.clips.uri,
            targets_uri=uri if targets else None,
            teacher_uri=self.teacher if targets else None,
            teacher_config=load_slot_model(self.teacher).config if targets else None,
        )

    @property
    def teacher(self) -> str:
        return str(self.root / "teacher")

    def _make_targets(self, config: Config, uri: str) -> None:
        maker = TargetMaker(config, self.clips.uri, self.teacher)
        for shard in self.clips.shards:
            maker.write_shard(shard, storage.join(uri, SHARD_FOLDER))
        TargetManifest(
            fingerprint=storage.name(uri),
            clips=self.clips.fingerprint,
            clips_uri=self.clips.uri,
            teacher_uri=self.teacher,
            teacher_config=maker.teacher.config.to_dict(),
            views=config.targets.model_dump(include={"views", "crop", "min_scale", "flip"}),
            teacher_features=config.targets.feature_dtype,
            shards=tuple(self.clips.shards),
            rows=self.clips.manifest.clips,
        ).publish(uri)


def _write_clips(uri: str, videos: int, frames: int, side: int) -> ClipSet:
    """Publishes a clip set of blurred noise, JPEG as by default, in shards of eight videos, without masks."""
    rng, entries, shards = np.random.default_rng(0), [], []
    of_video = frames // FRAMES
    for first in range(0, videos, 8):
        name = f"shard-{first // 8:05d}.parquet"
        rows: list[dict[str, Any]] = []
        for number in range(first, min(first + 8, videos)):
            entries.append(
                VideoEntry(
                    f"v{number}", name, len(rows), of_video, of_video, frames, side, side, annotated=False
                )
            )
            for index in range(of_video):
                pictures = [_picture(rng, side) for _ in range(FRAMES)]
                start = float(index * FRAMES)
                rows.append(
                    {
                        "video_id": f"v{number}",
                        "clip_index": index,
                        "start_frame": index * FRAMES,
                        "full": True,
                        "height": side,
                        "width": side,
                        "timestamps": [start + t for t in range(FRAMES)],
                        "frames": [encode_frame(picture, "jpeg", 95) for picture in pictures],
                        "masks": None,
                    }
                )
        _write_rows(storage.join(uri, SHARD_FOLDER, name), pa.Table.from_pylist(rows, clip_schema("jpeg")))
        shards.append(ShardEntry(name=name, rows=len(rows), bytes=0))
    _write_rows(storage.join(uri, INDEX_FILE), pa.Table.from_pylist([asdict(entry) for entry in entries]))
    ClipManifest(
        fingerprint=storage.name(uri),
        settings={"clip_frames": FRAMES},
        videos=videos,
        clips=videos * of_video,
        shards=tuple(shards),
    ).publish(uri)
    return ClipSet(uri)


def _picture(rng: np.random.Generator, side: int) -> np.ndarray:
    coarse = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))


def _write_rows(uri: str, rows: pa.Table) -> None:
    with storage.atomic_write(uri) as file:
        pq.write_table(rows, file, row_group_size=2)


def _section(backbone: BackboneConfig) -> dict[str, Any]:
    return {
        "backbone": backbone.name or backbone.arguments,
        "backbone_weights": "random",
        "image_size": backbone.image_size,
    }


def equality(scale: Scale, scratch: Path) -> list[Finding]:
    """Losses of short runs of every method in fp32, on the CPU and on this device; and that bf16 runs."""
    tiny = Scale.tiny()
    work, device = _Work(tiny, scratch, videos=4, side=56), best_device()
    found: list[Finding] = []
    for method in METHODS:
        curves: list[torch.Tensor] = []
        for where in (torch.device("cpu"), device):
            settings: dict[str, Any] = {"method": method, "precision": "fp32", "log_every": 1, "steps": 6}
            run = work.run(f"{method}-{len(curves)}", targets=method != "no_kd", **settings)
            curves.append(torch.tensor([row["total"] for row in Trainer(run, device=where).train().history]))
        off = ((curves[1] - curves[0]).abs() / curves[0].abs()).max().item()
        found.append(Finding(f"{method}, fp32: losses off by", off, "≤ 1e-4", off <= 1e-4))
        run = work.run(f"{method}-bf16", targets=method != "no_kd", method=method, precision="bf16")
        status = Trainer(run, device=device).train().status
        found.append(Finding(f"{method}, bf16", status, "ok", status == "ok"))
    return found


def loading(scale: Scale, scratch: Path) -> list[Finding]:
    """The trainer on files: steps a second and the share of time that it waits for data, in two epochs."""
    videos, side, steps = (4, 56, 4) if scale.is_tiny else (8 * scale.batch, 256, 64)
    work = _Work(scale, scratch, videos=videos, side=side)
    found: list[Finding] = []
    for threads in (2,) if scale.is_tiny else (2, 8, 16):
        logger = _Kept()
        settings: dict[str, Any] = {
            "loader_threads": threads,
            "steps": steps,
            "log_every": steps // 4,
            "checkpoint_every": 10**6,
        }
        Trainer(work.run(f"threads-{threads}", **settings), device=best_device(), logger=logger).train()
        for row in logger.rows[1:]:
            rate = row["frames_per_second"] / (scale.batch * work.clips.clip_frames)
            found.append(Finding(f"{threads} threads, to step {row['step']}: steps/s", rate))
            share = row["data_wait_share"]
            found.append(
                Finding(
                    f"{threads} threads, to step {row['step']}: waiting for data",
                    share,
                    "≤ 0.05",
                    share <= 0.05,
                )
            )
    return found


class _Stopped(Exception):
    pass


def resuming(scale: Scale, scratch: Path) -> list[Finding]:
    """A run that was stopped in its middle has the unbroken curve, on the GPU, and nearly so on the CPU."""
    work, device = _Work(Scale.tiny(), scratch, videos=4, side=56), best_device()
    found: list[Finding] = []

    def stop(step: int) -> None:
        if step == 6:
            raise _Stopped

    def run(name: str) -> Run:
        return work.run(name, log_every=1, precision="fp32")

    unbroken = Trainer(run("unbroken"), device=device).train().history
    for where, tolerance in ((device, 1e-6), (torch.device("cpu"), 1e-3)):
        one = run(f"stopped-{len(found)}")
        try:
            Trainer(one, device=device, hooks=Hooks(after_checkpoint=stop)).train()
        except _Stopped:
            history = Trainer(one, device=where).train().history
        off = max(abs(a["total"] / b["total"] - 1) for a, b in zip(history, unbroken, strict=True))
        found.append(
            Finding(f"resumed on {where.type}: losses off by", off, f"≤ {tolerance:g}", off <= tolerance)
        )
    return found


def targets(scale: Scale, scratch: Path) -> list[Finding]:
    """Rows a second of the teacher over a clip set, in fp32, and the worst deviation where all are computed again."""
    work = _Work(scale, scratch, videos=4 if scale.is_tiny else 128, side=scale.sizes.teacher.image_size)
    run = work.run("unused")  # makes and publishes them once, as a warm-up
    assert run.targets_uri is not None
    maker, shards = (
        TargetMaker(run.config, work.clips.uri, work.teacher),
        ClipSet(work.clips.uri).shards,
    )
    began = time.monotonic()
    for shard in shards:
        maker.write_shard(shard, str(work.root / "again"))
    rate = sum(video.clips for video in work.clips.videos) / (time.monotonic() - began)
    checked = [maker.verify_shard(shard, run.targets_uri, 1.0) for shard in shards]
    worst = max(one["worst"] for one in checked)
    return [
        Finding("rows/s", rate, "≥ 60", rate >= 60),
        Finding("rows that were verified", sum(one["checked"] for one in checked)),
        Finding("worst deviation", worst, "≤ 1e-3", worst <= 1e-3),
    ]
