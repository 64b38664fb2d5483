"""Score the student on the evaluation split, beside trivial baselines."""

from __future__ import annotations

import sys
from typing import Any

from jobs._job import Job
from jobs._main import run
from pipeline.config import Config


def stage(config: Config) -> dict[str, Any]:
    from pipeline.evaluate.stage import evaluate

    return evaluate(config)


JOB = Job("evaluate", __doc__, stage, ("evaluate", "dataset", "mlflow", "ray", "storage"))

if __name__ == "__main__":
    sys.exit(run(JOB))
