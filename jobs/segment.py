"""Segment videos: python -m jobs.segment VIDEO … model=models:/slotmatch@champion out=DIR

`model` is a registered model, a model folder or a checkpoint file. Other settings: max_side=1280 (pixels),
mlflow.tracking_uri=URI, or storage.root=DIR for its SQLite file; and what a public file does not tell:
num_slots=N where it draws its initial slots, mean=[R,G,B] std=[R,G,B] where they are not ImageNet's, and
num_heads=N where its ViT has not width / 64 heads.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from jobs._main import REGISTRY_SETTINGS, Parser, check_settings, registry_uri, report, split_settings
from pipeline.config import Config, ConfigError, resolve_config

HINTS = ("num_heads", "num_slots", "mean", "std")  # as in a config's `teacher` section
SETTINGS = ("model", "out", "max_side", *HINTS, *REGISTRY_SETTINGS)


def main() -> int:
    parser = Parser(
        "python -m jobs.segment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="+", metavar="VIDEO | key=value")
    videos, settings = split_settings(parser.parse_args().words)
    return report("segment", lambda: _segment(videos, settings))


def _segment(videos: list[str], settings: dict[str, str]) -> dict[str, Any]:
    check_settings(settings, SETTINGS)
    for key in ("model", "out"):
        if key not in settings:
            raise ConfigError(f"{key}: is missing; give {key}=…")
    if not videos:
        raise ConfigError("no video given")
    stems = [Path(video).stem for video in videos]
    for stem in stems:
        if stems.count(stem) > 1:
            raise ConfigError(
                f"two videos are named {stem!r}, so one would overwrite the other; give each its own out="
            )
    side = settings.get("max_side")
    if side is not None and not (side.isdigit() and int(side) > 0):
        raise ConfigError(f"max_side: {side!r} is not a whole number above 0")
    config = _hints_config(settings)

    from pipeline.compute import best_device
    from pipeline.models import HintError, load_slot_model
    from pipeline.models.build import checkpoint_hints
    from pipeline.segment.stage import segment
    from pipeline.tracking.versions import downloaded

    with contextlib.ExitStack() as stack:
        path: Any = settings["model"]
        if path.startswith("models:/"):
            path = stack.enter_context(downloaded(path, registry_uri(settings)))
        try:
            model = load_slot_model(path, **checkpoint_hints(config).to_dict()).to(best_device())
        except HintError as error:
            raise ConfigError(str(error)) from None
    limit = {"max_side": int(side)} if side is not None else {}
    done = [segment(model, video, settings["out"], **limit) for video in videos]
    return {"uri": settings["out"], "videos": done, "frames": sum(d["frames"] for d in done)}


def _hints_config(settings: dict[str, str]) -> Config:
    """The hints as a config has them, which checks them.

    Raises:
        ConfigError: values that can't be used, named as the settings are.
    """
    try:
        return resolve_config({}, [f"teacher.{key}={settings[key]}" for key in HINTS if key in settings])
    except ConfigError as error:
        raise ConfigError(str(error).replace("teacher.", "")) from None


if __name__ == "__main__":
    sys.exit(main())
