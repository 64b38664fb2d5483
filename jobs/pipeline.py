"""All stages in turn: from videos to a champion pulled from the registry."""

from __future__ import annotations

import sys
from typing import Any

from jobs._main import run_stage
from pipeline.config import Config


def stage(config: Config) -> dict[str, Any]:
    from pipeline.line import run_pipeline

    return run_pipeline(config)


if __name__ == "__main__":
    sys.exit(run_stage("pipeline", __doc__ or "", stage))
