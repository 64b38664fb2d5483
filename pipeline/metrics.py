"""FG-ARI and mBO at image and video level, by counting. Pure PyTorch.

Both scores follow from one table per frame: how many pixels ground-truth object c and slot k share.
A video's table is the sum of its frames' tables. Counting the pixels that belong to objects is two
orders of magnitude cheaper than multiplying one-hot tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LEVELS = ("image", "video")


@dataclass(frozen=True)
class OverlapCounts:
    """Pixel counts of S samples: `shared` `(S, C, K)`, `true_area` `(S, C)`, `slot_area` `(S, K)`."""

    shared: Tensor
    true_area: Tensor
    slot_area: Tensor

    def to_video(self, frames: int) -> OverlapCounts:
        """Sums groups of `frames` consecutive samples: frames become videos."""
        fields = (self.shared, self.true_area, self.slot_area)
        return OverlapCounts(*(x.unflatten(0, (-1, frames)).sum(1) for x in fields))


def count_overlaps(
    true_masks: Tensor, predicted: Tensor, *, ignore_background: bool = False, ignore_overlaps: bool = False
) -> OverlapCounts:
    """Counts for every frame: S = B * T samples.

    Args:
        true_masks: `(B, T, C, H, W)` bool, one channel an object; channels may overlap.
        predicted: `(B, T, H, W)` slot indices, integers >= 0.
        ignore_background: drop channel 0.
        ignore_overlaps: leave pixels in more than one object out, on both sides.

    Raises:
        ValueError: shapes that don't fit each other, or a negative slot index.
    """
    if true_masks.ndim != 5 or predicted.shape != true_masks.shape[:2] + true_masks.shape[3:]:
        raise ValueError(
            f"true_masks {tuple(true_masks.shape)} must be (B, T, C, H, W) and predicted "
            f"{tuple(predicted.shape)} (B, T, H, W) of the same B, T, H, W"
        )
    if predicted.numel() and int(predicted.min()) < 0:
        raise ValueError("predicted has negative slot indices")
    if ignore_background:
        true_masks = true_masks[:, :, 1:]
    B, T, C, H, W = true_masks.shape
    K = int(predicted.max()) + 1 if predicted.numel() else 1
    true_SCX = true_masks.reshape(B * T, C, H * W).bool()
    slots_SX = predicted.reshape(B * T, H * W).long()
    kept_SX = None
    if ignore_overlaps:
        kept_SX = true_SCX.sum(1, dtype=torch.uint8) <= 1
        true_SCX = true_SCX & kept_SX[:, None]

    sample, channel, pixel = true_SCX.nonzero(as_tuple=True)
    cell = (sample * C + channel) * K + slots_SX[sample, pixel]
    shared = torch.bincount(cell, minlength=B * T * C * K).view(B * T, C, K)
    slot_cell = torch.arange(B * T, device=slots_SX.device)[:, None] * K + slots_SX
    if kept_SX is not None:
        slot_cell = slot_cell[kept_SX]
    slot_area = torch.bincount(slot_cell.flatten(), minlength=B * T * K).view(B * T, K)
    # Every pixel has exactly one slot, so an object's area is the sum over its row.
    return OverlapCounts(shared, shared.sum(-1), slot_area)


def count_label_overlaps(true_labels: Tensor, predicted: Tensor, num_objects: int) -> OverlapCounts:
    """The same counts from label maps, for objects that don't overlap: an order of magnitude faster.

    Args:
        true_labels: `(B, T, H, W)` integers, 0 for no object and c + 1 for object c.
        predicted: `(B, T, H, W)` slot indices, integers >= 0.
        num_objects: C of the counts.

    Raises:
        ValueError: shapes that differ, or labels out of range.
    """
    if true_labels.ndim != 4 or predicted.shape != true_labels.shape:
        raise ValueError(
            f"true_labels {tuple(true_labels.shape)} and predicted {tuple(predicted.shape)} must both be "
            "(B, T, H, W)"
        )
    true_SX = true_labels.flatten(2).flatten(0, 1).cpu().numpy()
    slots_SX = predicted.flatten(2).flatten(0, 1).cpu().numpy()
    K = int(slots_SX.max(initial=0)) + 1
    if min(true_SX.min(initial=0), slots_SX.min(initial=0)) < 0 or true_SX.max(initial=0) > num_objects:
        raise ValueError(f"labels must be 0 to {num_objects}, and slot indices not negative")
    cells = (num_objects + 1) * K
    # Small integers and one sample at a time stay in the processor's cache.
    kind = np.uint16 if cells <= 2**16 else np.int64
    counts = np.empty((len(true_SX), cells), np.int64)
    for sample, (true_X, slots_X) in enumerate(zip(true_SX, slots_SX, strict=True)):
        counts[sample] = np.bincount(true_X.astype(kind) * kind(K) + slots_X, minlength=cells)
    table = torch.from_numpy(counts).view(-1, num_objects + 1, K)
    shared = table[:, 1:]
    return OverlapCounts(shared, shared.sum(2), table.sum(1))


def ari_per_sample(counts: OverlapCounts) -> tuple[Tensor, Tensor]:
    """FG-ARI `(S,)` in float64 and which samples have an object at all, `(S,)` bool.

    Adjusted Rand index (Hubert & Arabie 1985) over the pixels of ground-truth objects; 1 where its
    denominator is 0.
    """
    table = counts.shared.double()
    rows, columns = table.sum(2), table.sum(1)
    total = rows.sum(1)
    index = (table * (table - 1)).sum((1, 2))
    row_pairs, column_pairs = (rows * (rows - 1)).sum(1), (columns * (columns - 1)).sum(1)
    expected = row_pairs * column_pairs / (total * (total - 1)).clamp(min=1)
    denominator = (row_pairs + column_pairs) / 2 - expected
    perfect = denominator == 0
    ari = (index - expected) / torch.where(perfect, 1.0, denominator)
    return torch.where(perfect, 1.0, ari), total > 0


def best_overlap_per_sample(counts: OverlapCounts) -> tuple[Tensor, Tensor]:
    """Mean over a sample's objects of the best IoU with any slot, `(S,)`, and which have objects."""
    shared = counts.shared.double()
    union = counts.true_area[:, :, None] + counts.slot_area[:, None] - counts.shared
    best = (shared / union.clamp(min=1)).amax(2)
    present = counts.true_area > 0
    objects = present.sum(1)
    return (best * present).sum(1) / objects.clamp(min=1), objects > 0


