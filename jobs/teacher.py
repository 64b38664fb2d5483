"""Train a teacher on the clips: SlotContrast or another system."""

import sys

from jobs._job import Job
from jobs._main import run

JOB = Job(
    "teacher",
    __doc__,
    "pipeline.distill.stage:train_teacher",
    sections=("teacher", "targets", "evaluate", "mlflow", "ray", "storage"),
)

if __name__ == "__main__":
    sys.exit(run(JOB))
