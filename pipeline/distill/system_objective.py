"""What the objectives of all systems but slot models have in common: they see pixels and the step, and may draw."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.distill.objective import TrainingObjective
from pipeline.models.segmenter import VideoSegmenter


@dataclass(frozen=True)
class SystemBatch:
    """What a system learns from in a step.

    pixels: B clips of uint8 frames `(T, h, w, 3)` on the device, as their views show them. step: from 0 on. seed: of
    all that is drawn in this step, another one for each worker. motion: of an objective that `needs_motion`, segments
    `(T, h, w)` uint8 of each clip, 0 where nothing moves. flow: of one that `needs_flow`, `(T, h, w, 2)` of each clip,
    pixels down and to the right. boxes: of one that `needs_boxes`, `(B, K, 4)` of objects in the first frames, as
    `boxes_in_view` has them, zeros where there are fewer.
    """

    pixels: list[Tensor]
    step: int
    seed: int
    motion: list[Tensor] | None = None
    flow: list[Tensor] | None = None
    boxes: Tensor | None = None


@contextlib.contextmanager
def drawn_from(seed: int, device: torch.device) -> Iterator[None]:
    """A block whose random numbers, dropout's too, follow from `seed`, leaving the others as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def noise_seeds(clips: int) -> list[int]:
    """A drawn seed for the slots of each clip."""
    return torch.randint(2**62, (clips,)).tolist()


def with_total(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses, and their sum as `total`."""
    return {"total": torch.stack(list(losses.values())).sum(), **losses}


class SystemObjective(TrainingObjective):
    """A system's own loss; a subclass says what it is in `losses`."""

    def __init__(self, model: VideoSegmenter) -> None:
        super().__init__()
        self.model, self.heads = model, nn.ModuleDict()

    def forward(self, batch: SystemBatch) -> dict[str, Tensor]:
        """Scalars: `total`, and what else is to be in the history."""
        with drawn_from(batch.seed, self.model.device):
            return self.losses(batch)

    def losses(self, batch: SystemBatch) -> dict[str, Tensor]:
        """As `forward`; torch's random numbers may be drawn freely."""
        raise NotImplementedError
