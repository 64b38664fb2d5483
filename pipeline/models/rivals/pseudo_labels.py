"""DIOD's teacher labels: the objects that a teacher's masks show, one by one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CONFIDENCE = 0.9  # mean foreground of what is taken for an object
SMALL = 10  # positions; what is not larger is no object


def pseudo_labels(masks_BTNHW: Tensor, *, confidence: float = CONFIDENCE) -> Tensor:
    """Objects `(B, T, h, w)`, int64, 0 for none, of a teacher's masks, of which the last is the background's.

    Labels begin as the masks' argmax. As published, slot 0's is the background's too; a slot's parts that do not
    touch become objects of their own; and of the labels that a frame then has, the lowest becomes 0.
    """
    masks = masks_BTNHW.detach().flatten(0, 1)
    background = masks.shape[1] - 1
    slots = masks.argmax(1)
    labels = slots.masked_fill(slots == background, 0).cpu().numpy()
    foregrounds = (1 - masks[:, background]).cpu().numpy()
    frames = [
        _ranked(_parted(frame, foreground, masks.shape[1], confidence))
        for frame, foreground in zip(labels, foregrounds, strict=True)
    ]
    found = torch.from_numpy(np.stack(frames)).unflatten(0, masks_BTNHW.shape[:2])
    return found.to(masks_BTNHW.device)


def _parted(
    labels_HW: np.ndarray, foreground_HW: np.ndarray, num_labels: int, confidence: float
) -> np.ndarray:
    """Labels, each part of which but the first becomes none, or one of its own while any is free."""
    from scipy import ndimage

    parted = labels_HW.copy()
    used = set(np.unique(labels_HW).tolist())
    for label in np.unique(labels_HW):
        parts, count = ndimage.label(labels_HW == label)  # 4-neighbours, in the order of their first pixels
        for part in (parts == number for number in range(2, count + 1)):
            if part.sum() <= SMALL or foreground_HW[part].mean() <= confidence:
                parted[part] = 0
                continue
            free = min(set(range(num_labels)) - used, default=None)
            if free is not None:
                used.add(free)
                parted[part] = free
    return parted


def _ranked(labels_HW: np.ndarray) -> np.ndarray:
    """Each label's rank among a frame's, 0 for those of few positions."""
    _, ranks, sizes = np.unique(labels_HW, return_inverse=True, return_counts=True)
    ranks = ranks.reshape(labels_HW.shape)
    return np.where(sizes[ranks] > SMALL, ranks, 0)
