"""`feature_scale: auto`: the one number that gives a model's frozen features unit variance.

Early blocks of a ViT give features that are many times smaller than the last one's, so that their reconstruction would
weigh nothing beside a distillation term. What is measured when a run begins is part of its model from then on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.clips.table import VideoEntry
from pipeline.distill.data import Loader, RawBatch, Sample
from pipeline.distill.run import Run
from pipeline.log import log
from pipeline.models import SlotModel, VideoSegmenter

SAMPLE_CLIPS = 32
DIGITS = 4  # fewer than features differ by between machines, or cached and live


def settle_feature_scale(run: Run, model: VideoSegmenter, loader: Loader) -> None:
    """Measures the scale of a run that begins, where its config leaves it open, and makes it the model's.

    The first worker measures, and the others take its number. Cached features and the backbone's own give the same.
    """
    section = run.config.student if run.kind == "student" else run.config.teacher
    if section.feature_scale != "auto":
        return
    assert isinstance(model, SlotModel)  # other systems have no such scale
    scale = torch.zeros((), dtype=torch.float64, device=model.device)
    if loader.rank == 0:
        samples = spread_samples(loader.sampler.videos)
        size = max(1, loader.sampler.batch_size // loader.world_size)  # as a worker's share of a step
        shares = [samples[first : first + size] for first in range(0, len(samples), size)]
        scale.fill_(unit_variance_scale(_features(model, loader.read(share)) for share in shares))
        log(
            f"{run.label}: features are multiplied by {scale.item():g} (feature_scale=auto, of {len(samples)} clips)"
        )
    if loader.world_size > 1:
        dist.broadcast(scale, 0)
    model.config = replace(model.config, feature_scale=scale.item())


def spread_samples(videos: Sequence[VideoEntry]) -> list[Sample]:
    """At most `SAMPLE_CLIPS` full clips, evenly over all of them, each in its view 0: the same for every seed."""
    clips = [(video, index) for video in videos for index in range(video.full_clips)]
    count = min(SAMPLE_CLIPS, len(clips))
    return [Sample(*clips[i * len(clips) // count], view=0) for i in range(count)]


def unit_variance_scale(features: Iterable[Tensor]) -> float:
    """One over the standard deviation of all numbers of some tensors, to `DIGITS` digits."""
    count, total, squares = 0, 0.0, 0.0
    for tensor in features:
        values = tensor.double()
        count += values.numel()
        total += values.sum().item()
        squares += values.square().sum().item()
    deviation = (squares / count - (total / count) ** 2) ** 0.5
    return float(f"{1 / deviation:.{DIGITS}g}")


def _features(model: SlotModel, raw: RawBatch) -> Tensor:
    """Not scaled, `(B, T, P, F)`: cached ones, or what the backbone gives now."""
    if raw.features is not None:
        return raw.features
    assert raw.pixels is not None
    return model.backbone_features(model.prepare(raw.pixels))
