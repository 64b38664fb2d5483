"""The streaming step: one frame and the state before it, to slots, masks and the state after it. What is exported.

Shapes: B clips that advance together, N slots, d slot size, S image side, (h, w) the grid of
patches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.models.layers import RandomSlots
from pipeline.models.slot_model import (
    FIRST_FRAME_ITERATIONS,
    NEXT_FRAME_ITERATIONS,
    SlotModel,
)

INPUTS = ("frames", "state", "first")
OUTPUTS = ("slots", "masks", "attention", "next_state")


class StreamingStep(nn.Module):
    """One frame of each of B clips; what it gives is what `SlotModel.stream` gives for them.

    Inputs: frames `(B, S, S, 3)` float32, RGB values from 0 to 255, which need not be whole; state `(B, N, d)`;
    first `(B,)` bool, whether the frame is its clip's first. The state of a first frame is standard normal noise
    where the model draws its initial slots, and is not looked at where they were learned; later it is the
    `next_state` of the frame before.

    Outputs: slots `(B, N, d)`; masks, the decoder's, and attention, slot attention's: both `(B, N, h, w)`, softmax
    over N; next_state `(B, N, d)`.

    There is no branch in it: each frame has the later frames' iterations, and those that a first frame has more
    are computed before them and taken where `first` says so. They cost little beside the backbone and the decoder.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: SlotModel) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(model.config.mean))
        self.register_buffer("std", torch.tensor(model.config.std))

    def forward(self, frames: Tensor, state: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        model = self.model
        pixels = ((frames / 255 - self.mean) / self.std).permute(0, 3, 1, 2)
        features = model.project(model.encoder.backbone(pixels))
        slots, attention, next_state = self._advance(features, state, first[:, None, None])
        _, masks = model.decoder(slots)
        grid = model.grid
        return slots, masks.unflatten(-1, grid), attention.unflatten(-1, grid), next_state

    def _advance(self, features: Tensor, state: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        initializer, processor = self.model.initializer, self.model.processor
        drawn = isinstance(initializer, RandomSlots)
        start = initializer(state.shape[0], state if drawn else None)
        if processor.predictor is None:
            # Every frame is a first one: the state is the noise, or nothing, and stays it.
            return *processor.corrector(start, features, FIRST_FRAME_ITERATIONS), state.clone()
        begun, _ = processor.corrector(start, features, FIRST_FRAME_ITERATIONS - NEXT_FRAME_ITERATIONS)
        slots, attention = processor.corrector(
            torch.where(first, begun, state), features, NEXT_FRAME_ITERATIONS
        )
        return slots, attention, processor.predictor(slots)
