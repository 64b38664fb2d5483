"""All stages in turn: from videos to a champion in the registry."""

from __future__ import annotations

import sys
from typing import Any

from jobs._job import Job
from jobs._main import run
from pipeline.config import Config


def stage(config: Config) -> dict[str, Any]:
    from pipeline.line import run as run_line

    return run_line(config)


JOB = Job("pipeline", __doc__, stage, tuple(Config.model_fields))

if __name__ == "__main__":
    sys.exit(run(JOB))
