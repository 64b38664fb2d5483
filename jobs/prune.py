"""List what nothing registered, swept or evaluated needs; delete it.

Nothing is deleted but with --delete. What this config uses stays, and what a job is at work in, what was changed
lately, what another MLflow has recorded, and all that these are made of.
"""

from __future__ import annotations

import sys
from typing import Any

from jobs._job import Job, Option
from jobs._main import run
from pipeline.config import Config


def prune(config: Config, delete: bool, older_than: float, versions: bool) -> dict[str, Any]:
    from pipeline.line import made_of
    from pipeline.registry import prune as stage

    return stage.prune(config, made_of, delete=delete, older_than=older_than, versions=versions)


JOB = Job(
    "prune",
    __doc__,
    prune,
    sections=("mlflow", "storage"),
    options=(
        Option("--delete", "delete what is listed"),
        Option("--older-than", "since the last change of what goes; default: 7", "DAYS", float, 7.0),
        Option("--versions", "versions of mlflow.model_name without an alias go too, if one is champion"),
    ),
)

if __name__ == "__main__":
    sys.exit(run(JOB))
