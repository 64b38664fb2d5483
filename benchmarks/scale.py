"""The stages `shard` and `cache` over N, 10 N and 100 N videos: is a clip's cost flat, and the driver's memory?

Tiny videos (H.264, 16 x 16 pixels, 2 clips of 4 frames) and a tiny teacher, so that what is left is the pipeline's own
work: listing, hashing, tasks, files, the index. Every stage runs in a new driver process, on a Ray of its own that has
started before the clock does. A clip's cost is told in two ways: between the stage's first file and its last one,
and, with the listing before and the publishing behind, by what a whole call takes longer than that over fewer
videos. Peaks are the driver's own; Ray's processes are not in them. A training worker's memory is what a process holds
more after it has opened the clips and targets and read batches of them.

Not measured: remote storage, more than one node, and videos of real size (see `benchmarks.stages`).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from math import isnan, nan
from pathlib import Path
from time import perf_counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.memory import memory_mib
from pipeline import storage
from pipeline.clips.library import artifacts_of
from pipeline.clips.sources.synthetic import SyntheticSettings, write_dataset
from pipeline.clips.stage import shard_split
from pipeline.clips.table import INDEX_FILE, SHARD_FOLDER, ClipSet, VideoEntry
from pipeline.config import Config, resolve_config
from pipeline.evaluate.table import DASH
from pipeline.log import log

SIDE, FRAMES, CLIP_FRAMES = 16, 8, 4
CLIPS = FRAMES // CLIP_FRAMES  # of a video
ORIGINALS = 4  # videos that differ
STEPS = (100, 1000, 2000)  # of a training worker, after which its memory is looked at


@dataclass(frozen=True)
class StageCost:
    """One call of a stage. `steady` are seconds a clip between the first file and the last; memory is in MiB."""

    seconds: float
    steady: float
    peak: float
    bytes: int


@dataclass(frozen=True)
class Point:
    """What was measured with one number of videos."""

    videos: int
    shard: StageCost
    cache: StageCost
    worker_memory: tuple[float, ...]  # MiB after each of STEPS

    @property
    def clips(self) -> int:
        return CLIPS * self.videos


def write_videos(folder: Path, count: int) -> None:
    """`count` names of a few real videos."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        write_dataset(SyntheticSettings(ORIGINALS, frames=FRAMES, size=SIDE), scratch)
        originals = sorted(Path(scratch).glob("*.mp4"))
        for index in range(count):
            # Links cost no disk; a file's hash is read for each name all the same.
            os.link(originals[index % ORIGINALS], folder / f"video-{index:07d}.mp4")


def write_teacher(folder: Path) -> None:
    from pipeline.models import BackboneConfig, SlotModel, SlotModelConfig, save_slot_model

    vit = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    model = SlotModelConfig(
        BackboneConfig(None, SIDE, vit), num_slots=4, slot_size=16, decoder_hidden_sizes=(32,)
    )
    save_slot_model(SlotModel(model), folder)


def make_config(scratch: Path) -> Config:
    return resolve_config(
        {
            "dataset": {"path": str(scratch / "videos")},
            "clips": {"clip_frames": CLIP_FRAMES},
            "teacher": {"checkpoint": str(scratch / "teacher")},
            "storage": {"root": str(scratch / "root")},
        }
    )


# --- what runs in processes of their own --------------------------------------------------------------


def drive(stage: str, scratch: Path, clips_uri: str = "") -> dict[str, Any]:
    """Runs a stage over the videos in `scratch`; this process is the driver."""
    from pipeline.compute import ray_session
    from pipeline.targets.stage import cache

    config = make_config(scratch)
    with ray_session(config):
        start = perf_counter()
        made = shard_split(config, "") if stage == "shard" else cache(config, artifacts_of(config, clips_uri))
        seconds = perf_counter() - start
    uri = made["uri"]
    cost = StageCost(seconds, _steady(uri, clips_uri or uri), memory_mib("VmHWM"), _bytes(uri))
    return {"uri": uri, "cost": asdict(cost)}


def _steady(uri: str, clips_uri: str) -> float:
    """Seconds a clip from the first file of a stage to its last one; nan where there is one file."""
    clips = {shard.name: shard.rows for shard in ClipSet(clips_uri).manifest.shards}
    folder = Path(uri) / SHARD_FOLDER
    written = sorted((folder.joinpath(name).stat().st_mtime, name) for name in clips)
    later = sum(clips[name] for _, name in written[1:])
    return (written[-1][0] - written[0][0]) / later if later else float("nan")


def _bytes(folder: str) -> int:
    return sum(file.size for file in storage.list_files(folder))


def read_batches(clips_uri: str, targets_uri: str) -> dict[str, Any]:
    """Reads batches as a training worker does; how much more memory it holds after each of STEPS, in MiB."""
    from pipeline.config import Targets
    from pipeline.distill.data import Loader, Sampler

    # One batch of one video first, which loads all libraries.
    first = ClipSet(clips_uri).videos[:1]
    sampler = Sampler(first, seed=0, batch_size=1, views=1)
    options: dict[str, Any] = {"recipe": Targets(), "dataset_seed": 0, "pixels": True}
    with Loader(clips_uri, targets_uri, sampler, stop=1, **options) as loader:
        list(loader)
    before = _settled()
    sampler = Sampler(ClipSet(clips_uri).videos, seed=0, batch_size=4, views=1)
    with Loader(clips_uri, targets_uri, sampler, stop=STEPS[-1], **options) as loader:
        memory = [_settled() - before for step, _ in enumerate(loader, 1) if step in STEPS]
    return {"memory": memory}


