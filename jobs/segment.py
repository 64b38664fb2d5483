"""Segment videos with a registered model, a folder or a file.

Writes an overlay video, label maps and a contact sheet of each.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from jobs._job import REGISTRY_KEYS, Job, PublicFile, Word
from jobs._main import run
from pipeline.config import Config, ConfigError, Section
from pipeline.config.fields import PositiveInt


class Output(Section):
    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, a model folder, a checkpoint or exported file; s3://, hf:// too"""
    out: str
    """the folder to write to, here or s3://bucket/prefix"""
    max_side: PositiveInt = 1280
    """longest side of the overlay video, pixels"""


class Settings(PublicFile, Output):
    """The keys of `Output`, then those of `PublicFile`."""


def distinct_names(config: Config, videos: list[str], settings: Settings) -> None:
    stems = [Path(video).stem for video in videos]
    for stem in stems:
        if stems.count(stem) > 1:
            raise ConfigError(
                f"two videos are named {stem!r}, so one would overwrite the other; give each its own out="
            )


def segment(config: Config, videos: list[str], settings: Settings) -> dict[str, Any]:
    from pipeline.compute import best_device
    from pipeline.models import VideoSegmenter
    from pipeline.segment import stage

    model = settings.load(settings.model, config.tracking_uri)
    if isinstance(model, VideoSegmenter):
        model.to(best_device())
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
