"""Train a SlotContrast or VideoSAUR teacher on the clips."""

from __future__ import annotations

import sys
from typing import Any

from jobs._job import Job
from jobs._main import run
from pipeline.config import Config


def stage(config: Config) -> dict[str, Any]:
    from pipeline.stages import teacher_stage

    return teacher_stage(config)


JOB = Job("teacher", __doc__, stage, ("teacher", "targets", "evaluate", "mlflow", "ray", "storage"))

if __name__ == "__main__":
    sys.exit(run(JOB))
