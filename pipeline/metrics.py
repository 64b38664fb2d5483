"""FG-ARI and mBO at image and video level, by counting. No Ray.

Both scores follow from one table per frame: how many pixels ground-truth object c and slot k share.
A video's table is the sum of its frames' tables. Counting pixels is two orders of magnitude cheaper than
multiplying one-hot tensors (`benchmarks/scores.py`).

SOLV's authors score otherwise (Aydemir et al. 2023): each object of a video has one slot, and no other slot is any
object; see `matched_scores`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
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
    S = B * T
    masks_SCX = true_masks.reshape(S, C, H * W).bool().cpu().numpy()
    slots_SX = predicted.reshape(S, H * W).cpu().numpy()
    K = int(slots_SX.max(initial=0)) + 1
    shared_SCK, slot_area_SK = np.empty((S, C, K), np.int64), np.empty((S, K), np.int64)
    # NumPy lets go of the interpreter's lock, so frames are counted on as many threads as torch may use.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        frames = zip(shared_SCK, slot_area_SK, masks_SCX, slots_SX, strict=True)
        list(pool.map(lambda frame: _count_frame(*frame, ignore_overlaps), frames))  # type: ignore[call-arg]
    shared = torch.from_numpy(shared_SCK)
    # Every pixel has exactly one slot, so an object's area is the sum over its row.
    return OverlapCounts(shared, shared.sum(-1), torch.from_numpy(slot_area_SK))


def _count_frame(
    shared_CK: np.ndarray,
    slot_area_K: np.ndarray,
    masks_CX: np.ndarray,
    slots_X: np.ndarray,
    ignore_overlaps: bool,
) -> None:
    """Fills one frame's counts: all pixels of one object in one pass, those of several object by object."""
    C, K = shared_CK.shape
    kind = np.uint8 if C < 256 else np.int64  # small integers stay in the processor's cache
    object_X, term_X = np.zeros((2, len(slots_X)), kind)
    for number, mask_X in enumerate(masks_CX.view(np.uint8), 1):
        np.multiply(mask_X, kind(number), out=term_X)
        np.add(object_X, term_X, out=object_X)
    several = np.empty(0, np.int64)
    if sum(map(np.count_nonzero, masks_CX)) != np.count_nonzero(object_X):
        cover_X = masks_CX.sum(0)
        object_X[cover_X > 1] = 0
        several = np.flatnonzero(cover_X > 1)
    cells = (C + 1) * K
    cell_X = np.multiply(object_X, K, dtype=np.int64)
    np.add(cell_X, slots_X, out=cell_X)
    table = np.bincount(cell_X, minlength=cells).reshape(C + 1, K)
    shared_CK[:], slot_area_K[:] = table[1:], table.sum(0)
    if ignore_overlaps:
        slot_area_K -= np.bincount(slots_X[several], minlength=K)
    elif len(several):
        for shared_K, mask in zip(shared_CK, masks_CX[:, several], strict=True):
            shared_K += np.bincount(slots_X[several[mask]], minlength=K)


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


@dataclass(frozen=True)
class MatchedScores:
    """What `matched_scores` finds: `slots` `(C,)` of the objects, -1 for none; `ious` `(C,)`; FG-ARI `(S,)`, and where
    a frame has an object at all `valid` `(S,)`. Objects without a pixel in all of the frames are not among the C.
    """

    slots: Tensor
    ious: Tensor
    fg_ari: Tensor
    valid: Tensor


def matched_scores(counts: OverlapCounts) -> MatchedScores:
    """Scores of the S frames of one video, whose slots are matched one to one to its objects (Aydemir et al. 2023).

    The IoU of an object and a slot is the mean over the frames where either is; the matching has the highest sum of
    these. An object's score is that of its slot, 0 without one. FG-ARI is each frame's, after all slots without an
    object have become one, the background.
    """
    from scipy.optimize import linear_sum_assignment

    present = counts.true_area.sum(0) > 0
    shared = counts.shared[:, present]
    union = counts.true_area[:, present, None] + counts.slot_area[:, None] - shared
    iou_CK = (shared / union.double().clamp(min=1)).sum(0) / (union > 0).sum(0).clamp(min=1)
    objects, slots = (torch.from_numpy(part) for part in linear_sum_assignment(iou_CK.numpy(), maximize=True))
    slot_of, ious = torch.full((len(iou_CK),), -1), torch.zeros(len(iou_CK), dtype=torch.float64)
    slot_of[objects], ious[objects] = slots, iou_CK[objects, slots]
    of_objects = shared[:, :, slots]
    background = shared.sum(2, keepdim=True) - of_objects.sum(2, keepdim=True)
    merged = torch.cat([of_objects, background], 2)
    return MatchedScores(slot_of, ious, *ari_per_sample(OverlapCounts(merged, merged.sum(2), merged.sum(1))))


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
