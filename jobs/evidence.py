"""Score a sweep's students on a test split; say which claims hold.

Trains every way to distil from several seeds first, where that was not done.
"""

import sys

from jobs._job import Job
from jobs._main import run

JOB = Job(
    "evidence",
    __doc__,
    "pipeline.sweep.evidence:evidence",
    sections=("evidence", "sweep", "evaluate", "distill", "mlflow", "ray", "storage"),
    check="pipeline.sweep.settings:check_evidence",
)

if __name__ == "__main__":
    sys.exit(run(JOB))
