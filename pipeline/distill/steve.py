"""What STEVE is trained for: each frame's tokens from its slots, and a discrete VAE's picture of the frame."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pipeline.config import rivals
from pipeline.config.models import Teacher
from pipeline.distill.system_objective import SystemBatch, SystemObjective, noise_seeds, with_total
from pipeline.models.rivals.steve import STEVE
from pipeline.models.rivals.steve_training import RATES, rates, training_losses
from pipeline.models.segmenter import VideoSegmenter

ENCODER = "steve_encoder"  # the part of the model whose learning rate is the run's


class STEVEObjective(SystemObjective):
    """Cross-entropy of the tokens and squared error of the dVAE's picture, both summed over a frame.

    Of the gradient the largest entry is clipped.
    """

    model: STEVE
    norm_type = math.inf

    def __init__(self, model: STEVE, settings: rivals.STEVE) -> None:
        super().__init__(model)
        self.settings = settings
        self.parts = sorted(RATES, key=lambda part: part != ENCODER)  # the first one's rate is logged

    @classmethod
    def of(cls, model: VideoSegmenter, section: Teacher) -> STEVEObjective:
        assert isinstance(model, STEVE)
        return cls(model, section.steve)

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """Of the encoder, the dVAE and the token decoder."""
        return [list(self.model.get_submodule(part).parameters()) for part in self.parts]

    def rate_factors(self, step: int, *, warmup_steps: int, total_steps: int) -> list[float]:
        """The authors' rates, of which the encoder's peak is the run's learning rate."""
        now = rates(step, max(warmup_steps, 1), self.settings.half_life)
        return [now[part] / RATES[ENCODER] for part in self.parts]

    def losses(self, batch: SystemBatch) -> dict[str, Tensor]:
        losses = training_losses(
            self.model,
            self.model.prepare(batch.pixels),
            batch.step,
            noise_seeds=noise_seeds(len(batch.pixels)),
            seed=int(torch.randint(2**62, ())),
            temperature_steps=self.settings.temperature_steps,
        )
        return with_total(losses)
