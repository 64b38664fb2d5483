"""Train, score and compare students of several settings and seeds; register the best one."""

from __future__ import annotations

import sys
from typing import Any

from jobs._main import run_stage
from pipeline.config import Config


def stage(config: Config) -> dict[str, Any]:
    from pipeline.sweep.stage import run_sweep

    return run_sweep(config)


def check(config: Config) -> None:
    from pipeline.sweep.settings import plan_trials

    plan_trials(config)


if __name__ == "__main__":
    sys.exit(run_stage("sweep", __doc__ or "", stage, check))
