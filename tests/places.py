"""Where things lie in this repository, and Python processes that start there."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
GOLDEN = ROOT / "tests" / "golden"


def python(*words, ends=0, timeout=250, **environment):
    """What `python …` printed, (out, err), after checking how it ended; None: killed."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == ends or (ends is None and done.returncode < 0), done.stderr
    return done.stdout, done.stderr
