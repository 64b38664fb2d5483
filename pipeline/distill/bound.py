"""Theorem 1 in practice: how far the teacher's decoder can carry a distance between slots.

The theorem bounds the reconstruction distance of two sets of slots by their cosine distance. Here both
sides are measured, with an estimate of the decoder's Lipschitz constant. Pure PyTorch.

Shapes: B clips, T frames, N slots, d slot size, P patches, F feature size, M frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.losses import slot_kd_loss
from pipeline.models.decoders import untiled

_DECODED_AT_ONCE = 8  # frames; an MLP decoder holds N * P hidden vectors for each


@dataclass(frozen=True)
class ReconstructionBound:
    """Both sides of Theorem 1, `||f(S_T) - f(S_S)||^2 <= K c`, for a decoder f and a batch of slots.

    f maps the N slots of a frame *jointly* (a softmax mixes them), so K_f is that of a map from R^(N d)
    and the slot distances of a frame are summed over its slots:

        sum_n ||s_n^T - s_n^S||^2 = sum_n [2 r_n^T r_n^S c_n + (r_n^T - r_n^S)^2]

    The theorem assumes equal norms, r_n^T = r_n^S = r, and so has only the first term: K = 2 K_f^2 r^2.
    Where the norms differ, r^2 is taken as r_n^T r_n^S, slot by slot; `bound` is then no bound, and
    `bound_any_norm`, which keeps the second term, is.

    measured: mean over the frames of the squared norm of the difference, summed over P and F.
    measured_mse: the same as a mean over P and F, which is what reconstruction KD trains.
    cosine_distance: mean c_n (Eq. 4). teacher_norm, student_norm: mean slot norms.
    lipschitz: the estimate of K_f, see `reconstruction_bound`.
    bound, bound_any_norm: right-hand sides, in the unit of `measured`.
    ratio, ratio_any_norm: bound / measured, how loose it is; nan where both are 0 (identical slots).
    """

    measured: float
    measured_mse: float
    cosine_distance: float
    teacher_norm: float
    student_norm: float
    lipschitz: float
    bound: float
    bound_any_norm: float
    ratio: float
    ratio_any_norm: float


def reconstruction_bound(
    decoder: nn.Module,
    teacher_BTND: Tensor,
    student_BTND: Tensor,
    *,
    feature_size: int | None = None,
    frames: int = 4,
    points: int = 3,
    iterations: int = 8,
    seed: int = 0,
) -> ReconstructionBound:
    """Measures the reconstruction distance of teacher and student slots and bounds it by Theorem 1.

    K_f is estimated as the largest spectral norm of the decoder's Jacobian at `points` places, evenly
    spaced with both ends among them, on the segments from S_T to S_S: by the mean value theorem it is
    the supremum over a segment that bounds the distance of its ends. Only the `frames` frames whose
    slots are furthest apart are looked at, and power iteration stops after `iterations`. So it is
    an estimate *from below*, of the constant on these segments and all the more of the global one; a
    `ratio_any_norm` below 1 says that it is too low. Everything else is taken over all frames.
    It costs about `4 * frames * points * iterations` times one frame's decoding.

    decoder: the frozen teacher's, slots `(M, N, d)` -> (outputs `(M, P, C)`, masks), in float32; each
    frame on its own. feature_size: the F of the C channels, the first ones, that reconstruct features;
    None for all. The slots' gradients and torch's random state are left alone.

    Raises:
        ValueError: the shapes of the slots differ, or a count or a feature size that makes no sense.
    """
    if min(frames, points, iterations) < 1:
        raise ValueError(
            f"frames, points and iterations must be at least 1, not {frames}, {points} and {iterations}"
        )
    decode = _feature_decoder(decoder, feature_size)
    # In inference mode there are no Jacobians; fused attention kernels have no forward derivative.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(teacher_BTND.device.type, enabled=False),
        sdpa_kernel(SDPBackend.MATH),
    ):
        slots = _SlotDistances.of(teacher_BTND, student_BTND)
        pairs = [s.detach().clone().float().flatten(0, 1) for s in (teacher_BTND, student_BTND)]
        measured, elements = _decoded_distance(decode, *pairs)
        furthest = slots.any_norm_M.topk(min(frames, slots.any_norm_M.numel())).indices.tolist()
        segments = [_segment(pairs[0][m], pairs[1][m], points) for m in furthest]
        lipschitz = max(_spectral_norm(decode, s, iterations=iterations, seed=seed) for s in segments)
    bound = lipschitz**2 * slots.equal_norm_M.mean().item()
    bound_any_norm = lipschitz**2 * slots.any_norm_M.mean().item()
    return ReconstructionBound(
        measured=measured,
        measured_mse=measured / elements,
        cosine_distance=slots.cosine,
        teacher_norm=slots.teacher_norm,
        student_norm=slots.student_norm,
        lipschitz=lipschitz,
        bound=bound,
        bound_any_norm=bound_any_norm,
        ratio=_ratio(bound, measured),
        ratio_any_norm=_ratio(bound_any_norm, measured),
    )


@dataclass(frozen=True)
class _SlotDistances:
    """How far apart two sets of slots are; `*_M` hold squared distances, summed over a frame's slots.

    any_norm_M: as they are. equal_norm_M: without what only a difference of norms adds, as the theorem has them.
    """

    cosine: float
    teacher_norm: float
    student_norm: float
    any_norm_M: Tensor
    equal_norm_M: Tensor

    @classmethod
    def of(cls, teacher_BTND: Tensor, student_BTND: Tensor) -> _SlotDistances:
        # In float64 on the CPU (not every device has that): they are few, and close slots cancel.
        teacher, student = (s.detach().clone().cpu().double() for s in (teacher_BTND, student_BTND))
        norms_T, norms_S = teacher.norm(dim=-1), student.norm(dim=-1)
        any_norm_BT = (teacher - student).square().sum(dim=(2, 3))
        equal_norm_BT = (any_norm_BT - (norms_T - norms_S).square().sum(dim=2)).clamp_min(0)
        return cls(
            cosine=max(slot_kd_loss(student, teacher).item(), 0.0),  # rounding can go below
            teacher_norm=norms_T.mean().item(),
            student_norm=norms_S.mean().item(),
            any_norm_M=any_norm_BT.flatten(),
            equal_norm_M=equal_norm_BT.flatten(),
        )


def _feature_decoder(decoder: nn.Module, feature_size: int | None) -> Callable[[Tensor], Tensor]:
    """Slots `(M, N, d)` to what the decoder makes of them `(M, P, F)`: the first `feature_size` channels, or all."""

    def decode(slots_MND: Tensor) -> Tensor:
        with untiled(decoder):  # tiles have no forward derivative
            outputs = decoder(slots_MND)[0]
        if feature_size is not None and not 1 <= feature_size <= outputs.shape[-1]:
            raise ValueError(
                f"feature_size {feature_size} is not of the decoder's {outputs.shape[-1]} channels"
            )
        return outputs[..., :feature_size]

    return decode


def _decoded_distance(
    decode: Callable[[Tensor], Tensor], teacher_MND: Tensor, student_MND: Tensor
) -> tuple[float, int]:
    """The squared distance of two reconstructions, as a mean over the frames, and how many numbers each has."""
    errors, elements = [], 1
    parts = zip(teacher_MND.split(_DECODED_AT_ONCE), student_MND.split(_DECODED_AT_ONCE), strict=True)
    for teacher, student in parts:
        difference_MPF = decode(teacher) - decode(student)
        elements = difference_MPF[0].numel()
        errors.append(difference_MPF.square().sum(dim=(1, 2)))
    return torch.cat(errors).mean().item(), elements


def _segment(start_ND: Tensor, end_ND: Tensor, points: int) -> Tensor:
    """`points` places `(points, N, d)` from start to end, both included; the middle for a single one."""
    weights = torch.linspace(0, 1, points) if points > 1 else torch.tensor([0.5])
    return torch.lerp(start_ND, end_ND, weights.to(start_ND).view(-1, 1, 1))


def _spectral_norm(
    function: Callable[[Tensor], Tensor], points_MND: Tensor, *, iterations: int, seed: int
) -> float:
    """The largest singular value of the Jacobian of any of M independent points, from below.

    Power iteration on J^T J for all points at once: `function` maps each on its own, so that the
    Jacobian of them all is block diagonal.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(points_MND.shape, generator=generator).to(points_MND)
    pull_back = torch.func.vjp(function, points_MND)[1]
    largest = torch.zeros(len(points_MND), device=points_MND.device)
    for _ in range(iterations):
        pushed = torch.func.jvp(function, (points_MND,), (_unit(direction),))[1]
        (direction,) = pull_back(_unit(pushed))
        # ||J^T u|| of a unit vector u never exceeds the norm, and grows from one round to the next.
        largest = direction.flatten(1).norm(dim=1)
    return largest.max().item()


def _unit(x: Tensor) -> Tensor:
    """Each item `(M, ...)` divided by its norm; zero stays zero."""
    norms = x.flatten(1).norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
    return x / norms.view(-1, 1, 1)


def _ratio(bound: float, measured: float) -> float:
    if measured == 0:
        return math.inf if bound > 0 else math.nan
    return bound / measured
