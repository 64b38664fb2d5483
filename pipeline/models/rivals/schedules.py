"""What the systems change from step to step of their training."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def solv_learning_rate(step: int, steps: int) -> float:
    """Of SOLV's rate (4e-4, Adam) the share at a step: up within 5 % of the steps, then down to an eighth.

    It halves with each third of the steps after the warm-up.
    """
    warmup = int(0.05 * steps)
    if step < warmup:
        return 1e-5 + (1 - 1e-5) * step / warmup
    return 0.5 ** ((step - warmup) / max((steps - warmup) // 3, 1))


def merge_probability(epoch: int, epochs: int) -> float:
    """With which SOLV merges an item's slots in training: never in the first epoch (0), always in the last."""
    return math.log(epoch + 1) / math.log(epochs) if epochs > 1 else 1.0


def drawn_tokens(frames: int, patches: int, seed: int, share: float = 0.5) -> Tensor:
    """The patches of each frame that SOLV sees in a training step, `(frames, int(share * patches))`, sorted."""
    draws = torch.rand((frames, patches), generator=torch.Generator().manual_seed(seed))
    return draws.topk(int(share * patches), dim=1).indices.sort(dim=1).values


def savi_learning_rate(step: int, steps: int, warmup: int = 2_500) -> float:
    """Of SAVi's rate (2e-4, Adam; without boxes or flow 1e-4) the share at a step: up from 0, then a cosine to 0.

    The warm-up is of 2,500 steps as its authors have it, of 2.5 % of all in SlotDiffusion's training without boxes.
    """
    if step < warmup:
        return step / warmup
    return (1 + math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1.0))) / 2
