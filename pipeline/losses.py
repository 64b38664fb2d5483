"""Training losses: SlotMatch's own (Algorithm 1, Eq. 2-3), VideoSAUR's, and what Table 1 compares with.

Pure PyTorch. Shapes: B clips, T frames, N slots, d slot size, P patches, F feature size.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.pixels import resized_grid, send

Matching = Literal["clip", "frame"]


def feature_reconstruction_loss(reconstruction: Tensor, features: Tensor) -> Tensor:
    """Mean squared error over all of `(B, T, P, F)`; no gradient reaches the features."""
    return F.mse_loss(reconstruction, features.detach())


def slot_contrastive_loss(slots: Tensor, temperature: float = 0.1) -> Tensor:
    """Slot-slot contrast of SlotContrast (Manasyan et al. 2025) on slots `(B, T, N, d)`.

    The slots of the whole batch are pooled: each of the T-1 frame pairs has a (BN x BN) matrix of
    cosine similarities, cross-entropy against the identity, softmax over the *earlier* frame's
    slots. Like the reference implementation, and unlike Algorithm 1's formula, other frames are no
    negatives.

    Raises:
        ValueError: fewer than two frames.
    """
    if slots.shape[1] < 2:
        raise ValueError(f"the contrastive loss compares neighbouring frames; got T = {slots.shape[1]}")
    unit_TMD = F.normalize(slots, dim=-1).transpose(0, 1).flatten(1, 2)  # M = B * N
    similarity = unit_TMD[:-1] @ unit_TMD[1:].transpose(1, 2) / temperature  # (T-1, M, M)
    target = torch.arange(similarity.shape[1], device=slots.device).expand(similarity.shape[0], -1)
    return F.cross_entropy(similarity, target)  # class dimension 1: the earlier frame's slots


def temporal_similarity_loss(
    logits_BTPP: Tensor, features_BTPF: Tensor, *, temperature: float, threshold: float
) -> Tensor:
    """VideoSAUR's temporal feature similarity loss (Zadaianchuk et al. 2023, Section 3).

    The target for a patch of frame t is a distribution over the patches of frame t+1: a softmax over
    the cosine similarities divided by `temperature`, in which a similarity below `threshold` gets
    probability 0. It is compared with the softmax of the patch's logits by cross-entropy, averaged over
    B, T-1 and P. The last frame's logits have no target, and the features get no gradient. A patch
    that resembles no patch of the next frame has the uniform target, as in the public implementation.

    logits_BTPP: `SlotModelOutput.similarity`. features_BTPF: the public models take the attention keys
    of the last ViT block (all heads side by side, no CLS token), not the features that are reconstructed.

    Raises:
        ValueError: fewer than two frames, or logits that are not `(B, T, P, P)` for the features.
    """
    expected = (*features_BTPF.shape[:3], features_BTPF.shape[2])
    if tuple(logits_BTPP.shape) != expected:
        raise ValueError(
            f"similarity logits have shape {tuple(logits_BTPP.shape)}, but features of shape "
            f"{tuple(features_BTPF.shape)} need {expected}"
        )
    if expected[1] < 2:
        raise ValueError(f"the temporal similarity loss compares neighbouring frames; got T = {expected[1]}")
    unit_BTPF = F.normalize(features_BTPF.detach(), dim=-1)
    similarity = unit_BTPF[:, :-1] @ unit_BTPF[:, 1:].transpose(2, 3)  # (B, T-1, P, P)
    below = similarity < threshold
    # Where nothing remains, a row of -inf would be nan after the softmax.
    excluded = below & ~below.all(dim=-1, keepdim=True)
    similarity = similarity.masked_fill(below, 0).masked_fill(excluded, -math.inf)
    target = (similarity / temperature).softmax(dim=-1)
    return F.cross_entropy(logits_BTPP[:, :-1].flatten(0, 2), target.flatten(0, 2))


def slot_kd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """SlotMatch's distillation loss, Eq. 2: mean of 1 - cosine, slot n to slot n.

    Both `(B, T, N, d)`; the teacher is a fixed anchor and gets no gradient.

    Raises:
        ValueError: the shapes differ.
    """
    _check_slots(student, teacher)
    return 1 - F.cosine_similarity(student, teacher.detach(), dim=-1).mean()


def slot_mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """SlotMatch (MSE) of Table 1: mean squared difference over B, T, N and d, slot n to slot n.

    Both `(B, T, N, d)`; the teacher gets no gradient. Unlike Eq. 2 it also asks for the teacher's norms.

    Raises:
        ValueError: the shapes differ.
    """
    _check_slots(student, teacher)
    return F.mse_loss(student, teacher.detach())


@torch.no_grad()
def match_slots(student_BTND: Tensor, teacher_BTND: Tensor, *, per: Matching) -> Tensor:
    """The teacher's slot for each of the student's, one to one: indices `(B, T, N)`, int64.

    The assignment with the largest sum of cosine similarities (the Hungarian algorithm, which runs on
    the CPU; the result is on the slots' device). per: "clip" matches the first frame and keeps that for
    the whole clip, "frame" matches each frame anew.

    Raises:
        ValueError: the shapes differ, or another `per`.
    """
    from scipy.optimize import linear_sum_assignment

    _check_slots(student_BTND, teacher_BTND)
    if per not in ("clip", "frame"):
        raise ValueError(f"slots are matched per 'clip' or per 'frame', not {per!r}")
    frames = slice(0, 1) if per == "clip" else slice(None)
    student, teacher = (
        F.normalize(slots[:, frames].float(), dim=-1) for slots in (student_BTND, teacher_BTND)
    )
    # SciPy rejects nan. A diverged student has to reach the loss, whose nan the training step handles.
    similarity_BTNN = torch.nan_to_num(student @ teacher.transpose(2, 3), nan=-1.0)
    matched = [
        torch.from_numpy(linear_sum_assignment(matrix, maximize=True)[1])
        for matrix in similarity_BTNN.flatten(0, 1).cpu().numpy()
    ]
    match_BTN = torch.stack(matched).unflatten(0, similarity_BTNN.shape[:2])
    return send(match_BTN.long(), student_BTND.device).expand(student_BTND.shape[:3])


def hungarian_slot_kd_loss(student: Tensor, teacher: Tensor, *, per: Matching) -> Tensor:
    """Eq. 2 after `match_slots`: the student's slots may come in any order.

    Both `(B, T, N, d)`; the teacher gets no gradient, and nor does the matching.

    Raises:
        ValueError: the shapes differ, or another `per`.
    """
    match_BTN = match_slots(student, teacher, per=per)
    return slot_kd_loss(student, teacher.take_along_dim(match_BTN.unsqueeze(-1), dim=2))


def feature_kd_loss(
    student_BTQF: Tensor,
    teacher_BTPF: Tensor,
    *,
    grids: tuple[tuple[int, int], tuple[int, int]] | None = None,
) -> Tensor:
    """Feature KD of Table 1: mean squared error to the teacher's backbone features.

    student_BTQF: the student's features, already mapped to the teacher's feature size (in the paper by
    a two-layer MLP). grids: rows and columns of the student's patches and of the teacher's; where they
    differ, the student's are resized bilinearly to the teacher's. The teacher gets no gradient.

    Raises:
        ValueError: clips, frames or feature sizes differ, or numbers of patches that are not their grids'.
    """
    shapes = f"student features {tuple(student_BTQF.shape)} and teacher features {tuple(teacher_BTPF.shape)}"
    B, T, P, size = teacher_BTPF.shape
    Q = student_BTQF.shape[2]
    if tuple(student_BTQF.shape) != (B, T, Q, size):
        raise ValueError(f"{shapes} differ in more than the number of patches")
    grid, teacher_grid = grids or ((Q, 1), (Q, 1))
    if (math.prod(grid), math.prod(teacher_grid)) != (Q, P):
        raise ValueError(f"{shapes} need the grids of their patches, which are not {grid} and {teacher_grid}")
    if grid != teacher_grid:
        student_BTQF = resized_grid(student_BTQF.flatten(0, 1), grid, teacher_grid).unflatten(0, (B, T))
    return F.mse_loss(student_BTQF, teacher_BTPF.detach())


def reconstruction_kd_loss(student_reconstruction: Tensor, teacher_reconstruction: Tensor) -> Tensor:
    """Reconstruction KD of Table 1: mean squared error between what the two decoders give.

    Both `(B, T, P, F)`; the teacher gets no gradient.

    Raises:
        ValueError: the shapes differ.
    """
    if student_reconstruction.shape != teacher_reconstruction.shape:
        raise ValueError(
            f"student reconstruction {tuple(student_reconstruction.shape)} and teacher reconstruction "
            f"{tuple(teacher_reconstruction.shape)} differ"
        )
    return F.mse_loss(student_reconstruction, teacher_reconstruction.detach())


def _check_slots(student: Tensor, teacher: Tensor) -> None:
    """Broadcasting would average over pairs that nobody meant."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"student slots {tuple(student.shape)} and teacher slots {tuple(teacher.shape)} differ"
        )
