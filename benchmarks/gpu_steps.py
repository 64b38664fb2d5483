"""Parts of `benchmarks.gpu` that run steps on tensors in memory: rounding, a profile, changes and how fast they are."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.step import FRAMES, Sizes, paper_sizes, step_comparison, tiny_sizes
from pipeline.compute import best_device
from pipeline.distill.step import Batch, GradientWatch, Objective, Terms, adam, read_values, training_step
from pipeline.models import SlotModel

PACKAGES = ("torch", "timm", "triton", "numpy", "scipy", "safetensors", "pyarrow", "pydantic", "pycocotools")
STEP = {"learning_rate": 4e-4, "gradient_clip": 0.05, "autocast": torch.bfloat16}


@dataclass(frozen=True)
class Finding:
    """One number or word that a part found; expected: in words; holds: whether it is so, None where nobody knows."""

    name: str
    value: float | int | str
    expected: str = ""
    holds: bool | None = None


@dataclass(frozen=True)
class Scale:
    """What is measured: the architecture, clips a step, steps that are timed and steps of a curve."""

    sizes: Sizes
    batch: int
    timed: int
    curve: int
    is_tiny: bool

    @classmethod
    def paper(cls, batch: int) -> Scale:
        return cls(paper_sizes()[0], batch, timed=20, curve=200, is_tiny=False)

    @classmethod
    def tiny(cls) -> Scale:
        return cls(tiny_sizes(), batch=2, timed=2, curve=3, is_tiny=True)


def environment(scale: Scale, scratch: Path) -> list[Finding]:
    """Versions of what is there, and whether products may be rounded to TF32."""
    found = []
    for package in PACKAGES:
        try:
            found.append(Finding(package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(package, "is not installed"))
    device = best_device()
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        found += [Finding("GPU", torch.cuda.get_device_name(device)), Finding("its memory, GiB", memory)]
        found.append(
            Finding("compute capability", str(torch.cuda.get_device_capability(device)), "≥ (8, 0) for bf16")
        )
    products, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    found.append(Finding("TF32 in products", str(products), "False: targets are fp32", not products))
    return [*found, Finding("TF32 in convolutions", str(convolutions), "teachers turn it off themselves")]


@torch.no_grad()
def teacher_rounding(scale: Scale, scratch: Path) -> list[Finding]:
    """How far a teacher's slots at several batch sizes are off those of the CPU, over their largest value."""
    device, found = best_device(), []
    torch.manual_seed(0)
    teacher = scale.sizes.model(scale.sizes.teacher).eval()
    most = 2 if scale.is_tiny else 16
    video = torch.randn(most, FRAMES, 3, teacher.image_size, teacher.image_size)
    expected = teacher.roll_out(teacher.backbone_features(video[:2]))[0]
    teacher.to(device)
    for tf32 in (False, True):
        with _tf32_in_convolutions(tf32):
            for size in (b for b in (1, 2, 8, 16) if b <= most):
                slots = teacher.roll_out(teacher.backbone_features(video[:size].to(device)))[0].cpu()
                known = expected[:size]
                off = ((slots[: len(known)] - known).abs().max() / known.abs().max()).item()
                name = f"batch {size}, TF32 convolutions {'on' if tf32 else 'off'}"
                found.append(Finding(name, off, "" if tf32 else "≤ 1e-4", None if tf32 else off <= 1e-4))
    return found


@contextlib.contextmanager
def _tf32_in_convolutions(allowed: bool) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class _Steps:
    """Steps of one student on one batch in memory, from its video or from cached features."""

    def __init__(
        self, scale: Scale, *, features: bool = False, change: Callable[[SlotModel], None] | None = None
    ):
        self.device = best_device()
        torch.manual_seed(0)
        student = scale.sizes.model(scale.sizes.student)
        side, generator = student.image_size, torch.Generator().manual_seed(1)
        video = torch.randn(scale.batch, FRAMES, 3, side, side, generator=generator).to(self.device)
        slots = (scale.batch, FRAMES, scale.sizes.num_slots, scale.sizes.slot_size)
        target = torch.randn(slots, generator=generator).to(self.device)
        self.student = student.to(self.device).train()
        self.batch = Batch(video=video, target_slots=target)
        if features:
            with torch.no_grad():
                cached = self.student.backbone_features(video).half().float()
            self.batch = Batch(backbone_features=cached, target_slots=target)
        if change is not None:
            change(self.student)
        self.objective: nn.Module = Objective(self.student, Terms(slot_kd=0.2))
        self.optimizer = adam(self.student.trainable_parameters(), 4e-4, self.device)
        self.watch = GradientWatch(self.device)

    def step(self) -> dict[str, Tensor]:
        return training_step(self.objective, self.optimizer, self.batch, watch=self.watch, **STEP)  # type: ignore[arg-type]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, count: int) -> float:
        """Median of a step's seconds, of which the host waits for the last one alone, as a run does."""
        times = []
        for _ in range(3):
            self.wait()
            began = time.perf_counter()
            for _ in range(count):
                self.step()
            self.wait()
            times.append((time.perf_counter() - began) / count)
        return statistics.median(times)


