"""Distil a student from the cached targets."""

import sys

from jobs._job import Job
from jobs._main import run

JOB = Job(
    "distill",
    __doc__,
    "pipeline.distill.stage:distill",
    sections=("distill", "student", "teacher", "targets", "evaluate", "mlflow", "ray", "storage"),
)

if __name__ == "__main__":
    sys.exit(run(JOB))
