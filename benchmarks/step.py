"""The distillation step at the paper's configs, four ways, in each precision, and the time of its products alone.

Measured: one `training_step` (forward, backward, gradient clip, Adam) from tensors that are on the
device already, on random weights, for batch 1 of 4 frames (16 on a GPU). Each way trains its own copy of the same
student on the same batch. Not measured: reading and decoding clips or targets, moving them to the
device, and the one pass of the teacher that fills the cache (see `stages.cache_comparison`).

The products are those matrix products that the last way's step calls with its decoder untiled, of the same shapes,
strides and types, one after the other without autograd: the limit for a step that computes what it must.

"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.report import Comparison, Row, interleaved
from pipeline.distill.precision import choose_precision, has_bf16, speedup_of_bf16
from pipeline.distill.step import Batch, Objective, Terms, adam, read_values, training_step
from pipeline.losses import feature_reconstruction_loss, slot_contrastive_loss, slot_kd_loss
from pipeline.models import BackboneConfig, SlotModel, SlotModelConfig
from pipeline.models.decoders import untiled
from pipeline.models.slot_model import FIRST_FRAME_ITERATIONS, NEXT_FRAME_ITERATIONS

FRAMES = 4
ALPHA, BETA, TEMPERATURE = 1.0, 0.2, 0.1
LEARNING_RATE, GRADIENT_CLIP = 4e-4, 0.05
# The first step's results may differ by rounding alone; under bf16 a cached fp32 tensor meets one that
# was computed in bf16.
TOLERANCE = {None: 1e-5, torch.bfloat16: 1e-2}


class LossMismatch(RuntimeError):
    """Two ways of doing the same step that do not give the same loss: their times mean nothing."""


@dataclass(frozen=True)
class Sizes:
    """The architecture that is measured, as in Table 8."""

    name: str
    teacher: BackboneConfig
    student: BackboneConfig
    num_slots: int
    slot_size: int
    hidden_sizes: tuple[int, ...] = (1024, 1024, 1024)

    def model(self, backbone: BackboneConfig) -> SlotModel:
        config = SlotModelConfig(
            backbone, self.num_slots, self.slot_size, decoder_hidden_sizes=self.hidden_sizes
        )
        return SlotModel(config)


def _of_paper(name: str, side: int, num_slots: int, slot_size: int) -> Sizes:
    teacher, student = (BackboneConfig(f"vit_{size}_patch14_dinov2", side) for size in ("base", "small"))
    return Sizes(name, teacher, student, num_slots, slot_size)


def paper_sizes() -> list[Sizes]:
    return [_of_paper("MOVi-E 336²", 336, 15, 128), _of_paper("YTVIS 518²", 518, 7, 64)]


def tiny_sizes() -> Sizes:
    """For the smoke test."""
    vit = {"patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3}
    backbone = BackboneConfig(None, 56, vit)
    return Sizes(
        "tiny", teacher=backbone, student=backbone, num_slots=3, slot_size=16, hidden_sizes=(32, 32, 32)
    )


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
    """Times the four ways and the last one's products in each precision, interleaved, after one warm-up each.

    Raises:
        LossMismatch: the warm-up step's losses or gradient norms differ by more than rounding.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    teacher = sizes.model(sizes.teacher).to(device).eval().requires_grad_(False)
    student = sizes.model(sizes.student).to(device)
    student.initializer.load_state_dict(teacher.initializer.state_dict())
    batch_size = 16 if device.type == "cuda" else 1
    video = torch.randn(batch_size, FRAMES, 3, student.image_size, student.image_size, device=device)
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
    runs: dict[str, Callable[[], object]] = {}
    notes = [f"precision: auto is {choose_precision('auto', device)} here"]
    if device.type == "cpu" and has_bf16():
        notes[0] += f", as products in bf16 are {speedup_of_bf16():.2f} times as fast as in fp32"
    for precision, autocast in _precisions(device).items():
        steps = {
            f"{name}, {precision}": _step(student, *way, autocast=autocast) for name, way in ways.items()
        }
        notes.append(_compare({name: step() for name, step in steps.items()}, TOLERANCE[autocast]))
        runs |= steps
        with untiled(student):
            recorded = _Products()
            with recorded:
                _step(student, *ways["(d) as (c), with the exact fast decoder"], autocast=autocast)()
        runs[f"the products of (d) alone, {precision}"] = recorded.replay
        recorded.replay()
    seconds = interleaved(list(runs.values()), repeats)
    work = FRAMES * batch_size
    rows = [Row(name, times, work, "frames") for name, times in zip(runs, seconds, strict=True)]
    notes += _limits(rows)
    return Comparison(f"training step, {sizes.name}, batch {batch_size}, {device.type}", rows, notes)


def _precisions(device: torch.device) -> dict[str, torch.dtype | None]:
    """Those that the device has, fp32 first."""
    found: dict[str, torch.dtype | None] = {"fp32": None}
    if device.type == "cuda" or has_bf16():
        found["bf16"] = torch.bfloat16
    return found


def _limits(rows: list[Row]) -> list[str]:
    """What each precision's last way takes, against its products and Algorithm 1."""
    medians = {row.name: row.median for row in rows}
    notes = []
    for name, best in medians.items():
        if name.startswith("(d)"):
            precision = name.rpartition(", ")[2]
            reference = medians[f"(a) teacher live, Algorithm 1 as written, {precision}"]
            limit = medians[f"the products of (d) alone, {precision}"]
            notes.append(
                f"{precision}: (d) is {reference / best:.2f} times as fast as Algorithm 1 in {precision}, and takes "
                f"{best / limit:.2f} times the time of its products"
            )
    return notes


class _Products(TorchDispatchMode):
    """Records the matrix products that are computed in its block, to compute as many again."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self._made: dict[Any, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            like = tuple(self._like(one) for one in args)
            self._calls.append((func, like, {key: self._like(one) for key, one in kwargs.items()}))
        return func(*args, **kwargs)

    def _like(self, value: Any) -> Any:
        """Another tensor of the same shape, strides and type, one for all of them."""
        if not isinstance(value, Tensor):
            return value
        key = (value.shape, value.stride(), value.dtype)
        if key not in self._made:
            made = torch.empty_strided(*key[:2], dtype=value.dtype, device=value.device)
            self._made[key] = made.normal_()
        return self._made[key]

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs in self._calls:
            func(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()


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
    optimizer = adam(student.trainable_parameters(), LEARNING_RATE, student.device)

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
        return read_values(losses)

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
