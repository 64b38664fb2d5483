"""What SAVi is trained for, without boxes or flow: the frames themselves."""

from __future__ import annotations

from torch import Tensor

from pipeline.config.models import Teacher
from pipeline.distill.system_objective import SystemBatch, SystemObjective, noise_seeds, with_total
from pipeline.models.rivals.savi import SAVi
from pipeline.models.rivals.schedules import savi_learning_rate
from pipeline.models.segmenter import VideoSegmenter


class SAViObjective(SystemObjective):
    """Squared error of the pictures, summed over a clip, averaged over clips."""

    model: SAVi

    @classmethod
    def of(cls, model: VideoSegmenter, section: Teacher) -> SAViObjective:
        assert isinstance(model, SAVi)
        return cls(model)

    def rate_factors(self, step: int, *, warmup_steps: int, total_steps: int) -> list[float]:
        """The authors' schedule: up within the run's warm-up, then a cosine to 0."""
        return [savi_learning_rate(step, total_steps, warmup_steps)]

    def losses(self, batch: SystemBatch) -> dict[str, Tensor]:
        seeds = noise_seeds(len(batch.pixels))
        losses = self.model.losses(self.model.prepare(batch.pixels), noise_seeds=seeds)
        return with_total(losses)
