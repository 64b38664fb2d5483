"""Make the student a version of the registered model."""

from __future__ import annotations

import sys
from typing import Any

from jobs._job import Job
from jobs._main import run
from pipeline.config import Config


def stage(config: Config) -> dict[str, Any]:
    from pipeline.registry.stage import register

    return register(config)


JOB = Job("register", __doc__, stage, ("mlflow", "evaluate", "ray", "storage"))

if __name__ == "__main__":
    sys.exit(run(JOB))
