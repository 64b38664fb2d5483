"""Where a registered model comes from, back to its videos.

The exit code is 1 where a link of the chain is missing.
"""

from __future__ import annotations

import sys
from typing import Any

from jobs._job import REGISTERED, REGISTRY_KEYS, Job, Option
from jobs._main import run
from pipeline.config import Config


def lineage(config: Config, model: str, videos: bool) -> dict[str, Any]:
    from pipeline.registry.lineage import trace

    found = trace(model, config.tracking_uri)
    print(found.tree(all_videos=videos))
    return found.summary()


JOB = Job(
    "lineage",
    __doc__,
    lineage,
    words=(REGISTERED,),
    options=(Option("--videos", "list every video, not the first few"),),
    keys=REGISTRY_KEYS,
)

if __name__ == "__main__":
    sys.exit(run(JOB))
