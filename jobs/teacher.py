"""Train a SlotContrast teacher on the clips."""

from __future__ import annotations

import sys
from typing import Any

from jobs._main import run_stage
from pipeline.config import Config


def stage(config: Config) -> dict[str, Any]:
    from pipeline.distill.stage import teacher_stage

    return teacher_stage(config)


if __name__ == "__main__":
    sys.exit(run_stage("teacher", __doc__ or "", stage))
