"""Decode videos into a published set of Parquet frame clips."""

from __future__ import annotations

import sys
from typing import Any

from jobs._job import Job
from jobs._main import run
from pipeline.config import Config


def stage(config: Config) -> dict[str, Any]:
    from pipeline.clips.stage import shard

    return shard(config)


JOB = Job("shard", __doc__, stage, ("dataset", "clips", "ray", "storage"))

if __name__ == "__main__":
    sys.exit(run(JOB))