def profile(scale: Scale, scratch: Path) -> list[Finding]:
    """Kernels, their time and the memory of a step from video in bf16, and whether the host waits in it."""
    steps = _Steps(scale)
    for _ in range(3):
        steps.step()
    steps.wait()
    found = [Finding("step, ms", 1e3 * steps.seconds(scale.timed))]
    if steps.device.type != "cuda":
        return found
    torch.cuda.reset_peak_memory_stats()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        steps.step()
        steps.wait()
    kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(event.self_device_time_total for event in kernels) / 1e3
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(
        profiler.key_averages().table(
            sort_by="self_device_time_total", row_limit=25, max_name_column_width=80
        )
    )
    found += [
        Finding("kernels", len(kernels), "about 1,500"),
        Finding("time of the kernels, ms", total, "39 ms ± 30 %", 27 <= total <= 51),
        Finding("peak memory, GiB", peak, "< 9", peak < 9),
    ]
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps.step()
        waits = "none"
    except RuntimeError as error:
        waits = str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [*found, Finding("waits of the host in a step", waits, "none", waits == "none")]


def ways(scale: Scale, scratch: Path) -> list[Finding]:
    """`benchmarks.step` at its batch size on this device."""
    comparison = step_comparison(scale.sizes, 1 if scale.is_tiny else 5)
    found = [
        Finding(row.name, f"{1e3 * row.median:.1f} ms, {comparison.speed_up(row):.2f}×")
        for row in comparison.rows
    ]
    return found + [Finding("note", note) for note in comparison.notes]


def _backbone_in_bf16(student: SlotModel) -> None:
    student.encoder.backbone.to(torch.bfloat16)


def _plain_decoder(student: SlotModel) -> None:
    student.decoder.fast = False


def _without_kernels(student: SlotModel) -> None:
    student.decoder.tiled = False


def _compiled_decoder(student: SlotModel) -> None:
    _without_kernels(student)
    student.decoder.compile()


CHANGES: dict[str, tuple[bool, Callable[[SlotModel], None] | None]] = {
    "as it is, from video": (False, None),
    "the frozen ViT's weights in bf16": (False, _backbone_in_bf16),
    "features cached in fp16": (True, None),
    "cached features, plain decoder": (True, _plain_decoder),
    "cached features, decoder without Triton's kernels": (True, _without_kernels),
    "cached features, compiled decoder": (True, _compiled_decoder),
}


def changes(scale: Scale, scratch: Path) -> list[Finding]:
    """Each change's time of a step, its first loss beside the first way's, and the end of a curve."""
    found: list[Finding] = []
    first = None
    for name, (features, change) in CHANGES.items():
        if scale.is_tiny and change is _compiled_decoder:  # would compile for a CPU
            continue
        try:
            steps = _Steps(scale, features=features, change=change)
            losses = [steps.step()["total"] for _ in range(scale.curve)]
            curve = torch.stack(losses).tolist()
            milliseconds = 1e3 * steps.seconds(scale.timed)
        except Exception as error:  # a change that this machine can't make is a finding too
            found.append(Finding(name, f"{type(error).__name__}: {error}".splitlines()[0]))
            continue
        first = first or curve[0]
        off = abs(curve[0] / first - 1)
        found.append(Finding(f"{name}: ms a step", milliseconds))
        found.append(Finding(f"{name}: first loss off by", off, "≤ 1e-3", off <= 1e-3))
        found.append(Finding(f"{name}: loss after {scale.curve} steps", curve[-1], "alike"))
    return found


def one_worker(scale: Scale, scratch: Path) -> list[Finding]:
    """A group of one worker gives the loss and the gradient of none."""
    alone, grouped = _Steps(scale), _Steps(scale)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    backend = "nccl" if alone.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=address, rank=0, world_size=1)
    try:
        grouped.objective = DistributedDataParallel(copy.deepcopy(grouped.objective))
        parameters = [p for p in grouped.objective.parameters() if p.requires_grad]
        grouped.optimizer = adam(parameters, 4e-4, grouped.device)
        expected, values = read_values(alone.step()), read_values(grouped.step())
    finally:
        dist.destroy_process_group()
    found = [
        Finding("backend", backend),
        Finding("GPUs here", torch.cuda.device_count()),
        Finding("cores", os.cpu_count() or 0),
    ]
    for name, value in values.items():
        off = abs(value / expected[name] - 1)
        found.append(Finding(f"{name} off by", off, "≤ 1e-5", off <= 1e-5))
    return found
