"""`python -m jobs` and the console command `slotmatch`: the list of stages, and each stage by its name."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from jobs._main import STAGES, find_job, refuse, run
from pipeline.config import ConfigError


def main() -> int:
    called = "slotmatch" if Path(sys.argv[0]).stem == "slotmatch" else "python -m jobs"
    stage, *words = sys.argv[1:] or ["--help"]
    if stage in ("-h", "--help"):
        print(_stages(called))
        return 0
    if stage == "--version":
        print(f"slotmatch {metadata.version('slotmatch')}")
        return 0
    try:
        job = find_job(stage)
    except ConfigError as error:
        return refuse(stage, error)
    return run(job, words, called=f"{called} {stage}")


def _stages(called: str) -> str:
    rows = [f"  {stage:<10}{find_job(stage).description.splitlines()[0]}" for stage in STAGES]
    return "\n".join(
        [
            f"usage: {called} STAGE …, or python -m jobs.STAGE …",
            "",
            *rows,
            "",
            f"{called} STAGE --help says what a stage takes. A first try, which runs nothing:",
            f"  {called} pipeline demo.yaml --dry-run",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
