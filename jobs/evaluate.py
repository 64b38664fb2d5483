"""Score the student on the evaluation split, beside trivial baselines."""

from __future__ import annotations

import sys
from typing import Any

from jobs._main import run_stage
from pipeline.config import Config


def stage(config: Config) -> dict[str, Any]:
    from pipeline.evaluate.stage import evaluate_stage

    return evaluate_stage(config)


if __name__ == "__main__":
    sys.exit(run_stage("evaluate", __doc__ or "", stage))
