"""Train every way to distil from several seeds, score them on the test split, and say which claims hold."""

from __future__ import annotations

import sys
from typing import Any

from jobs._main import run_stage
from pipeline.config import Config


def stage(config: Config) -> dict[str, Any]:
    from pipeline.sweep.evidence import evidence

    return evidence(config)


def check(config: Config) -> None:
    from pipeline.sweep.evidence import check_evidence

    check_evidence(config)


if __name__ == "__main__":
    sys.exit(run_stage("evidence", __doc__ or "", stage, check))
