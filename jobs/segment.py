"""Segment videos with a registered model, a folder or a checkpoint.

Writes an overlay video, label maps and a contact sheet of each.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from jobs._job import REGISTRY_KEYS, Job, Word
from jobs._main import run
from pipeline.config import Config, ConfigError, Section
from pipeline.config.fields import PositiveInt
from pipeline.config.models import Colour, PositiveColour, SlotCount


class Settings(Section):
    """The last four as in a config's `teacher` section: what a public file does not tell."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, a model folder or a checkpoint file"""
    out: str
    """the folder to write to, here or s3://bucket/prefix"""
    max_side: PositiveInt = 1280
    """longest side of the overlay video, pixels"""
    num_heads: PositiveInt | None = None
    """attention heads of a public file's ViT; null: width / 64"""
    num_slots: SlotCount | None = None
    """slots of a public file that draws its initial slots"""
    mean: Colour = (0.485, 0.456, 0.406)
    """that a public file normalises with, where it is not ImageNet's"""
    std: PositiveColour = (0.229, 0.224, 0.225)
    """that a public file normalises with, where it is not ImageNet's"""


def distinct_names(config: Config, videos: list[str], settings: Settings) -> None:
    stems = [Path(video).stem for video in videos]
    for stem in stems:
        if stems.count(stem) > 1:
            raise ConfigError(
                f"two videos are named {stem!r}, so one would overwrite the other; give each its own out="
            )


def segment(config: Config, videos: list[str], settings: Settings) -> dict[str, Any]:
    from pipeline.compute import best_device
    from pipeline.models import CheckpointHints, HintError, load_slot_model
    from pipeline.segment import stage
    from pipeline.tracking.versions import downloaded

    hints = CheckpointHints(settings.num_heads, settings.num_slots, settings.mean, settings.std)
    with contextlib.ExitStack() as stack:
        path: Any = settings.model
        if path.startswith("models:/"):
            path = stack.enter_context(downloaded(path, config.tracking_uri))
        try:
            model = load_slot_model(path, **hints.to_dict()).to(best_device())
        except HintError as error:
            raise ConfigError(str(error)) from None
    done = [stage.segment(model, video, settings.out, max_side=settings.max_side) for video in videos]
    return {"uri": settings.out, "videos": done, "frames": sum(d["frames"] for d in done)}


JOB = Job(
    "segment",
    __doc__,
    segment,
    words=(Word("videos", "VIDEO …", "video files, here or s3://bucket/key", many=True),),
    keys=REGISTRY_KEYS,
    settings=Settings,
    check=distinct_names,
)

if __name__ == "__main__":
    sys.exit(run(JOB))