def _mean_score(per_sample, true_masks, predicted, level, **flags) -> float:  # type: ignore[no-untyped-def]
    if level not in LEVELS:
        raise ValueError(f"level must be one of {LEVELS}, not {level!r}")
    counts = count_overlaps(true_masks, predicted, **flags)
    if level == "video":
        counts = counts.to_video(true_masks.shape[1])
    scores, valid = per_sample(counts)
    return float(scores[valid].mean()) if bool(valid.any()) else float("nan")


def fg_ari(
    true_masks: Tensor,
    predicted: Tensor,
    *,
    level: str,
    ignore_background: bool = False,
    ignore_overlaps: bool = False,
) -> float:
    """Foreground adjusted Rand index, the mean over the samples that have an object.

    A sample is a frame (`level="image"`) or a whole clip (`level="video"`). Arguments and errors as
    in `count_overlaps`. NaN if no sample has an object.
    """
    flags = {"ignore_background": ignore_background, "ignore_overlaps": ignore_overlaps}
    return _mean_score(ari_per_sample, true_masks, predicted, level, **flags)


def mean_best_overlap(
    true_masks: Tensor,
    predicted: Tensor,
    *,
    level: str,
    ignore_background: bool = False,
    ignore_overlaps: bool = False,
) -> float:
    """Mean best overlap (mBO), the mean over the samples that have an object; else as `fg_ari`."""
    flags = {"ignore_background": ignore_background, "ignore_overlaps": ignore_overlaps}
    return _mean_score(best_overlap_per_sample, true_masks, predicted, level, **flags)
