"""Train a teacher: another name of the stage teacher."""

import sys
from dataclasses import replace

from jobs._main import run
from jobs.teacher import JOB as TEACHER

JOB = replace(TEACHER, name="train", description=__doc__)

if __name__ == "__main__":
    sys.exit(run(JOB))
