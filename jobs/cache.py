"""Run the frozen teacher once over every clip and cache its slots."""

from __future__ import annotations

import sys
from typing import Any

from jobs._job import Job
from jobs._main import run
from pipeline.config import Config


def stage(config: Config) -> dict[str, Any]:
    from pipeline.targets.stage import cache

    return cache(config)


JOB = Job("cache", __doc__, stage, ("targets", "teacher", "student", "ray", "storage"))

if __name__ == "__main__":
    sys.exit(run(JOB))
