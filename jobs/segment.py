"""Segment videos: python -m jobs.segment VIDEO … model=models:/slotmatch@champion out=DIR

`model` is a registered model, a model folder or a checkpoint file. Other settings: max_side=1280 (pixels),
num_heads=N (of a public checkpoint's ViT), mlflow.tracking_uri=URI, or storage.root=DIR for its SQLite file.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from jobs._main import REGISTRY_SETTINGS, check_settings, registry_uri, report, split_settings
from pipeline.config import ConfigError

SETTINGS = ("model", "out", "max_side", "num_heads", *REGISTRY_SETTINGS)


def main() -> int:
    parser = argparse.ArgumentParser(
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
    for key in ("max_side", "num_heads"):
        if key in settings and not (settings[key].isdigit() and int(settings[key]) > 0):
            raise ConfigError(f"{key}: {settings[key]!r} is not a whole number above 0")
    numbers = {key: int(settings[key]) for key in ("max_side", "num_heads") if key in settings}

    from pipeline.builders import best_device
    from pipeline.models import load_slot_model
    from pipeline.registry import downloaded
    from pipeline.segment import segment

    with contextlib.ExitStack() as stack:
        path: Any = settings["model"]
        if path.startswith("models:/"):
            path = stack.enter_context(downloaded(path, registry_uri(settings)))
        model = load_slot_model(path, num_heads=numbers.get("num_heads")).to(best_device())
    limit = {"max_side": numbers["max_side"]} if "max_side" in numbers else {}
    done = [segment(model, video, settings["out"], **limit) for video in videos]
    return {"uri": settings["out"], "videos": done, "frames": sum(d["frames"] for d in done)}


if __name__ == "__main__":
    sys.exit(main())
