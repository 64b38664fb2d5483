"""The usual chain, submitted to a cluster with an S3 bucket and an MLflow server; and no secret is left anywhere."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from clusters import Cluster
from helpers import GOLDEN_TEACHER

from pipeline.models import load_slot_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# What a leak would show; each is the password that its service really asks for.
PLANTED = {
    "AWS_ACCESS_KEY_ID": "PLANTEDKEYID0001",
    "AWS_SECRET_ACCESS_KEY": "planted-s3-secret-0002",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-password-0003",
    "RAY_AUTH_TOKEN": "a0b0c0d0" * 4,
}
PYTHON = (sys.executable, "-m")
KEPT_HERE = ("env", "state.json")  # where they are kept, for their owner alone
SETTINGS = [*GOLDEN_TEACHER, "distill.workers=2", "distill.cpus_per_worker=0.8"]
SETTINGS += ["sweep.grid={distill.beta: [0.1, 0.5]}", "sweep.seeds=[0]"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), {"OMP_NUM_THREADS": "1", **PLANTED})
    try:
        cluster.start_s3()
        cluster.start_mlflow()
        cluster.start_head(1)
        cluster.start_worker("node-1", 1)
        yield cluster
    finally:
        cluster.stop_all()


def run(cluster, *command, **environment):
    options = {
        "env": {**os.environ, **cluster.environment, **environment},
        "capture_output": True,
        "text": True,
    }
    result = subprocess.run(command, **options)
    return result.returncode, result.stdout, result.stderr


@pytest.fixture(scope="module")
def chain(cluster, shared_tiny):
    """The summaries of all stages by their names, and all that the submissions printed."""
    places = [
        "storage.root=s3://slotmatch/test",
        f"mlflow.tracking_uri={cluster.environment['MLFLOW_TRACKING_URI']}",
    ]
    config = shared_tiny(*SETTINGS, *places)
    job = cluster.submit("shard,cache,distill,sweep,evaluate,register", config)
    out, _ = job.popen.communicate(timeout=900)
    assert job.popen.returncode == 0, job.output()[-5000:]
    summaries = {line["job"]: line for line in map(json.loads, out.splitlines())}
    return config, summaries, out + job.output()


def test_every_stage_ends_well_and_says_so(chain):
    _, summaries, _ = chain
    assert list(summaries) == ["shard", "cache", "distill", "sweep", "evaluate", "register"]
    assert {s["status"] for s in summaries.values()} == {"ok"}
    assert summaries["shard"]["uri"].startswith("s3://slotmatch/test/clips/")


def test_the_champion_tells_where_it_comes_from(cluster, chain, tmp_path):
    _, summaries, _ = chain
    code, out, errors = run(cluster, *PYTHON, "jobs.lineage", "models:/slotmatch@champion")
    assert code == 0, errors
    lineage = json.loads(out.splitlines()[-1])
    assert lineage["clips"]["uri"] == summaries["shard"]["uri"]
    assert lineage["targets"]["uri"] == summaries["cache"]["uri"]
    assert lineage["run"]["uri"].startswith("s3://slotmatch/test/students/")
    assert len(lineage["run"]["git_revision"]) == 40
    assert lineage["clips"]["video_ids"]
    code, _, errors = run(
        cluster, *PYTHON, "jobs.pull", "models:/slotmatch@champion", str(tmp_path / "champion")
    )
    assert code == 0, errors
    load_slot_model(tmp_path / "champion")


@pytest.mark.fault(
    "missing bucket, wrong password",
    "shard, register",
    "exit code 1 at once, with the bucket, the server and who asked",
)
def test_what_is_refused_is_said(cluster, chain, tmp_path):
    config, _, _ = chain
    job = cluster.submit("shard", config, "storage.root=s3://nobodys-bucket/x")
    code, summary = job.end()
    assert (code, summary["status"]) == (1, "failed")
    assert "nobodys-bucket" in summary["error"]
    pull = (*PYTHON, "jobs.pull", "models:/slotmatch@champion", str(tmp_path / "model"))
    code, out, errors = run(cluster, *pull, MLFLOW_TRACKING_PASSWORD="not-the-password")
    assert code == 1
    assert cluster.environment["MLFLOW_TRACKING_URI"] in out
    assert "admin" in out
    assert "not-the-password" not in out + errors


@pytest.mark.fault("planted secrets", "all", "in no log, job metadata, MLflow record or stored object")
def test_planted_secrets_are_nowhere(cluster, chain):
    *_, printed = chain
    code, listed, errors = run(cluster, str(Path(sys.executable).with_name("ray")), "job", "list")
    assert code == 0, errors
    assert listed.count("SLOTMATCH_REVISION") >= 6  # the jobs' environments are in it
    places = {"what the submissions printed": printed.encode(), "ray job list": listed.encode()}
    for folder in (cluster.folder, cluster.ray_folder):
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.name not in KEPT_HERE:
                places[str(path)] = path.read_bytes()
    assert any("/logs/" in place for place in places)
    assert any(place.endswith("mlflow.db") for place in places)
    assert any(place.endswith("manifest.json") for place in places)
    pairs = itertools.product(PLANTED.items(), places.items())
    found = [(name, place) for (name, secret), (place, data) in pairs if secret.encode() in data]
    assert found == []
