"""Make the student a version of the registered model."""

from __future__ import annotations

import sys
from typing import Any

from jobs._main import run_stage
from pipeline.config import Config


def stage(config: Config) -> dict[str, Any]:
    from pipeline.registry.stage import register_stage

    return register_stage(config)


if __name__ == "__main__":
    sys.exit(run_stage("register", __doc__ or "", stage))
