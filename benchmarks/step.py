"""The distillation step at the paper's MOVi-E config, four ways.

Measured: one `training_step` (forward, backward, gradient clip, Adam) from tensors that are on the
device already, on random weights, for batch 1 of 4 frames. Each way trains its own copy of the same
student on the same batch. Not measured: reading and decoding clips or targets, moving them to the
device, and the one pass of the teacher that fills the cache (see `stages.cache_comparison`).

On a GPU every way runs under bf16 autocast, the live teacher too; on a CPU in fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.report import Comparison, Row, interleaved
from pipeline.distill.step import Batch, Objective, Terms, training_step
from pipeline.losses import feature_reconstruction_loss, slot_contrastive_loss, slot_kd_loss
from pipeline.models import BackboneConfig, SlotModel, SlotModelConfig
from pipeline.models.slot_model import FIRST_FRAME_ITERATIONS, NEXT_FRAME_ITERATIONS

FRAMES = 4
VIT_B = BackboneConfig("vit_base_patch14_dinov2", 336)
VIT_S = BackboneConfig("vit_small_patch14_dinov2", 336)
ALPHA, BETA, TEMPERATURE = 1.0, 0.2, 0.1
LEARNING_RATE, GRADIENT_CLIP = 4e-4, 0.05
# The first step's results may differ by rounding alone; under bf16 a cached fp32 tensor meets one that
# was computed in bf16.
TOLERANCE = {None: 1e-5, torch.bfloat16: 1e-2}


class LossMismatch(RuntimeError):
    """Two ways of doing the same step that do not give the same loss: their times mean nothing."""


@dataclass(frozen=True)
class Sizes:
    """The architecture that is measured; the defaults are the paper's MOVi-E models (Table 8)."""

    teacher: BackboneConfig = VIT_B
    student: BackboneConfig = VIT_S
    num_slots: int = 15
    slot_size: int = 128
    hidden_sizes: tuple[int, ...] = (1024, 1024, 1024)

    def model(self, backbone: BackboneConfig) -> SlotModel:
        config = SlotModelConfig(
            backbone, self.num_slots, self.slot_size, decoder_hidden_sizes=self.hidden_sizes
        )
        return SlotModel(config)


