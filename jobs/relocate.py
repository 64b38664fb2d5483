"""Let database and manifests of a moved storage.root follow it.

Of the default database, SQLite in that folder, of which a copy is kept. No job may be at work in the folder.
"""

from __future__ import annotations

import sys

from jobs._job import Job, Word
from jobs._main import run

JOB = Job(
    "relocate",
    __doc__,
    "pipeline.tracking.moved:relocate",
    words=(Word("old", "OLD", "what storage.root was before, an absolute path"),),
    keys=("storage.root",),
)

if __name__ == "__main__":
    sys.exit(run(JOB))
