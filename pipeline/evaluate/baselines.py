"""Trivial segmentations, to be printed beside every score: a model that loses to them learned nothing.

Each takes a number of slots and returns a predictor: chunks of frames `(t, h, w, 3)` uint8 and a size
`(height, width)` in, labels `(t, height, width)` uint8 of each chunk out. One of them needs a model, whose backbone's
features it clusters: what slots are worth beyond them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from pipeline.clips.views import nearest_resize
from pipeline.models import SlotModel

_FEATURE_STEPS = 30  # of Lloyd's; they cost less than the features

Predictor = Callable[[Iterator[np.ndarray], tuple[int, int]], Iterator[np.ndarray]]


def one_slot(num_slots: int) -> Predictor:
    """Everything in one slot."""

    def predict(chunks: Iterator[np.ndarray], size: tuple[int, int]) -> Iterator[np.ndarray]:
        for frames in chunks:
            yield np.zeros((len(frames), *size), np.uint8)

    return predict


def grid(num_slots: int) -> Predictor:
    """A fixed grid of `num_slots` blocks, as square as their number allows."""
    rows = next(r for r in range(int(num_slots**0.5), 0, -1) if num_slots % r == 0)
    columns = num_slots // rows

    def predict(chunks: Iterator[np.ndarray], size: tuple[int, int]) -> Iterator[np.ndarray]:
        height, width = size
        labels = (np.arange(height) * rows // height)[:, None] * columns + np.arange(width) * columns // width
        for frames in chunks:
            yield np.broadcast_to(labels, (len(frames), *size)).astype(np.uint8)

    return predict


def colour_kmeans(num_slots: int) -> Predictor:
    """k-means on the colours of the first chunk; its centres label the whole video."""

    def predict(chunks: Iterator[np.ndarray], size: tuple[int, int]) -> Iterator[np.ndarray]:
        from scipy.cluster.vq import kmeans2, vq

        centres = None
        for frames in chunks:
            colours = frames.reshape(-1, 3).astype(np.float32)
            if centres is None:
                sample = colours[:: max(1, len(colours) // 20_000)]
                centres, _ = kmeans2(sample, num_slots, minit="++", seed=0, missing="warn")
            labels = vq(colours, centres)[0].reshape(frames.shape[:3]).astype(np.uint8)
            yield nearest_resize(labels, size)

    return predict


def feature_kmeans(model: SlotModel, num_slots: int) -> Predictor:
    """k-means on the frozen features of all patches of all frames together, enlarged as the model's masks are.

    Colours of a few frames tell those of a video, features of later frames may be new: so it sees all before it labels
    the first, and holds them (256 patches of 384 numbers are 0.4 MB a frame).
    """

    @torch.no_grad()
    def predict(chunks: Iterator[np.ndarray], size: tuple[int, int]) -> Iterator[np.ndarray]:
        from scipy.cluster.vq import kmeans2

        found = [model.backbone_features(model.prepare([frames]))[0].float().cpu() for frames in chunks]
        features_TPF = torch.cat(found)
        points = features_TPF.flatten(0, 1).numpy()
        _, labels = kmeans2(points, num_slots, iter=_FEATURE_STEPS, minit="++", seed=0, missing="warn")
        labels_TP = torch.from_numpy(labels).long().view(features_TPF.shape[:2])
        for part_TP in labels_TP.split([len(features) for features in found]):
            masks_TNP = torch.nn.functional.one_hot(part_TP, num_slots).mT.float()
            yield model.label_maps(masks_TNP, size).numpy()

    return predict


BASELINES: dict[str, Callable[[int], Predictor]] = {
    "one slot": one_slot,
    "grid": grid,
    "colour k-means": colour_kmeans,
}
