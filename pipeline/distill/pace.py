"""What a training run says of itself: how fast it is, and its losses over all workers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass
class Pace:
    """How fast training has been since a step, for which time was lost to waiting for data."""

    step: int
    waited: float = 0.0  # seconds
    since: float = field(default_factory=time.monotonic)

    def speed(self, step: int, frames_per_step: int) -> dict[str, float]:
        elapsed = max(time.monotonic() - self.since, 1e-9)
        return {
            "frames_per_second": (step - self.step) * frames_per_step / elapsed,
            "data_wait_share": self.waited / elapsed,
        }


def mean_over_workers(values: dict[str, float], world_size: int, device: torch.device) -> dict[str, float]:
    if world_size == 1:
        return values
    tensor = torch.tensor(
        list(values.values()), dtype=torch.float64 if device.type == "cpu" else None, device=device
    )
    dist.all_reduce(tensor)
    return dict(zip(values, (tensor / world_size).tolist(), strict=True))
