"""What DIOD is trained for: what moves in a clip, and later what a running average of the model makes of that.

Shapes: B clips, T frames, H x W the input.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import rivals
from pipeline.config.models import Teacher
from pipeline.distill.system_objective import SystemBatch, SystemObjective
from pipeline.models._timm import import_timm
from pipeline.models.rivals.diod import DIOD
from pipeline.models.rivals.diod_losses import diod_losses, follow
from pipeline.models.rivals.schedules import diod_learning_rate
from pipeline.models.segmenter import VideoSegmenter


class DIODObjective(SystemObjective):
    """A burn-in from motion segments, then distillation from a running average of the model, which is one of the heads.

    The average begins as the model that the burn-in ends with.
    """

    model: DIOD
    needs_motion = True

    def __init__(self, model: DIOD, settings: rivals.DIOD, steps: int) -> None:
        super().__init__(model)
        self.settings = settings
        self.burn_in = round(settings.burn_in * steps)
        self.heads["average"] = copy.deepcopy(model).requires_grad_(False)

    @classmethod
    def of(cls, model: VideoSegmenter, section: Teacher) -> DIODObjective:
        assert isinstance(model, DIOD)
        return cls(model, section.diod, section.train.steps)

    @property
    def average(self) -> DIOD:
        average = self.heads["average"]
        assert isinstance(average, DIOD)
        return average

    def rate_factors(self, step: int, *, warmup_steps: int, total_steps: int) -> list[float]:
        """The authors' schedule, over the run's warm-up."""
        return [diod_learning_rate(step + 1, warmup_steps, self.settings.half_life)]

    def after_step(self, step: int) -> None:
        if step + 1 >= self.burn_in:
            follow(self.average, self.model, self.settings.teacher_decay if step + 1 > self.burn_in else 0.0)

    def losses(self, batch: SystemBatch) -> dict[str, Tensor]:
        """Those of `diod_losses`, and `moving`, the share of pixels that have a motion segment."""
        assert batch.motion is not None
        motion = self.segments(batch.motion)
        losses = partial(diod_losses, self.model, motion=motion, confidence=self.settings.confidence)
        video = self.model.prepare(batch.pixels)
        moving = {"moving": (motion > 0).float().mean()}
        if batch.step < self.burn_in:
            return losses(video) | moving
        own = (
            self.model.prepare([recoloured(clip) for clip in batch.pixels])
            if self.settings.colours
            else video
        )
        return losses(own, teacher=self.average, teacher_video=video) | moving

    def segments(self, motion: list[Tensor]) -> Tensor:
        """Motion segments at the input's size, `(B, T, H, W)`, without the small ones."""
        size = self.model.input_size
        labels = torch.stack(
            [F.interpolate(clip[None].float(), size, mode="nearest-exact")[0].long() for clip in motion]
        )
        frames = torch.arange(labels.shape[0] * labels.shape[1], device=labels.device).view(
            *labels.shape[:2], 1, 1
        )
        numbers = labels + (int(labels.max()) + 1) * frames  # of all frames' labels
        return labels * (numbers.flatten().bincount()[numbers] > self.settings.smallest_segment)


def recoloured(clip: Tensor) -> Tensor:
    """A clip `(T, h, w, 3)` uint8 in other colours, drawn anew, the same for all its frames."""
    import_timm()  # torchvision has to be loaded as there
    from torchvision.transforms import v2

    change = v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomSolarize(128, p=0.2),
        ]
    )
    return change(clip.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
