"""Training losses (SlotMatch, Algorithm 1 and Eq. 2-3). Pure PyTorch.

Shapes: B clips, T frames, N slots, d slot size, P patches, F feature size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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


def slot_kd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """SlotMatch's distillation loss, Eq. 2: mean of 1 - cosine, slot n to slot n.

    Both `(B, T, N, d)`; the teacher is a fixed anchor and gets no gradient.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student slots {tuple(student.shape)} and teacher slots {tuple(teacher.shape)} differ"
        )
    return 1 - F.cosine_similarity(student, teacher.detach(), dim=-1).mean()
