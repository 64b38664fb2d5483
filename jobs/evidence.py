"""Score a sweep's students on a test split; say which claims hold.

Trains every way to distil from several seeds first, where that was not done.
"""

from __future__ import annotations

import sys
from typing import Any

from jobs._job import Job
from jobs._main import run
from pipeline.config import Config


def stage(config: Config) -> dict[str, Any]:
    from pipeline.sweep.evidence import evidence

    return evidence(config)


def check(config: Config) -> None:
    from pipeline.sweep.evidence import check_evidence

    check_evidence(config)


JOB = Job(
    "evidence",
    __doc__,
    stage,
    ("evidence", "sweep", "evaluate", "distill", "mlflow", "ray", "storage"),
    check=check,
)

if __name__ == "__main__":
    sys.exit(run(JOB))
