"""Train and compare students of several settings; register the best.

Every setting is trained from several seeds and scored; the alias follows the mean.
"""

import sys

from jobs._job import Job
from jobs._main import run

JOB = Job(
    "sweep",
    __doc__,
    "pipeline.sweep.stage:sweep",
    sections=("sweep", "distill", "student", "targets", "evaluate", "mlflow", "ray", "storage"),
    check="pipeline.sweep.settings:plan_trials",
)

if __name__ == "__main__":
    sys.exit(run(JOB))