def tiny_sizes() -> Sizes:
    """For the smoke test."""
    vit = {"patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3}
    backbone = BackboneConfig(None, 56, vit)
    return Sizes(teacher=backbone, student=backbone, num_slots=3, slot_size=16, hidden_sizes=(32, 32, 32))


class Algorithm1(nn.Module):
    """The paper's Algorithm 1 line by line: every video, every frame, teacher and student in turn."""

    def __init__(self, teacher: SlotModel, student: SlotModel) -> None:
        super().__init__()
        self.teacher, self.student = teacher, student

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.video is not None
        videos = [self._video(video) for video in batch.video]
        teacher_slots, slots, features, reconstruction = map(torch.stack, zip(*videos, strict=True))
        losses = {
            "reconstruction": feature_reconstruction_loss(reconstruction.float(), features.float()),
            "contrast": slot_contrastive_loss(slots.float(), TEMPERATURE),
            "slot_kd": slot_kd_loss(slots.float(), teacher_slots.float()),
        }
        return {
            "total": losses["reconstruction"] + ALPHA * losses["contrast"] + BETA * losses["slot_kd"],
            **losses,
        }

    def _video(self, video_TCHW: Tensor) -> tuple[Tensor, ...]:
        teacher_state, state = self.teacher.initial_slots(1), self.student.initial_slots(1)
        frames = []
        for t, frame in enumerate(video_TCHW):
            with torch.no_grad():
                _, teacher_slots, teacher_state = _encode(self.teacher, frame, teacher_state, t)
            features, slots, state = _encode(self.student, frame, state, t)
            reconstruction, _ = self.student.decoder(slots)
            frames.append((teacher_slots[0], slots[0], features[0], reconstruction[0]))
        return tuple(map(torch.stack, zip(*frames, strict=True)))


def _encode(model: SlotModel, frame_CHW: Tensor, state_BND: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """One frame's features and slots, and the state that starts the next frame."""
    features = model.encoder.backbone(frame_CHW[None])
    iterations = NEXT_FRAME_ITERATIONS if t else FIRST_FRAME_ITERATIONS
    slots, _ = model.processor.corrector(state_BND, model.encoder.output_transform(features), iterations)
    assert model.processor.predictor is not None
    return features, slots, model.processor.predictor(slots)


def step_comparison(sizes: Sizes, repeats: int) -> Comparison:
    """Times the four ways, interleaved, after one warm-up each.

    Raises:
        LossMismatch: the warm-up step's losses or gradient norms differ by more than rounding.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autocast = torch.bfloat16 if device.type == "cuda" else None
    torch.manual_seed(0)
    teacher = sizes.model(sizes.teacher).to(device).eval().requires_grad_(False)
    student = sizes.model(sizes.student).to(device)
    student.initializer.load_state_dict(teacher.initializer.state_dict())
    video = torch.randn(1, FRAMES, 3, student.image_size, student.image_size, device=device)
    with torch.no_grad():
        target_slots = teacher.roll_out(teacher.backbone_features(video))[0]
        features = student.backbone_features(video)

    from_slots = Batch(video=video, target_slots=target_slots)
    from_both = Batch(backbone_features=features, target_slots=target_slots)
    ways = {
        "(a) teacher live, Algorithm 1 as written": (Batch(video=video), False, teacher),
        "(b) cached slots": (from_slots, False, None),
        "(c) cached slots and student features": (from_both, False, None),
        "(d) as (c), with the exact fast decoder": (from_both, True, None),
    }
    steps = [_step(student, *way, autocast=autocast) for way in ways.values()]
    warm_up = [step() for step in steps]
    note = _compare(dict(zip(ways, warm_up, strict=True)), TOLERANCE[autocast])
    seconds = interleaved(steps, repeats)
    rows = [Row(name, times, FRAMES, "frames") for name, times in zip(ways, seconds, strict=True)]
    return Comparison(f"training step, {device.type}, {'bf16' if autocast else 'fp32'}", rows, [note])


def _step(
    student: SlotModel,
    batch: Batch,
    fast_decoder: bool,
    teacher: SlotModel | None,
    *,
    autocast: torch.dtype | None,
) -> Callable[[], dict[str, float]]:
    """One way's step on its own copy of the student; it returns when the device has finished."""
    student = copy.deepcopy(student).train()
    student.decoder.fast = fast_decoder
    objective: nn.Module = Objective(student, Terms(alpha=ALPHA, slot_kd=BETA, temperature=TEMPERATURE))
    if teacher is not None:
        objective = Algorithm1(teacher, student)
    optimizer = torch.optim.Adam(student.trainable_parameters(), lr=LEARNING_RATE)

    def step() -> dict[str, float]:
        losses = training_step(
            objective,
            optimizer,
            batch,
            learning_rate=LEARNING_RATE,
            gradient_clip=GRADIENT_CLIP,
            autocast=autocast,
        )
        if student.device.type == "cuda":
            torch.cuda.synchronize()
        return losses

    return step


def _compare(results: dict[str, dict[str, float]], tolerance: float) -> str:
    """Holds the first step's loss, and the gradient's norm, against the baseline's."""
    reference, *others = results.values()
    worst = max(
        abs(other[key] - reference[key]) / reference[key]
        for other in others
        for key in ("total", "gradient_norm")
    )
    shown = ", ".join(f"{name[:3]} {values['total']:.8g}" for name, values in results.items())
    if not worst <= tolerance:
        raise LossMismatch(
            f"the same step's results differ by {worst:.2g} (tolerance {tolerance:g}): {shown}"
        )
    return f"first step's loss and gradient norm agree to {worst:.1g} (tolerance {tolerance:g}): {shown}"
