"""Train and compare students of several settings; register the best.

Every setting is trained from several seeds and scored; the alias follows the mean.
"""

from __future__ import annotations

import sys
from typing import Any

from jobs._job import Job
from jobs._main import run
from pipeline.config import Config


def stage(config: Config) -> dict[str, Any]:
    from pipeline.sweep.stage import sweep

    return sweep(config)


def check(config: Config) -> None:
    from pipeline.sweep.settings import plan_trials

    plan_trials(config)


JOB = Job(
    "sweep",
    __doc__,
    stage,
    ("sweep", "distill", "student", "targets", "evaluate", "mlflow", "ray", "storage"),
    check=check,
)

if __name__ == "__main__":
    sys.exit(run(JOB))
