"""The number format that training computes its products in: bfloat16 where the machine is good at it."""

from __future__ import annotations

import functools
import time
from typing import Literal

import torch
import torch.distributed as dist

Precision = Literal["fp32", "bf16"]

WORTH_IT = 1.5  # times as fast as float32: below it, rounding buys nothing
_SIDE = 1024  # of the products that are timed


def choose_precision(setting: str, device: torch.device) -> Precision:
    """What `precision` means on a device; the first worker's answer counts for all of them.

    "auto" is bf16 on GPUs from Ampere on, and on CPUs that say that they have it (AVX512-BF16 or AMX) and multiply
    at least `WORTH_IT` times as fast in it: some say so and are slower.
    """
    if setting != "auto":
        return "bf16" if setting == "bf16" else "fp32"
    chosen: list[Precision] = ["bf16" if _is_good_at_bf16(device) else "fp32"]
    if dist.is_initialized():
        dist.broadcast_object_list(chosen, device=device)
    return chosen[0]


def earlier_precision(setting: str, device: torch.device) -> Precision:
    """What `precision` meant to versions whose checkpoints don't say what was chosen."""
    return "bf16" if setting == "bf16" or (setting == "auto" and device.type == "cuda") else "fp32"


def autocast_type(precision: Precision) -> torch.dtype | None:
    """What `training_step` takes as `autocast`."""
    return torch.bfloat16 if precision == "bf16" else None


def _is_good_at_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and has_bf16() and speedup_of_bf16() >= WORTH_IT


def has_bf16() -> bool:
    """Whether this CPU says that it multiplies in bfloat16."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@functools.cache
def speedup_of_bf16() -> float:
    """How many times as fast as in float32 this CPU multiplies in bfloat16; measured once a process, in about 0.1 s."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(_SIDE, _SIDE, dtype=dtype)
        times = []
        for _ in range(6):
            began = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - began)
        seconds[dtype] = min(times)  # whatever else runs on this machine makes one slower, but none faster
    return seconds[torch.float32] / seconds[torch.bfloat16]
