"""The paper's tables and figures from recorded evaluations.

Written as Markdown and HTML, beside the paper's numbers.
"""

from __future__ import annotations

import argparse
import sys

from jobs._job import Job, Option
from jobs._main import run


def count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, at least 0; nearest valid: 0")
    return int(text)


JOB = Job(
    "report",
    __doc__,
    "pipeline.report.stage:report",
    sections=("evaluate", "dataset", "mlflow", "storage"),
    options=(
        Option("--folder", "where to write; default: <storage.root>/report", "DIR"),
        Option("--latency-runs", "timed passes of each model, 5 by default; 0: none", "N", count, 5),
    ),
    default_config="demo.yaml",
)

if __name__ == "__main__":
    sys.exit(run(JOB))
