"""Train the paper's rivals; score them beside the config's models.

Each system from several seeds, all on the same clips; what is there is reused.
"""

import sys

from jobs._job import Job
from jobs._main import run

JOB = Job(
    "rivals",
    __doc__,
    "pipeline.sweep.rivals:rivals",
    sections=("rivals", "evaluate", "mlflow", "ray", "storage"),
    check="pipeline.sweep.settings:plan_rivals",
)

if __name__ == "__main__":
    sys.exit(run(JOB))
