"""From what the loader reads to what a slot model's objective takes."""

from __future__ import annotations

import torch

from pipeline.distill.data import RawBatch
from pipeline.distill.step import Batch
from pipeline.models import SlotModel, VideoSegmenter
from pipeline.targets.maker import teacher_outputs


def slot_batch(
    model: SlotModel, raw: RawBatch, teacher: VideoSegmenter | None, rollout: str, device: torch.device
) -> Batch:
    """What was read, prepared for the model, with what a live teacher makes of it, on the device."""
    targets, teacher_features = raw.target_slots, raw.teacher_features
    if teacher is not None:
        assert raw.pixels is not None
        with torch.no_grad():
            targets, teacher_features = teacher_outputs(teacher, raw.pixels, raw.views, rollout)
    initial = None
    if model.config.initializer == "random":
        initial = model.initial_slots(len(raw.views), [v.noise_seed for v in raw.views])
    video = model.prepare(raw.pixels) if raw.pixels is not None else None
    return Batch(video, raw.features, targets, teacher_features, initial).to(device)
