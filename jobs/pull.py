"""Write a registered model as safetensors and a config."""

from __future__ import annotations

import sys
from typing import Any

from jobs._job import REGISTERED, REGISTRY_KEYS, Job, Word
from jobs._main import run
from pipeline.config import Config


def pull(config: Config, model: str, folder: str) -> dict[str, Any]:
    from pipeline.registry import stage

    return stage.pull(model, folder, config.tracking_uri)


JOB = Job(
    "pull",
    __doc__,
    pull,
    words=(
        REGISTERED,
        Word("folder", "DIR", "the folder to write to, or hf://USER/REPO of the Hugging Face Hub"),
    ),
    keys=REGISTRY_KEYS,
)

if __name__ == "__main__":
    sys.exit(run(JOB))
