"""All stages in turn: from videos to a champion in the registry."""

import sys

from jobs._job import Job
from jobs._main import run
from pipeline.config import Config

JOB = Job(
    "pipeline",
    __doc__,
    "pipeline.line:run",
    sections=tuple(Config.model_fields),
)

if __name__ == "__main__":
    sys.exit(run(JOB))
