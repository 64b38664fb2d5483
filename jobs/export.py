"""Write a model as ONNX and as a PyTorch program.

Each form is compared with the model over 30 frames; with a config whose evaluation split has masks, all are scored.
"""

from __future__ import annotations

import sys
from typing import Any

from jobs._job import REGISTRY_KEYS, Job, PublicFile, Word
from jobs._main import run
from pipeline.config import Config


class Settings(PublicFile):
    video: str | None = None
    """the video to compare the forms on, here or s3://bucket/key; null: a generated one"""


def export(config: Config, model: str, folder: str, settings: Settings) -> dict[str, Any]:
    from pipeline.registry import export as stage

    loaded = settings.load(model, config.tracking_uri)
    return stage.export(config, loaded, model, folder, video=settings.video, hints=settings.hints())


JOB = Job(
    "export",
    __doc__,
    export,
    words=(
        Word(
            "model", "MODEL", "models:/NAME@ALIAS, models:/NAME/VERSION, a model folder or a checkpoint file"
        ),
        Word("folder", "OUT", "the folder to write to, here or s3://bucket/prefix"),
    ),
    sections=("dataset", "clips", "evaluate"),
    keys=REGISTRY_KEYS,
    settings=Settings,
)

if __name__ == "__main__":
    sys.exit(run(JOB))
