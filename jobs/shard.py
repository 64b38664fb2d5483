"""Decode videos into a published set of Parquet frame clips."""

from __future__ import annotations

import sys
from typing import Any

from jobs._main import run_stage
from pipeline.config import Config


def stage(config: Config) -> dict[str, Any]:
    from pipeline.clips.stage import shard_stage

    return shard_stage(config)


if __name__ == "__main__":
    sys.exit(run_stage("shard", __doc__ or "", stage))
