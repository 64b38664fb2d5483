"""All four scores of one video: counting against one-hot tensors, as the public implementations do it.

A 24-frame video of 336 x 336 pixels with 24 classes (MOVi-E's 23 objects and the background) and 15 slots,
from what an evaluation has: a mask for each object and the slot of every pixel. The first
way computes each score by itself, the second shares the one-hot tensors and their products between the four.
All must give the same scores. Each way runs several times in a row: an evaluation's masks have just been decoded,
and are not fetched back after seconds of other work.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from benchmarks.report import Comparison, Row, interleaved
from pipeline.metrics import ari_per_sample, best_overlap_per_sample, count_overlaps

CLASSES, SLOTS = 24, 15


class ScoreMismatch(RuntimeError):
    """Two ways of computing the same scores that differ: their times mean nothing."""


def regions(frames: int, side: int, count: int, seed: int) -> Tensor:
    """Label maps `(1, T, H, W)` uint8 of moving regions, nearest of `count` points."""
    rng = np.random.default_rng(seed)
    starts, speeds = rng.uniform(0, side, (count, 2, 1, 1)), rng.uniform(-2, 2, (count, 2, 1, 1))
    grid = np.mgrid[:side, :side]
    labels = [((grid - starts - t * speeds) ** 2).sum(1).argmin(0) for t in range(frames)]
    return torch.from_numpy(np.stack(labels).astype(np.uint8))[None]


def masks_of(labels: Tensor) -> Tensor:
    """`(1, T, C, H, W)` bool, class 0 the background."""
    return torch.stack([labels == c for c in range(CLASSES)], 2)


def _one_hot(slots: Tensor) -> Tensor:
    return one_hot(slots.long(), SLOTS).double()


def _tables(true: Tensor, slots: Tensor, level: str) -> tuple[Tensor, Tensor, Tensor]:
    """Shared pixels, object areas and slot areas, `(S, C, K)`, `(S, C)`, `(S, K)`, without background."""
    true = true.movedim(2, -1)
    if level == "image":
        true, slots = true.flatten(0, 1).flatten(1, 2), slots.flatten(0, 1).flatten(1, 2)
    else:
        true, slots = true.flatten(1, 3), slots.flatten(1, 3)
    true = true[..., 1:]
    return torch.einsum("spc,spk->sck", true, slots), true.sum(1), slots.sum(1)


def _ari(shared: Tensor) -> float:
    rows, columns = shared.sum(2), shared.sum(1)
    total = rows.sum(1)
    pairs = (shared * (shared - 1)).sum((1, 2))
    row_pairs, column_pairs = (rows * (rows - 1)).sum(1), (columns * (columns - 1)).sum(1)
    expected = row_pairs * column_pairs / (total * (total - 1))
    return float(((pairs - expected) / ((row_pairs + column_pairs) / 2 - expected)).mean())


def _mbo(shared: Tensor, true_area: Tensor, slot_area: Tensor) -> float:
    overlap = shared / (true_area[:, :, None] + slot_area[:, None] - shared)
    best, present = overlap.amax(2), true_area > 0
    return float(((best * present).sum(1) / present.sum(1)).mean())


def each_by_itself(true_masks: Tensor, slots: Tensor) -> list[float]:
    scores = []
    for level in ("image", "video"):
        scores.append(_ari(_tables(true_masks.double(), _one_hot(slots), level)[0]))
        scores.append(_mbo(*_tables(true_masks.double(), _one_hot(slots), level)))
    return scores


def one_hot_once(true_masks: Tensor, slots: Tensor) -> list[float]:
    true, predicted = true_masks.double(), _one_hot(slots)
    scores = []
    for level in ("image", "video"):
        tables = _tables(true, predicted, level)
        scores += [_ari(tables[0]), _mbo(*tables)]
    return scores


def by_counting(true_masks: Tensor, slots: Tensor) -> list[float]:
    counts = count_overlaps(true_masks, slots, ignore_background=True)
    tables = (counts, counts.to_video(true_masks.shape[1]))
    return [float(f(t)[0].mean()) for t in tables for f in (ari_per_sample, best_overlap_per_sample)]


WAYS = {
    "each score by itself, one-hot einsum in fp64": each_by_itself,
    "the four share one-hot tensors and products": one_hot_once,
    "counting (`pipeline.metrics`)": by_counting,
}


def score_comparison(repeats: int, *, frames: int = 24, side: int = 336) -> Comparison:
    """Raises ScoreMismatch where two ways give different scores."""
    true_masks, slots = masks_of(regions(frames, side, CLASSES, 0)), regions(frames, side, SLOTS, 1)
    results = [way(true_masks, slots) for way in WAYS.values()]
    difference = max(abs(a - b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    if difference > 1e-9:
        raise ScoreMismatch(f"the scores of two ways differ by {difference:.2g}")
    measured = {
        name: interleaved([lambda way=way: way(true_masks, slots)], repeats + 1)[0][1:]  # type: ignore[misc]
        for name, way in reversed(WAYS.items())  # the gigabytes of the others would be in its way
    }
    seconds = [measured[name] for name in WAYS]
    rows = [Row(name, times, frames, "frames") for name, times in zip(WAYS, seconds, strict=True)]
    notes = [f"scores agree to {difference:.1g}"]
    return Comparison(f"four scores of a {frames}-frame {side}² video", rows, notes)
