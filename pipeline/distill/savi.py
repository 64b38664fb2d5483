"""What SAVi is trained for: the frames themselves or, as published, optical flow as pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.models import Teacher
from pipeline.distill.system_objective import SystemBatch, SystemObjective, noise_seeds, with_total
from pipeline.models.rivals.savi import SAVi
from pipeline.models.rivals.schedules import savi_learning_rate
from pipeline.models.segmenter import VideoSegmenter


class SAViObjective(SystemObjective):
    """Squared error of the pictures, summed over a clip, averaged over clips."""

    model: SAVi

    def __init__(self, model: SAVi) -> None:
        super().__init__(model)
        self.needs_flow = model.config.target == "flow"
        self.needs_boxes = model.start_boxes

    @classmethod
    def of(cls, model: VideoSegmenter, section: Teacher) -> SAViObjective:
        assert isinstance(model, SAVi)
        return cls(model)

    def rate_factors(self, step: int, *, warmup_steps: int, total_steps: int) -> list[float]:
        """The authors' schedule: up within the run's warm-up, then a cosine to 0."""
        return [savi_learning_rate(step, total_steps, warmup_steps)]

    def losses(self, batch: SystemBatch) -> dict[str, Tensor]:
        seeds = noise_seeds(len(batch.pixels))
        flow = None if batch.flow is None else self.flow(batch.flow)
        video = self.model.prepare(batch.pixels)
        return with_total(self.model.losses(video, flow=flow, boxes=batch.boxes, noise_seeds=seeds))

    def flow(self, clips: list[Tensor]) -> Tensor:
        """Flow in pixels of the input and at its size, `(B, T, 2, H, W)`; channels stay as they are, as published."""
        size = self.model.input_size
        resized = []
        for clip in clips:
            scale = clip.new_tensor([new / old for new, old in zip(size, clip.shape[1:3], strict=True)])
            flow = (clip * scale).permute(0, 3, 1, 2)
            resized.append(F.interpolate(flow, size, mode="bilinear", antialias=True))
        return torch.stack(resized)
