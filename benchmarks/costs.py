"""What each stage costs at a data set's size: `python -m benchmarks.costs` prints the tables of docs/scale.md.

Counts (bytes, requests, multiply-accumulates) follow from the configs and from how the code stores and reads;
`Rates` holds what was measured on a CPU, and `Prices` and a GPU's speed are assumptions to be replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import ceil
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.clips import table
from pipeline.clips.sources import container
from pipeline.config import Config, load_config
from pipeline.models import SlotModel, SlotModelConfig
from pipeline.report.costs import config_models
from pipeline.report.efficiency import count_macs, count_parameters
from pipeline.storage.s3 import PART_BYTES, PARTS_OF_A_SIZE, part_bytes
from pipeline.targets.maker import ROW_GROUP_BYTES

ROOT = Path(__file__).parent.parent
MIB = 2**20
FLOAT_BYTES = 4
FOOTER_READ = 64 * 2**10  # bytes of a Parquet file's end that pyarrow reads at first
CLIP_GROUP_FOOTER, TARGET_GROUP_FOOTER = 670, 890  # bytes that a row group adds to the footer, as found


@dataclass(frozen=True)
class Rates:
    """Measured: two cores of an Intel Xeon (docs/costs.md), three real H.264 videos. Assumed: the GPU."""

    shard_pixels: float = (
        132 * 218_100
    )  # output pixels a second and core: 264 frames/s on 2, 218,100 pixels each
    jpeg_bytes: float = 0.37  # a pixel at quality 95, 4:4:4; the three videos have 0.28, 0.30 and 0.54
    gpu_fp32: float = 19.5e12  # A100's operations a second, as printed; `cache` and `evaluate` run in fp32
    gpu_bf16: float = 312e12  # with tensor cores: `distill`
    utilisation: float = 0.35  # assumed


@dataclass(frozen=True)
class Prices:
    """Dollars; assumed, of the order of public list prices. Traffic within a region is taken as free."""

    gpu_hour: float = 2.0
    core_hour: float = 0.05
    gb_month: float = 0.023
    put: float = 5e-6
    get: float = 4e-7


@dataclass(frozen=True)
class Workload:
    """A data set under a config. `source_*` and `aspect` (longer side over shorter) are assumptions on its videos."""

    name: str
    config: Config
    videos: int
    frames: int  # of a video, that are kept
    aspect: float
    source_bytes: float  # of a video
    source_gets: int  # to read a video
    decoded: int | None = None  # frames of a video that are decoded for them; None: no more
    scored_videos: int = 0

    @cached_property
    def models(self) -> tuple[SlotModelConfig, SlotModelConfig]:
        return config_models(self.config)

    @property
    def pixels(self) -> float:
        """Of a stored frame."""
        side = self.config.clips.short_side
        assert side is not None
        return side * side * self.aspect

    @property
    def clips(self) -> int:
        return self.videos * ceil(self.frames / self.config.clips.clip_frames)

    @property
    def full_clips(self) -> int:
        return self.videos * (self.frames // self.config.clips.clip_frames)

    @property
    def shards(self) -> int:
        return ceil(self.videos / self.config.clips.videos_per_shard)

    def clip_bytes(self, rates: Rates) -> float:
        return self.config.clips.clip_frames * self.pixels * rates.jpeg_bytes

    @property
    def target_bytes(self) -> int:
        """Of the slots of one clip and view."""
        teacher = self.models[0]
        return teacher.num_slots * teacher.slot_size * FLOAT_BYTES * self.config.clips.clip_frames

    @property
    def samples(self) -> int:
        """That one student sees."""
        return self.config.distill.steps * self.config.distill.batch_size


@dataclass(frozen=True)
class Cost:
    """Of one stage. Bytes stored stay; bytes read and written move between storage and machines."""

    stage: str
    stored: float = 0
    read: float = 0
    written: float = 0
    puts: float = 0
    gets: float = 0
    core_hours: float = 0
    gpu_hours: float = 0

    def dollars(self, prices: Prices) -> float:
        """Once."""
        machines = self.core_hours * prices.core_hour + self.gpu_hours * prices.gpu_hour
        return machines + self.puts * prices.put + self.gets * prices.get

    def dollars_a_month(self, prices: Prices) -> float:
        return self.stored / 1e9 * prices.gb_month


# --- counts ------------------------------------------------------------------------------------------


def upload_requests(size: float) -> int:
    """One, or the parts with their begin and end."""
    if size <= PART_BYTES:
        return 1
    parts = 0
    while size > PARTS_OF_A_SIZE * part_bytes(parts):
        size -= PARTS_OF_A_SIZE * part_bytes(parts)
        parts += PARTS_OF_A_SIZE
    return parts + ceil(size / part_bytes(parts)) + 2


def upload_looks(size: float) -> int:
    """Whether the file is there already; and its size, after an upload in parts."""
    return 1 if size <= PART_BYTES else 2


def row_groups(work: Workload, rates: Rates) -> tuple[int, float]:
    """Of the clips: how many there are, and the bytes of one. A group is closed by the clip that reaches its limit,
    and by a video's end."""
    of_a_video = ceil(work.frames / work.config.clips.clip_frames)
    most = ceil(work.config.clips.row_group_mb * MIB / work.clip_bytes(rates))
    groups = ceil(of_a_video / most)
    return work.videos * groups, of_a_video / groups * work.clip_bytes(rates)


