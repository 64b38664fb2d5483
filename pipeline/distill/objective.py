"""What the trainer knows of an objective, whichever model it trains and for whatever."""

from __future__ import annotations

from typing import Any

from torch import nn

from pipeline.models.segmenter import VideoSegmenter


def learning_rate_factor(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up from 0, then exponential decay to a half at `total_steps`."""
    if step < warmup_steps:
        return step / warmup_steps
    return 0.5 ** ((step - warmup_steps) / max(total_steps - warmup_steps, 1))


class TrainingObjective(nn.Module):
    """A model and what it is trained for: `objective(batch)` gives the scalars `total` and each term of it.

    heads: modules that only training uses, which checkpoints keep and a published model does without. norm_type: which
    norm of the gradient is clipped, as `torch.nn.utils.clip_grad_norm_` takes it. needs_motion, needs_flow: whether its
    batches hold motion segments, and optical flow. needs_boxes: how many boxes of objects they hold for each clip.
    """

    model: VideoSegmenter
    heads: nn.ModuleDict
    norm_type = 2.0
    needs_motion = False
    needs_flow = False
    needs_boxes = 0

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for module in (self.model, self.heads) for p in module.parameters() if p.requires_grad]

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """The trainable parameters, those of one learning rate together."""
        return [self.trainable_parameters()]

    def rate_factors(self, step: int, *, warmup_steps: int, total_steps: int) -> list[float]:
        """What the run's learning rate is multiplied by in a step, for each of the groups."""
        return [learning_rate_factor(step, warmup_steps=warmup_steps, total_steps=total_steps)]

    def after_step(self, step: int) -> None:
        """Called when the weights have been updated in `step`, from 0 on."""

    def measure_bound(self, batch: Any) -> dict[str, float]:
        """Both sides of Theorem 1, of objectives that distil."""
        raise NotImplementedError
