"""Decode videos into a published set of Parquet frame clips."""

import sys

from jobs._job import Job
from jobs._main import run

JOB = Job(
    "shard",
    __doc__,
    "pipeline.clips.stage:shard",
    sections=("dataset", "clips", "ray", "storage"),
)

if __name__ == "__main__":
    sys.exit(run(JOB))
