"""Write a model as ONNX and as a PyTorch program, or as a web page.

Each form is compared with the model over 30 frames; with a config whose evaluation split has masks, all are scored.
"""

from __future__ import annotations

import sys
from typing import Any

from jobs._job import REGISTRY_KEYS, Job, Option, PublicFile, Word
from jobs._main import run
from pipeline.config import Config, ConfigError

FORMATS = ("files", "web")


class Settings(PublicFile):
    video: str | None = None
    """the video to compare the forms on, here or s3://bucket/key; null: a generated one"""


def format_and_runtime(
    config: Config, model: str, folder: str, settings: Settings, format: str, runtime: str | None
) -> None:
    if format not in FORMATS:
        raise ConfigError(f"--format: {format!r} is none; valid: {', '.join(FORMATS)}")
    if (format == "web") == (runtime is None):
        from pipeline.registry.web import HOW_TO_GET

        raise ConfigError(
            f"--format web takes the browser's onnxruntime from --runtime DIR; `{HOW_TO_GET}` makes one, 'package'"
            if runtime is None
            else "--runtime goes with --format web"
        )


def export(
    config: Config, model: str, folder: str, settings: Settings, format: str, runtime: str | None
) -> dict[str, Any]:
    from pipeline.registry import export as stage

    loaded = settings.load(model, config.tracking_uri)
    return stage.export(
        config, loaded, model, folder, video=settings.video, hints=settings.hints(), runtime=runtime
    )


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
    options=(
        Option(
            "--format",
            "files (the default), or web: a page instead of the PyTorch program",
            "NAME",
            str,
            "files",
        ),
        Option("--runtime", "the folder of onnxruntime-web, for --format web", "DIR"),
    ),
    sections=("dataset", "clips", "evaluate"),
    keys=REGISTRY_KEYS,
    settings=Settings,
    check=format_and_runtime,
)

if __name__ == "__main__":
    sys.exit(run(JOB))
