"""Run the frozen teacher once over every clip and cache its slots."""

from __future__ import annotations

import sys
from typing import Any

from jobs._main import run_stage
from pipeline.config import Config


def stage(config: Config) -> dict[str, Any]:
    from pipeline.targets.stage import cache_stage

    return cache_stage(config)


if __name__ == "__main__":
    sys.exit(run_stage("cache", __doc__ or "", stage))
