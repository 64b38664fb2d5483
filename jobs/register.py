"""Make the student a version of the registered model."""

import sys

from jobs._job import Job
from jobs._main import run

JOB = Job(
    "register",
    __doc__,
    "pipeline.registry.stage:register",
    sections=("mlflow", "evaluate", "ray", "storage"),
)

if __name__ == "__main__":
    sys.exit(run(JOB))
