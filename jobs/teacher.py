"""Train a SlotContrast or VideoSAUR teacher on the clips."""

from __future__ import annotations

import sys
from typing import Any

from jobs._job import Job
from jobs._main import run
from pipeline.config import Config


def stage(config: Config) -> dict[str, Any]:
    from pipeline.distill.stage import train_teacher

    return train_teacher(config)


JOB = Job("teacher", __doc__, stage, ("teacher", "targets", "evaluate", "mlflow", "ray", "storage"))

if __name__ == "__main__":
    sys.exit(run(JOB))
