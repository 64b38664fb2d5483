"""The training step: pure PyTorch, callable from a test or a GPU box without Ray."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from pipeline.losses import feature_reconstruction_loss, slot_contrastive_loss, slot_kd_loss
from pipeline.models import SlotModel, SlotModelOutput


@dataclass(frozen=True)
class Batch:
    """What a step learns from: a video or its cached features, and the teacher's slots if any.

    video: normalised `(B, T, 3, S, S)`. backbone_features: `(B, T, P, F)`.
    target_slots: `(B, T, N, d)`. initial_slots: `(B, N, d)` where they are drawn, not learned.
    """

    video: Tensor | None = None
    backbone_features: Tensor | None = None
    target_slots: Tensor | None = None
    initial_slots: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(
            **{k: v.to(device, non_blocking=True) if v is not None else None for k, v in moved.items()}
        )


class DistillationObjective(nn.Module):
    """Eq. 3: rec + alpha * contrast + beta * KD. The one place that composes the loss.

    With beta = 0 it is SlotContrast's own objective, which trains teachers and "no KD" students.

    Raises:
        ValueError: a model whose decoder reconstructs no features, or alpha > 0 for an image model.
    """

    def __init__(self, model: SlotModel, *, alpha: float, beta: float, temperature: float) -> None:
        super().__init__()
        if not model.reconstructs:
            raise ValueError("the model's decoder reconstructs no features, which is what training needs")
        if alpha and model.processor.predictor is None:
            raise ValueError(
                f"alpha = {alpha:g} contrasts neighbouring frames, but the model has no predictor and sees each "
                "frame on its own; use alpha = 0"
            )
        self.model = model
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars `total`, `reconstruction`, and `contrast` and `kd` where they are part of it.

        Raises:
            ValueError: beta > 0 and a batch without target slots.
        """
        output = self.model(
            batch.video, backbone_features=batch.backbone_features, initial_slots=batch.initial_slots
        )
        with torch.autocast(output.slots.device.type, enabled=False):
            return self._losses(output, batch)

    def _losses(self, output: SlotModelOutput, batch: Batch) -> dict[str, Tensor]:
        assert output.reconstruction is not None
        losses = {
            "reconstruction": feature_reconstruction_loss(
                output.reconstruction.float(), output.backbone_features.float()
            )
        }
        total = losses["reconstruction"]
        slots = output.slots.float()
        if self.alpha:
            losses["contrast"] = slot_contrastive_loss(slots, self.temperature)
            total = total + self.alpha * losses["contrast"]
        if self.beta:
            if batch.target_slots is None:
                raise ValueError("beta > 0 needs the teacher's slots")
            losses["kd"] = slot_kd_loss(slots, batch.target_slots)
            total = total + self.beta * losses["kd"]
        return {"total": total, **losses}


def learning_rate_factor(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up from 0, then exponential decay to a half at `total_steps`."""
    if step < warmup_steps:
        return step / warmup_steps
    return 0.5 ** ((step - warmup_steps) / max(total_steps - warmup_steps, 1))


def training_step(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    learning_rate: float,
    gradient_clip: float,
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """One update of the weights; returns the losses and the gradient norm before clipping.

    The weights are left as they were if the gradient is not finite: the caller sees that in
    `gradient_norm`, which is the same on every worker of a DDP group.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device.type
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        losses = objective(batch)
    losses["total"].backward()
    norm = nn.utils.clip_grad_norm_(parameters, gradient_clip)
    if bool(torch.isfinite(norm)):
        optimizer.step()
    names = list(losses)
    values = torch.stack(
        [*(losses[name].detach() for name in names), norm.to(losses["total"].dtype)]
    ).tolist()
    return dict(zip([*names, "gradient_norm"], values, strict=True))
