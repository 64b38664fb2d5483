"""Score the student on the evaluation split, beside trivial baselines."""

import sys

from jobs._job import Job
from jobs._main import run

JOB = Job(
    "evaluate",
    __doc__,
    "pipeline.evaluate.stage:evaluate",
    sections=("evaluate", "dataset", "mlflow", "ray", "storage"),
)

if __name__ == "__main__":
    sys.exit(run(JOB))
