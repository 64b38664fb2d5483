"""A tiny data set and tiny models, and one local Ray for all tests that run stages in this process."""

import json
import subprocess
import sys
import time

import pytest
import yaml
from services import MLflowServer
from tiny_models import tiny_section

from pipeline.compute import ray_session
from pipeline.config import resolve_config

TRAINING = {"batch_size": 4, "warmup_steps": 2, "learning_rate": 0.002, "workers": 0, "log_every": 1}
TINY = {
    "dataset": {
        "kind": "synthetic",
        "synthetic": {"videos": 10, "validation_videos": 3, "frames": 9, "size": 48},
    },
    "clips": {"clip_frames": 4, "videos_per_shard": 3, "codec": "png"},
    "teacher": {
        **tiny_section(48, 48, (32, 32)),
        "backbone": {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
        **{"num_slots": 4, "slot_size": 16},
        "train": {**TRAINING, "steps": 6, "checkpoint_every": 3},
    },
    "student": tiny_section(24, 40, (32, 32)),
    "distill": {**TRAINING, "steps": 8, "checkpoint_every": 4},
    "evaluate": {"split": "validation"},
    # One actor a stage on `local_ray` would do all the work, so this process does it: an actor imports torch and timm,
    # 5 s of a core, which is most of what a test costs. Clusters (clusters.py), whose nodes have one CPU, and the demo
    # have one for each core.
    "ray": {"teacher_cpus": 1.5},
}


def _builder(root):
    def build(*overrides):
        values = yaml.safe_load(yaml.safe_dump(TINY))
        return resolve_config(values, [f"storage.root={root}", *overrides])

    return build


@pytest.fixture
def tiny(tmp_path):
    """`tiny(*overrides)` is the tiny config with everything under the test's own folder."""
    return _builder(tmp_path / "root")


@pytest.fixture(scope="module")
def shared_tiny(tmp_path_factory):
    """The same, with everything under one folder for all tests of a file."""
    return _builder(tmp_path_factory.mktemp("shared") / "root")


@pytest.fixture(scope="session")
def local_ray():
    with ray_session(resolve_config({"ray": {"num_cpus": 3}})):
        yield


@pytest.fixture(scope="session")
def _mlflow_server(tmp_path_factory):
    server = MLflowServer(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.kill()


@pytest.fixture
def mlflow_server(_mlflow_server):
    """A running MLflow server at `.uri`, which a test may `.kill()` and `.start()` again."""
    _mlflow_server.start()
    return _mlflow_server


@pytest.fixture
def job(tmp_path):
    """`job("shard", config)` starts the entry point as a user does; `.finish()` gives its summary."""
    started = []

    def start(name, config, *arguments):
        path = tmp_path / f"{name}-{len(started)}.yaml"
        path.write_text(config.to_yaml())
        process = Job(name, [sys.executable, "-m", f"jobs.{name}", str(path), *arguments], tmp_path)
        started.append(process)
        return process

    yield start
    for process in started:
        process.popen.kill()


class Job:
    def __init__(self, name, command, folder):
        self.name = name
        self._errors = folder / f"{name}-{time.monotonic_ns()}.log"  # a file: no pipe that could fill up
        with open(self._errors, "wb") as errors:
            self.popen = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder
            )

    def error_output(self):
        return self._errors.read_text()

    def finish(self, timeout=280):
        """The summary, after checking that the job ended well."""
        out, _ = self.popen.communicate(timeout=timeout)
        assert self.popen.returncode == 0, (
            f"{self.name} failed:\n{out[-2000:]}\n{self.error_output()[-4000:]}"
        )
        return json.loads(out.strip().splitlines()[-1])
