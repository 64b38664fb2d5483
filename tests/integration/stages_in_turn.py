"""Runs shard, teacher, cache, distill, evaluate and register of a config in one process: `… CONFIG OUT`."""

import json
import sys

import yaml

from pipeline.clips.stage import shard
from pipeline.compute import ray_session
from pipeline.config import resolve_config
from pipeline.distill.stage import distill, train_teacher
from pipeline.evaluate.stage import evaluate
from pipeline.registry.stage import register
from pipeline.targets.stage import cache

STAGES = {"shard": shard, "teacher": train_teacher, "cache": cache}
STAGES |= {"distill": distill, "evaluate": evaluate, "register": register}


def run_stages(config):
    """The summary of each stage by its name."""
    with ray_session(config):
        return {name: stage(config) for name, stage in STAGES.items()}


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        summaries = run_stages(resolve_config(yaml.safe_load(file)))
    with open(sys.argv[2], "w") as file:
        json.dump(summaries, file)
