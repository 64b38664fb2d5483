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


def diod_learning_rate(step: int, warmup: int = 3_000, half_life: int = 50_000) -> float:
    """Of DIOD's rate (5e-4, Adam) the share at a step, counted from 1: up, and halved with each `half_life` steps."""
    return min(step / max(warmup, 1), 1.0) * 0.5 ** (step / half_life)


def steve_temperature(step: int, steps: int = 30_000) -> float:
    """Of STEVE's Gumbel-softmax: from 1 to 0.1 within so many steps, as a cosine falls; then it stays."""
    return 0.1 + 0.9 * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2


def steve_learning_rate(step: int, warmup: int = 30_000, half_life: int = 250_000) -> float:
    """Of the rates of STEVE's encoder and token decoder (its dVAE's stays as it is) the share at a step."""
    return min((step + 1) / warmup, 1.0) * 0.5 ** (step / half_life)


def savi_learning_rate(step: int, steps: int, warmup: int = 2_500) -> float:
    """Of SAVi's rate (2e-4, Adam; without boxes or flow 1e-4) the share at a step: up from 0, then a cosine to 0.

    The warm-up is of 2,500 steps as its authors have it, of 2.5 % of all in SlotDiffusion's training without boxes.
    """
    if step < warmup:
        return step / warmup
    return (1 + math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1.0))) / 2
