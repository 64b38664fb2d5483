"""Distil a student from the cached targets."""

from __future__ import annotations

import sys
from typing import Any

from jobs._main import run_stage
from pipeline.config import Config


def stage(config: Config) -> dict[str, Any]:
    from pipeline.distill.stage import distill_stage

    return distill_stage(config)


if __name__ == "__main__":
    sys.exit(run_stage("distill", __doc__ or "", stage))
