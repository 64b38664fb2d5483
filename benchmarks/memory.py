"""Peak memory of evaluating a short and a long video, each in a process of its own.

A small model at the paper's YTVIS input size (518 x 518 pixels, 1,369 patches, 7 slots) scores one video,
streamed from Parquet; a video ten times as long must not need more memory.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.clips.schema import clip_schema, encode_frame, encode_masks
from pipeline.clips.table import INDEX_FILE, SHARD_FOLDER, ClipSet, VideoEntry

SHARD = "shard-00000.parquet"
CLIP_FRAMES = 4


def write_video(folder: Path, frames: int, side: int) -> None:
    """A clip set of one video: a noisy square that moves over noise, with its mask."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (side // 8, side // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    noise = np.pad(noise, ((0, side - len(noise)), (0, side - len(noise)), (0, 0)), mode="edge")
    writer = pq.ParquetWriter(_created(folder / SHARD_FOLDER) / SHARD, clip_schema("jpeg"))
    for start in range(0, frames, CLIP_FRAMES):
        pictures, masks = [], []
        for t in range(start, min(start + CLIP_FRAMES, frames)):
            mask = np.zeros((side, side), bool)
            left = t % (side // 2)
            mask[side // 4 : side // 2, left : left + side // 4] = True
            pictures.append(encode_frame(np.where(mask[..., None], 255 - noise, noise), "jpeg", 90))
            masks.append(encode_masks({1: mask}))
        row = {
            "video_id": "video",
            "clip_index": start // CLIP_FRAMES,
            "start_frame": start,
            "full": len(pictures) == CLIP_FRAMES,
            "height": side,
            "width": side,
            "timestamps": [float(start + i) for i in range(len(pictures))],
            "frames": pictures,
            "masks": masks,
        }
        writer.write_batch(pa.RecordBatch.from_pylist([row], clip_schema("jpeg")), row_group_size=1)
    writer.close()
    clips = -(-frames // CLIP_FRAMES)
    entry = VideoEntry("video", SHARD, 0, clips, frames // CLIP_FRAMES, frames, side, side, True)
    pq.write_table(pa.Table.from_pylist([asdict(entry)]), folder / INDEX_FILE)
    settings = {"clip_frames": CLIP_FRAMES}
    manifest = {
        "kind": "clips",
        "fingerprint": "benchmark",
        "settings": settings,
        "shards": [{"name": SHARD, "rows": clips}],
    }
    storage.publish(str(folder), manifest)


def _created(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def score(folder: str, side: int) -> tuple[float, float]:
    """Seconds of scoring the video of a clip set, and this process's peak of memory in MiB."""
    from pipeline.config.protocols import PRESETS
    from pipeline.evaluate.scoring import model_predictor, score_video
    from pipeline.models import BackboneConfig, SlotModel, SlotModelConfig

    vit = {"patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3}
    model = SlotModel(SlotModelConfig(BackboneConfig(None, side, vit), 7, 64, decoder_hidden_sizes=(64,)))
    clips = ClipSet(folder)
    protocol = PRESETS["slotcontrast"]
    start = perf_counter()
    score_video(clips, clips.videos[0], model_predictor(model, "video", protocol), protocol)
    return perf_counter() - start, memory_mib()


def memory_mib(counter: str = "VmHWM") -> float:
    """This process's peak (`VmHWM`) or present (`VmRSS`) memory; the peak where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not `ru_maxrss`: on Linux it begins with what the process that started this one held.
        return int(status.read_text().split(f"{counter}:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory_report(lengths: tuple[int, int] = (200, 2000), side: int = 518) -> list[str]:
    """One line for each length."""
    lines, peaks = [], []
    for frames in lengths:
        with tempfile.TemporaryDirectory() as scratch:
            write_video(Path(scratch), frames, side)
            command = [sys.executable, "-m", "benchmarks.memory", scratch, str(side)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds, peak = map(float, output.split())
        peaks.append(peak)
        lines.append(f"{frames} frames of {side}²: peak {peak:.0f} MiB, {frames / seconds:.1f} frames/s")
    return [*lines, f"{lengths[1] / lengths[0]:.0f}× the frames: {peaks[1] / peaks[0]:.2f}× the memory"]


if __name__ == "__main__":
    print(*score(sys.argv[1], int(sys.argv[2])))
