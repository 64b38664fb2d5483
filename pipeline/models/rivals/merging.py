"""SOLV's discrete steps: which slots of a frame are one object, and which of the next frame go on with it.

Shapes: M frames, S slots, d slot size, K tokens, P patches. Neither step has a gradient.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_CLUSTERS = 3  # a frame of fewer is left unmerged


def clusters(slots_SD: Tensor, distance: float) -> Tensor:
    """The cluster of each slot `(S,)`, numbered in the order of their first slots.

    Agglomerative, by cosine distance and complete linkage: two clusters become one while all their slots are nearer
    to each other than `distance`. Where fewer than three would be left, each slot stays a cluster of its own.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    slots = slots_SD.detach().double().cpu().numpy()
    below = np.nextafter(distance, 0)
    found = fcluster(linkage(slots, "complete", "cosine"), below, criterion="distance")
    if found.max() < LEAST_CLUSTERS:
        return torch.arange(len(slots))
    _, first, number = np.unique(found, return_index=True, return_inverse=True)
    return torch.from_numpy(np.argsort(np.argsort(first))[number])


def merged(slots_MSD: Tensor, weights_MSK: Tensor, clusters_MS: Tensor) -> tuple[Tensor, Tensor]:
    """Slots `(M, S, d)` and attention `(M, S, K)` of clusters, which come first; the rest is 0.

    A merged slot is its members' mean; its attention their sum, normalised over the tokens again.
    """
    members_MCS = F.one_hot(clusters_MS, slots_MSD.shape[1]).transpose(1, 2).to(slots_MSD)
    size_MC1 = members_MCS.sum(-1, keepdim=True)
    weights_MCK = members_MCS @ weights_MSK + 1e-8
    weights_MCK = weights_MCK / weights_MCK.sum(-1, keepdim=True)
    return members_MCS @ slots_MSD / size_MC1.clamp(min=1), weights_MCK * (size_MC1 > 0)


class Tracks:
    """Numbers the slots of frame after frame, so that a number stands for one thing in all of them.

    Slots of neighbouring frames are matched one to one by cosine similarity. Those that a frame has more than the one
    before get the number of the most similar slot there, so that two can share a number from then on.
    """

    def __init__(self) -> None:
        self._slots = np.zeros((0, 0))
        self._ids = np.zeros(0, np.int64)

    def follow(self, slots_SD: Tensor) -> np.ndarray:
        """The numbers `(S,)` of the next frame's slots."""
        from scipy.optimize import linear_sum_assignment

        slots = F.normalize(slots_SD.detach().double(), dim=-1).cpu().numpy()
        if not len(self._ids):
            ids = np.arange(len(slots))
        else:
            similarity = slots @ self._slots.T
            ids = self._ids[similarity.argmax(1)]
            rows, columns = linear_sum_assignment(similarity, maximize=True)
            ids[rows] = self._ids[columns]
        self._slots, self._ids = slots, ids
        return ids


def linked(slots_TSD: Tensor) -> Tensor:
    """Slots of a clip, as many in each frame, in the order of the first frame's: slot n is track n."""
    tracks, placed = Tracks(), torch.empty_like(slots_TSD)
    for old, new in zip(slots_TSD, placed, strict=True):
        new[torch.from_numpy(tracks.follow(old)).to(old.device)] = old
    return placed


def in_tracks(
    slots_MSD: Tensor, masks_MSP: Tensor, slot_nums: list[int], tracks: Tracks
) -> tuple[Tensor, Tensor]:
    """Slots and masks of a video's next frames with their rows in the order of tracks.

    Each track has row n of every S rows; there are as many times S of them as slots share a track.
    """
    S = slots_MSD.shape[1]
    rows: list[list[int]] = []
    for slots, count in zip(slots_MSD, slot_nums, strict=True):
        taken: list[int] = []
        for track in tracks.follow(slots[:count]).tolist():
            taken.append(track + S * sum(row % S == track for row in taken))
        rows.append(taken)
    height = S * (1 + max(max(taken) for taken in rows) // S)
    placed = [old.new_zeros(len(old), height, old.shape[2]) for old in (slots_MSD, masks_MSP)]
    for t, taken in enumerate(rows):
        for new, old in zip(placed, (slots_MSD, masks_MSP), strict=True):
            new[t, taken] = old[t, : len(taken)]
    return placed[0], placed[1]