def open_index(clips_uri: str) -> dict[str, Any]:
    """Seconds and MiB of a clip set's index; MiB at the peak and afterwards."""
    before = _settled()
    start = perf_counter()
    videos = ClipSet(clips_uri).videos
    seconds = perf_counter() - start
    held = _settled() - before
    return {"videos": len(videos), "seconds": seconds, "held": held, "peak": memory_mib("VmHWM") - before}


def _settled() -> float:
    gc.collect()
    pa.default_memory_pool().release_unused()
    return memory_mib("VmRSS")


def _in_new_process(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.scale", "--in-process", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# --- what is shown -----------------------------------------------------------------------------------


def measure(videos: int, scratch: Path) -> Point:
    write_videos(scratch / "videos", videos)
    write_teacher(scratch / "teacher")
    sharded = _in_new_process("shard", str(scratch))
    clips_uri = sharded["uri"]
    cached = _in_new_process("cache", str(scratch), clips_uri)
    found = ClipSet(clips_uri).manifest
    assert (found.videos, found.clips) == (videos, CLIPS * videos)
    worker = _in_new_process("worker", clips_uri, cached["uri"])
    return Point(videos, StageCost(**sharded["cost"]), StageCost(**cached["cost"]), tuple(worker["memory"]))


def measure_index(videos: int, scratch: Path) -> dict[str, Any]:
    """What a worker needs for an index of so many videos, ids as long as a UUID."""
    entries = [
        VideoEntry(f"{i:036d}", f"shard-{i // 16:05d}.parquet", i % 16, 1, 1, 24, 336, 336, False)
        for i in range(videos)
    ]
    table = pa.Table.from_pylist([asdict(entry) for entry in entries])
    with storage.atomic_write(str(scratch / INDEX_FILE)) as file:
        pq.write_table(table, file)
    manifest = {
        "kind": "clips",
        "fingerprint": "benchmark",
        "settings": {"clip_frames": CLIP_FRAMES},
        "shards": [],
    }
    storage.publish(str(scratch), manifest)
    return _in_new_process("index", str(scratch))


def measure_scale(
    videos: int = 100, factors: tuple[int, ...] = (1, 10, 100), index: int = 10**6
) -> tuple[list[Point], dict[str, Any]]:
    """A point for each factor, and an index of `index` videos."""
    points = []
    for factor in factors:
        with tempfile.TemporaryDirectory() as scratch:
            points.append(measure(factor * videos, Path(scratch)))
        log(f"scale: {points[-1]}")
    with tempfile.TemporaryDirectory() as scratch:
        return points, measure_index(index, Path(scratch))


def scale_report(points: list[Point], index: dict[str, Any]) -> str:
    """The Markdown table, and a line on the index."""
    share = 2**20 / index["videos"]
    line = (
        f"an index of {index['videos']:,} videos: read in {index['seconds']:.1f} s, {index['held']:.0f} MiB held "
        f"({index['held'] * share:.0f} bytes a video), {index['peak']:.0f} MiB at the peak"
    )
    return "\n".join([*scale_table(points), "", f"- {line}"])


def scale_table(points: list[Point]) -> list[str]:
    """A column for each number of videos; a ratio to the first one behind what should be flat."""
    lines = [
        "| " + " | ".join(["", *(f"{p.videos:,} videos, {p.clips:,} clips" for p in points)]) + " |",
        "| --- |" + " ---: |" * len(points),
    ]

    def row(name: str, values: list[float], digits: str, *, ratio: bool = True) -> None:
        first = next((value for value in values if not isnan(value)), nan)
        cells = [DASH if isnan(value) else f"{value:{digits}}" for value in values]
        for i, value in enumerate(values):
            if ratio and not isnan(value) and value is not first:
                cells[i] += f" ({value / first:.2f}×)"
        lines.append("| " + " | ".join([name, *cells]) + " |")

    for name in ("shard", "cache"):
        costs: list[StageCost] = [getattr(point, name) for point in points]
        more = [nan]
        for i in range(1, len(points)):
            seconds = costs[i].seconds - costs[i - 1].seconds
            more.append(seconds / (points[i].clips - points[i - 1].clips))
        row(f"`{name}`, whole call, s", [c.seconds for c in costs], ".1f", ratio=False)
        row(f"`{name}`, ms a clip, first file to last", [1000 * c.steady for c in costs], ".2f")
        row(f"`{name}`, ms a further clip, whole calls", [1000 * value for value in more], ".2f")
        row(
            f"`{name}`, bytes a clip", [c.bytes / p.clips for c, p in zip(costs, points, strict=True)], ",.0f"
        )
        row(f"`{name}`, driver's peak, MiB", [c.peak for c in costs], ".0f")
    for i, steps in enumerate(STEPS):
        name = f"training worker, MiB for the data of {steps:,} steps"
        row(name, [p.worker_memory[i] for p in points], ".1f", ratio=False)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--videos", type=int, default=100, help="N")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--index", type=int, default=10**6, help="videos of the index that is opened")
    parser.add_argument("--in-process", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_process is None:
        found = measure_scale(arguments.videos, tuple(arguments.factors), arguments.index)
        print(scale_report(*found))
        return
    what, *places = arguments.in_process
    if what == "worker":
        result = read_batches(*places)
    elif what == "index":
        result = open_index(*places)
    else:
        scratch, *clips = places
        result = drive(what, Path(scratch), *clips)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
