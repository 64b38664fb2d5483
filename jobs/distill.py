"""Distil a student from the cached targets."""

from __future__ import annotations

import sys
from typing import Any

from jobs._job import Job
from jobs._main import run
from pipeline.config import Config


def stage(config: Config) -> dict[str, Any]:
    from pipeline.distill.stage import distill

    return distill(config)


JOB = Job(
    "distill",
    __doc__,
    stage,
    ("distill", "student", "teacher", "targets", "evaluate", "mlflow", "ray", "storage"),
)

if __name__ == "__main__":
    sys.exit(run(JOB))
