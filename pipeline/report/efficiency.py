"""What a slot model costs: parameters, multiply-accumulates (MAC) and time. Needs torch and timm alone.

The paper's Table 2 prints 8825.7 "GFLOPs" for the teacher and 3266.5 for the student. It does not say of what;
both follow, to 0.1 of the printed number, from a video of 60 frames of 518 x 518 pixels if one counts

- one multiply-accumulate, not two operations, a product in linear layers (the GRU's included) and in the
  patch convolution, with the MLP decoder run in full on every slot and position, and
- one for each element that passes a GELU or a ReLU (0.06 % of the teacher's, 0.1 % of the student's), but
- nothing for products of two activations: attention in the ViT (34.6 GMAC a frame of the teacher's 181.7),
  slot attention and the predictor; nothing for norms, softmax, biases and resampling.

So a count covers all that happens to a prepared video: the backbone, the projection, slot attention with 3
iterations on the first frame and 2 on later ones, the predictor after each frame, and the decoder.
"""

from __future__ import annotations

import math
import platform
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models import BackboneConfig, SlotModel, SlotModelConfig
from pipeline.models.segmenter import VideoSegmenter

# The models of the paper's Table 2: its YTVIS-2021 column in Table 8 (configs/ytvis2021.yaml).
PAPER_TEACHER = SlotModelConfig(BackboneConfig("vit_base_patch14_dinov2", 518), num_slots=7, slot_size=64)
PAPER_STUDENT = SlotModelConfig(BackboneConfig("vit_small_patch14_dinov2", 518), num_slots=7, slot_size=64)
PAPER_FRAMES = 60

_LAYERS = (torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm)
_ACTIVATIONS = (torch.ops.aten.gelu, torch.ops.aten.relu, torch.ops.aten.relu_)


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of a video."""

    layers: int  # products with weights: linear layers, GRU, convolution
    activations: int  # elements that pass a GELU or a ReLU
    attention: int  # products of two activations

    @property
    def paper(self) -> int:
        """As the paper counts."""
        return self.layers + self.activations

    @property
    def products(self) -> int:
        """All products."""
        return self.layers + self.attention


def _two_an_element(shape: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(shape)  # the counter's unit is half a multiply-accumulate


def _on_meta(config: SlotModelConfig) -> SlotModel:
    """The model without memory for its weights."""
    with torch.device("meta"):
        # The counter's hooks can't have parameters with a gradient under `no_grad`.
        return SlotModel(config).eval().requires_grad_(False)


def count_parameters(config: SlotModelConfig) -> int:
    """All parameters, the frozen backbone's included."""
    return _on_meta(config).num_parameters()


def count_macs(config: SlotModelConfig, frames: int, *, fast_decoder: bool = False) -> Macs:
    """Counts a forward pass over one video of `frames` frames, without computing anything.

    The fast decoder's mask-weighted sum counts as attention: it is a product of two activations.
    """
    return _macs(_on_meta(config), frames, fast_decoder)


def _macs(model: SlotModel, frames: int, fast_decoder: bool) -> Macs:
    model.decoder.fast = fast_decoder
    first, two = _count(model, 1), _count(model, 2)
    # All frames after the first cost the same.
    return Macs(*(a + (frames - 1) * (b - a) for a, b in zip(first, two, strict=True)))


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=dict.fromkeys(_ACTIVATIONS, _two_an_element))


def _count(model: SlotModel, frames: int) -> tuple[int, int, int]:
    """Multiply-accumulates of layers, activations and attention."""
    config, size = model.config, model.image_size
    with _counter() as counter, torch.no_grad():
        slots = torch.zeros(1, config.num_slots, config.slot_size, device="meta")
        model(torch.zeros(1, frames, 3, size, size, device="meta"), initial_slots=slots)
    return _counted(counter)


def _counted(counter: FlopCounterMode) -> tuple[int, int, int]:
    counts = counter.get_flop_counts()["Global"]
    layers = sum(n for operator, n in counts.items() if operator in _LAYERS)
    activations = sum(n for operator, n in counts.items() if operator in _ACTIVATIONS)
    rest = sum(counts.values()) - layers - activations
    return layers // 2, activations // 2, rest // 2


def count_stream(model: VideoSegmenter, frames: np.ndarray) -> Macs:
    """Counts what a model of any system computes for the slots and masks of one video `(T, h, w, 3)`, uint8.

    It is run, as what some compute depends on what they see; on where boxes are it does not depend. Its parameters have
    no gradient afterwards.
    """
    model.eval().requires_grad_(False)
    given: dict[str, Any] = {}
    if model.start_boxes:
        given["boxes"] = torch.zeros(model.start_boxes, 4, device=model.device)
    with _counter() as counter, sdpa_kernel(SDPBackend.MATH):  # the fused products are not counted on CPUs
        for _ in model.stream([frames], **given):
            pass
    return Macs(*_counted(counter))


def measure_latency(model: SlotModel, frames: int = 1, runs: int = 5, warmup: int = 1) -> float:
    """Seconds per frame of one model, see `measure_latencies`."""
    return measure_latencies([model], frames, runs, warmup)[0]


@torch.no_grad()
def measure_latencies(
    models: Sequence[SlotModel], frames: int = 1, runs: int = 5, warmup: int = 1
) -> list[float]:
    """Seconds per frame: medians of `runs` forward passes over a prepared video, on each model's device.

    From normalised pixels to slots, masks and reconstruction, in the model's own precision; decoding, resizing
    and drawing label maps are not in it. The models take turns, so that a busy moment hits them all.
    """
    passes = [_forward_pass(model, frames) for model in models]
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(warmup + runs):
        for forward, times in zip(passes, seconds, strict=True):
            start = perf_counter()
            forward()
            times.append(perf_counter() - start)
    return [statistics.median(times[warmup:]) / frames for times in seconds]


def _forward_pass(model: SlotModel, frames: int) -> Callable[[], None]:
    size, device = model.image_size, model.device
    video = torch.randn(1, frames, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    slots = model.initial_slots(1, [0])

    def forward() -> None:
        model(video, initial_slots=slots)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return forward


@dataclass(frozen=True)
class Cost:
    """What one architecture costs; multiply-accumulates and seconds are per frame."""

    config: SlotModelConfig
    parameters: int
    macs_paper: float
    macs_products: float
    macs_run: float  # all products with the fast decoder: what this code computes
    seconds: float | None = None  # where it was measured


def count_cost(config: SlotModelConfig) -> Cost:
    """Means over the paper's 60 frames.

    Raises:
        ValueError: an architecture that can't be built.
    """
    model = _on_meta(config)
    plain, fast = (_macs(model, PAPER_FRAMES, fast_decoder) for fast_decoder in (False, True))
    return Cost(
        config,
        model.num_parameters(),
        plain.paper / PAPER_FRAMES,
        plain.products / PAPER_FRAMES,
        fast.products / PAPER_FRAMES,
    )


def device_name(device: torch.device | str) -> str:
    """What a time was measured on."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"
