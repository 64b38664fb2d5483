"""Run the frozen teacher once over every clip and cache its slots."""

import sys

from jobs._job import Job
from jobs._main import run

JOB = Job(
    "cache",
    __doc__,
    "pipeline.targets.stage:cache",
    sections=("targets", "teacher", "student", "ray", "storage"),
)

if __name__ == "__main__":
    sys.exit(run(JOB))
