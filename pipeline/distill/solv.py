"""What SOLV is trained for: the frozen features of the middle frame of a window, from some of the tokens of its frames.

Shapes: B clips, T frames, W frames of a window, P patches, K tokens that are kept of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.config import rivals
from pipeline.config.models import Teacher
from pipeline.distill.system_objective import SystemBatch, SystemObjective
from pipeline.losses import feature_reconstruction_loss
from pipeline.models.rivals.schedules import drawn_tokens, merge_probability, solv_learning_rate
from pipeline.models.rivals.solv import SOLV
from pipeline.models.segmenter import VideoSegmenter


class SOLVObjective(SystemObjective):
    """Mean squared error of the middle frame's features, and nothing else.

    Of each clip one frame is drawn to be the middle one; what of its window lies outside of the clip is absent, as
    before a video's first frame.
    """

    model: SOLV

    def __init__(self, model: SOLV, settings: rivals.SOLV, steps: int) -> None:
        super().__init__(model)
        self.settings, self.steps = settings, steps

    @classmethod
    def of(cls, model: VideoSegmenter, section: Teacher) -> SOLVObjective:
        assert isinstance(model, SOLV)
        return cls(model, section.solv, section.train.steps)

    def rate_factors(self, step: int, *, warmup_steps: int, total_steps: int) -> list[float]:
        """The authors' schedule, whatever the run's warm-up."""
        return [solv_learning_rate(step, total_steps)]

    def merging(self, step: int) -> float:
        """With which probability a clip's slots are merged in a step."""
        epochs = self.settings.merging_epochs
        return merge_probability(min(step * epochs // self.steps, epochs - 1), epochs)

    def losses(self, batch: SystemBatch) -> dict[str, Tensor]:
        frames, present = self.windows(batch.pixels)
        B, W = present.shape
        patches = self.model.backbone.num_patches
        seed = int(torch.randint(2**62, ()))
        tokens = drawn_tokens(B * W, patches, seed, self.settings.token_share)
        output = self.model.middle_frame(
            frames,
            present,
            tokens.to(frames.device),
            merge_B=torch.rand(B) < self.merging(batch.step),
            as_published=self.settings.published_places,
        )
        assert output.reconstruction is not None
        loss = feature_reconstruction_loss(output.reconstruction.float(), output.backbone_features.float())
        return {"total": loss, "reconstruction": loss, "slots_left": output.slot_nums.float().mean()}

    def windows(self, pixels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Normalised frames `(B, W, 3, H, W')` around one of each clip, and which of them are there, `(B, W)`."""
        half = self.model.config.half_window
        around = torch.arange(-half, half + 1)
        places = [torch.randint(len(clip), (1,)) + around for clip in pixels]
        present = torch.stack([(p >= 0) & (p < len(clip)) for p, clip in zip(places, pixels, strict=True)])
        frames = self.model.prepare(
            [clip[p.clamp(0, len(clip) - 1).to(clip.device)] for p, clip in zip(places, pixels, strict=True)]
        )
        present = present.to(frames.device)
        return frames * present[..., None, None, None], present
