"""What a run measures when it begins, and what is part of its model from then on: the scale of its features, its start.

Early blocks of a ViT give features that are many times smaller than the last one's, so that their reconstruction would
weigh nothing beside a distillation term: `feature_scale: auto` is the one number that gives a model's frozen features
unit variance. `initialisation: fitted` starts slot attention in their principal components, `teacher` a student's where
its teacher's slot attention is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.clips.table import VideoEntry
from pipeline.distill.data import Loader, Sample
from pipeline.distill.run import Run
from pipeline.log import log
from pipeline.models import SlotModel, VideoSegmenter
from pipeline.models.build import load_teacher
from pipeline.models.initialisation import fit_start, start_as_teacher

SAMPLE_CLIPS = 32
DIGITS = 4  # fewer than features differ by between machines, or cached and live


def settle_start(run: Run, model: VideoSegmenter, loader: Loader) -> None:
    """Measures what the config of a run that begins leaves open, and makes it the model's.

    The first worker measures, and the others take its numbers. Cached features and the backbone's own give the same.
    """
    section = run.section
    auto, start = section.feature_scale == "auto", section.initialisation
    fitted = start in ("fitted", "teacher")
    if not auto and not fitted:
        return
    assert isinstance(model, SlotModel)  # other systems have neither
    samples = spread_samples(loader.sampler.videos)
    if auto:
        scale = torch.zeros((), dtype=torch.float64, device=model.device)
        if loader.rank == 0:
            scale.fill_(unit_variance_scale(_features(model, loader, samples)))
            log(
                f"{run.label}: features are multiplied by {scale.item():g} (feature_scale=auto, of "
                f"{len(samples)} clips)"
            )
        if loader.world_size > 1:
            dist.broadcast(scale, 0)
        model.config = replace(model.config, feature_scale=scale.item())
    if fitted:
        if loader.rank == 0:
            features = torch.cat([f.flatten(0, 1) for f in _features(model, loader, samples)])
            if start == "teacher":
                _start_as_teacher(run, model, features, loader, samples)
            else:
                fit_start(model, features, seed=None if run.has_teachers_slots else run.settings.seed)
                log(f"{run.label}: started in the features' principal components (initialisation=fitted)")
        if loader.world_size > 1:
            for parameter in model.trainable_parameters():
                dist.broadcast(parameter.data, 0)


def _start_as_teacher(
    run: Run, model: SlotModel, features_CPF: Tensor, loader: Loader, samples: list[Sample]
) -> None:
    assert run.teacher_uri is not None  # as `build` has checked
    teacher = load_teacher(run.config, run.teacher_uri).to(model.device)
    assert isinstance(teacher, SlotModel)
    with torch.no_grad(), loader.of_pixels() as frames:
        features = [f.flatten(0, 1) for f in _features(teacher, frames, samples)]
        inputs_CQD = torch.cat([teacher.project(f) for f in features])
    start_as_teacher(model, features_CPF, teacher, inputs_CQD)
    log(
        f"{run.label}: started with the teacher's slot attention and a projection fitted to it (initialisation=teacher)"
    )


def spread_samples(videos: Sequence[VideoEntry]) -> list[Sample]:
    """At most `SAMPLE_CLIPS` full clips, evenly over all of them, each in its view 0: the same for every seed."""
    clips = [(video, index) for video in videos for index in range(video.full_clips)]
    count = min(SAMPLE_CLIPS, len(clips))
    return [Sample(*clips[i * len(clips) // count], view=0) for i in range(count)]


def unit_variance_scale(features: Iterable[Tensor]) -> float:
    """One over the standard deviation of all numbers of some tensors, to `DIGITS` digits.

    Raises:
        ValueError: they are all the same number.
    """
    count, total, squares = 0, 0.0, 0.0
    for tensor in features:
        values = tensor.double()
        count += values.numel()
        total += values.sum().item()
        squares += values.square().sum().item()
    variance = squares / count - (total / count) ** 2
    if variance <= 1e-12 * squares / count:  # what rounding leaves of none
        raise ValueError(
            "feature_scale=auto: the backbone gives the same number everywhere, which no scale makes vary: are these "
            "its weights (backbone_weights), and do the videos show anything?"
        )
    deviation = variance**0.5
    return float(f"{1 / deviation:.{DIGITS}g}")


def _features(model: SlotModel, loader: Loader, samples: list[Sample]) -> Iterator[Tensor]:
    """Not scaled, `(B, T, P, F)`: cached ones, or what the backbone gives now."""
    size = max(1, loader.sampler.batch_size // loader.world_size)  # as a worker's share of a step
    for first in range(0, len(samples), size):
        raw = loader.read(samples[first : first + size])
        if raw.features is not None:
            yield raw.features
        else:
            assert raw.pixels is not None
            yield model.backbone_features(model.prepare(raw.pixels))
