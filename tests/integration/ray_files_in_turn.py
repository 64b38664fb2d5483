"""A run of Ray Train and one of Ray Tune, restored once, whose files are at a URI: prints what came of them as JSON.

A script, because workers of a Ray that runs already would not know of the server.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import ray
import ray.train
from ray import tune
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from pipeline import storage
from pipeline.compute import arrow_filesystem

WEIGHTS = 20 << 20  # bytes: three parts of an upload
STEPS = 3


def write_checkpoint(folder, step):
    (Path(folder) / "weights").write_bytes(bytes([step]) * WEIGHTS)


def train_loop():
    for step in range(STEPS):
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(folder, step)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": step}, checkpoint=checkpoint)


def trial(config):
    for step in range(STEPS):
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(folder, step)
            checkpoint = tune.Checkpoint.from_directory(folder)
            tune.report({"score": config["x"] * step}, checkpoint=checkpoint)


def last_step(checkpoint):
    """The step whose weights a checkpoint holds; None where they aren't whole."""
    with checkpoint.as_directory() as folder:
        weights = (Path(folder) / "weights").read_bytes()
    return weights[0] if weights == weights[:1] * WEIGHTS else None


def main(uri):
    filesystem, path = arrow_filesystem(uri), storage.filesystem(uri)[1]
    place = {"storage_path": path, "storage_filesystem": filesystem}
    ray.init(address="local", num_cpus=2)
    workers = ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5})
    trained = TorchTrainer(
        train_loop, scaling_config=workers, run_config=RunConfig(name="train", **place)
    ).fit()
    small = tune.with_resources(trial, {"CPU": 0.5})
    run_config = tune.RunConfig(name="tune", **place)
    tune.Tuner(small, param_space={"x": tune.grid_search([1, 2])}, run_config=run_config).fit()
    tuned = tune.Tuner.restore(f"{path}/tune", trainable=small, storage_filesystem=filesystem).fit()
    outcome = {
        "train": last_step(trained.checkpoint),
        "tune": [last_step(result.checkpoint) for result in tuned],
        "scores": sorted(result.metrics["score"] for result in tuned),
    }
    ray.shutdown()
    print(json.dumps(outcome))


if __name__ == "__main__":
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"
    main(sys.argv[1])