def target_group_rows(work: Workload) -> int:
    """Rows of a target file's row group: at most what the teacher saw in one pass, in whole clips."""
    views = work.config.targets.views
    batch = ceil(work.config.targets.batch_size / views) * views
    return max(1, min(batch, ROW_GROUP_BYTES // work.target_bytes))


def footers(work: Workload, rates: Rates) -> tuple[float, float]:
    """Bytes and requests of a sample for footers, of a clip shard and its targets, that the reader does not remember.

    Opening a file asks for its size, and for its footer in one or two reads.
    """
    target_groups = work.clips * work.config.targets.views / target_group_rows(work)
    read = gets = 0.0
    clip_groups, _ = row_groups(work, rates)
    for total in (CLIP_GROUP_FOOTER * clip_groups, TARGET_GROUP_FOOTER * target_groups):
        footer = total / work.shards
        forgotten = max(0.0, 1 - table._FOOTER_BYTES / total)
        read += forgotten * max(FOOTER_READ, footer)
        gets += forgotten * (2 + (footer > FOOTER_READ))
    return read, gets


@cache
def _encoder_macs(config: SlotModelConfig, frames: int) -> tuple[int, int]:
    """Multiply-accumulates of a clip: the backbone's, and those of projection, slot attention and predictor."""
    with torch.device("meta"):
        model = SlotModel(config).eval().requires_grad_(False)
        video = torch.zeros(1, frames, 3, model.image_size, model.image_size)
        initial = torch.zeros(1, config.num_slots, config.slot_size)

    def counted(run: Callable[[], torch.Tensor]) -> tuple[int, torch.Tensor]:
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            result = run()
        return counter.get_total_flops() // 2, result

    backbone, features = counted(lambda: model.backbone_features(video))
    rest, _ = counted(lambda: model.roll_out(features, initial)[0])
    return backbone, rest


@cache
def _model_macs(config: SlotModelConfig, frames: int, fast_decoder: bool) -> int:
    """Of a clip, from pixels to masks."""
    return count_macs(config, frames, fast_decoder=fast_decoder).products


def teacher_macs(work: Workload) -> int:
    """Of one clip and view: `cache` decodes nothing."""
    return sum(_encoder_macs(work.models[0], work.config.clips.clip_frames))


def step_macs(work: Workload) -> int:
    """Of one clip in training: what is trained goes forward once and backward at twice the cost, the frozen
    backbone forward alone."""
    student, frames = work.models[1], work.config.clips.clip_frames
    backbone, _ = _encoder_macs(student, frames)
    whole = _model_macs(student, frames, work.config.distill.fast_decoder)
    return backbone + 3 * (whole - backbone)


def _gpu_hours(macs: float, speed: float, rates: Rates) -> float:
    return 2 * macs / (speed * rates.utilisation) / 3600


# --- stages ------------------------------------------------------------------------------------------


def shard_cost(work: Workload, rates: Rates) -> Cost:
    stored = work.videos * work.frames * work.pixels * rates.jpeg_bytes
    decoded = work.videos * (work.decoded or work.frames)
    return Cost(
        "shard",
        stored=stored,
        read=work.videos * work.source_bytes,
        written=stored,
        puts=work.shards * upload_requests(stored / work.shards) + 4,  # index, sources, config, manifest
        gets=work.videos * work.source_gets + work.shards * upload_looks(stored / work.shards),
        core_hours=decoded * work.pixels / rates.shard_pixels / 3600,
    )


def cache_cost(work: Workload, rates: Rates) -> Cost:
    views = work.config.targets.views
    clips = shard_cost(work, rates).stored
    stored = work.clips * views * work.target_bytes
    groups, _ = row_groups(work, rates)
    return Cost(
        "cache",
        stored=stored,
        read=clips,
        written=stored,
        puts=work.shards * upload_requests(stored / work.shards) + 2,  # config, manifest
        # Size and footer of the clips, a row group's columns at once, and what an upload asks for.
        gets=(2 + upload_looks(stored / work.shards)) * work.shards + groups,
        gpu_hours=_gpu_hours(work.full_clips * views * teacher_macs(work), rates.gpu_fp32, rates),
    )


def distill_cost(work: Workload, rates: Rates) -> Cost:
    """One student, with cached slots and live features of its own."""
    _, group = row_groups(work, rates)
    target_group = target_group_rows(work) * work.target_bytes
    footer_bytes, footer_gets = footers(work, rates)
    return Cost(
        "distill",
        stored=count_parameters(work.models[1]) * FLOAT_BYTES,
        read=work.samples * (group + target_group + footer_bytes),
        gets=work.samples * (2 + footer_gets),
        gpu_hours=_gpu_hours(work.samples * step_macs(work), rates.gpu_bf16, rates),
    )


def evaluate_cost(work: Workload, rates: Rates) -> Cost:
    """The student on the videos with masks."""
    frames = work.config.clips.clip_frames
    macs = _model_macs(work.models[1], frames, True) / frames
    scored = work.scored_videos * work.frames
    shards = ceil(work.scored_videos / work.config.clips.videos_per_shard)
    groups = work.scored_videos * row_groups(work, rates)[0] / work.videos
    return Cost(
        "evaluate",
        read=scored * work.pixels * rates.jpeg_bytes,
        puts=shards + 2,
        gets=3 * shards + groups,
        gpu_hours=_gpu_hours(scored * macs, rates.gpu_fp32, rates),
    )


def stage_costs(work: Workload, rates: Rates) -> list[Cost]:
    costs = [shard_cost(work, rates), cache_cost(work, rates), distill_cost(work, rates)]
    return [*costs, evaluate_cost(work, rates)] if work.scored_videos else costs


def workloads() -> list[Workload]:
    """The data sets of docs/scale.md."""
    movi, ytvis, folder = (
        load_config(ROOT / "configs" / f"{name}.yaml") for name in ("movi_e", "ytvis2021", "videos")
    )
    # A record holds 24 PNGs of 256² and their labels. Videos of ten minutes at 5 Mbit/s, in reads of `container.AHEAD`.
    record, minutes = 24 * 1.2e5, 10
    length, size = 60 * minutes, 60 * minutes * 5e6 / 8
    million = 10**6 * 60 // minutes
    every = Workload(
        "10⁶ hours, 24 fps", folder, million, 24 * length, 16 / 9, size, ceil(size / container.AHEAD)
    )
    return [
        Workload("MOVi-E", movi, 9749, 24, 1.0, record, 2, scored_videos=250),
        Workload("YTVIS-2021", ytvis, 2985 - 300, 30, 16 / 9, 30 * 1.5e5, 30, scored_videos=300),
        every,
        replace(every, name="10⁶ hours, 1 of 24 fps", frames=length, decoded=every.frames),
    ]


# --- tables ------------------------------------------------------------------------------------------


def cost_table(works: list[Workload], rates: Rates, prices: Prices) -> list[str]:
    titles = ["", "stage", "stored", "moved", "PUT", "GET", "core-hours", "GPU-hours", "$ once", "$ a month"]
    lines = ["| " + " | ".join(titles) + " |", "| --- | --- |" + " ---: |" * (len(titles) - 2)]
    for work in works:
        for index, cost in enumerate(stage_costs(work, rates)):
            cells = [
                work.name if index == 0 else "",
                f"`{cost.stage}`",
                amount(cost.stored, "B"),
                amount(cost.read + cost.written, "B"),
                *map(amount, (cost.puts, cost.gets, cost.core_hours, cost.gpu_hours)),
                amount(cost.dollars(prices)),
                amount(cost.dollars_a_month(prices)),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def break_even_table(works: list[Workload], rates: Rates, prices: Prices) -> list[str]:
    """Cached slots against a teacher that runs in every step."""
    titles = ["", "slots of a clip and view", "teacher, GPU-s of one", "months of storage that one pass pays"]
    titles += [
        "rows cached",
        "samples of a student",
        "students that pay the cache",
        "GPU-hours it saves an epoch",
    ]
    lines = ["| " + " | ".join(titles) + " |", "| --- |" + " ---: |" * (len(titles) - 1)]
    for work in works:
        hours = _gpu_hours(teacher_macs(work), rates.gpu_fp32, rates)
        months = hours * prices.gpu_hour / (work.target_bytes / 1e9 * prices.gb_month)
        rows = work.full_clips * work.config.targets.views
        cells = [
            work.name,
            amount(work.target_bytes, "B"),
            f"{3600 * hours:.3f}",
            amount(months),
            amount(rows),
        ]
        cells += [amount(work.samples), amount(rows / work.samples), amount(work.videos * hours)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def amount(value: float, unit: str = "") -> str:
    """Two digits and a prefix: 14 GB, 6.6 TB; a dash for nothing."""
    if not value:
        return "–"
    prefixes = ["", "k", "M", "G", "T", "P", "E"] if unit else ["", " k", " M", " bn"]
    power = 0
    while abs(value) >= 999.5 and power < len(prefixes) - 1:
        value, power = value / 1000, power + 1
    digits = f"{value:.0f}" if abs(value) >= 9.95 else f"{value:.2g}"
    return f"{digits} {prefixes[power]}{unit}" if unit else f"{digits}{prefixes[power]}"


def document_block() -> str:
    """What stands between the marks of docs/scale.md."""
    works, rates, prices = workloads(), Rates(), Prices()
    tables = (cost_table(works, rates, prices), break_even_table(works, rates, prices))
    return "\n\n".join("\n".join(lines) for lines in tables)


if __name__ == "__main__":
    sys.stdout.write(document_block() + "\n")
