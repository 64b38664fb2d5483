"""Real clusters of three Ray nodes that lose workers, nodes, drivers and their head in the middle of a stage."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clusters import SMALL_STORE, processes, running_cluster
from helpers import GOLDEN_TEACHER, assert_kept, is_alive, published_shards, resumed_from, wait_for

from pipeline import storage
from pipeline.artifacts.manifests import RunManifest
from pipeline.clips.library import artifacts_of
from pipeline.clips.stage import shard_split
from pipeline.clips.table import ClipSet
from pipeline.distill.stage import distill
from pipeline.targets.table import TargetSet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TEACHER = [*GOLDEN_TEACHER, "evaluate.split=null"]
LONG_SHARD = ["dataset.synthetic.videos=60", "dataset.synthetic.frames=60", "dataset.synthetic.size=96"]
LONG_SHARD += ["clips.videos_per_shard=2", "evaluate.split=null"]
LONG_DISTILL = [*TEACHER, "distill.workers=2", "distill.cpus_per_worker=0.9", "distill.steps=300"]
LONG_DISTILL += ["distill.keep_checkpoints=20", "student.decoder_hidden_sizes=[512,512]"]


@pytest.fixture(scope="module")
def any_cluster(tmp_path_factory):
    """A head, which runs drivers only, and two nodes with a CPU each, of which some may be dead."""
    # Ray's notices of nodes that go are looked for every second, not every five.
    fast = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}
    with running_cluster(tmp_path_factory.mktemp("cluster"), nodes=3, environment=fast) as cluster:
        yield cluster


@pytest.fixture
def cluster(any_cluster):
    """All of its nodes alive."""
    return whole(any_cluster)


def whole(cluster):
    for name in ("node-1", "node-2"):
        if name not in cluster.pids:
            cluster.start_worker(name, 1, *SMALL_STORE)
    return cluster


def new_shards(uri, more_than, job):
    wait_for(lambda: len(published_shards(uri)) > more_than or not job.running())
    assert job.running(), f"the job ended too early: too little work\n{job.output()[-3000:]}"
    return published_shards(uri)


def worker_of(cluster, title):
    """A node, its process that does some work, and that process, once there is one."""

    def find():
        for node in ("node-1", "node-2"):
            for process in processes(cluster, node, title):
                return node, process
        return None

    return wait_for(find)


@pytest.mark.fault("SIGKILL of a Data worker", "shard", "every video and frame is there once")
@pytest.mark.fault("SIGKILL of a node's raylet", "shard", "the same, in the same job")
def test_shard_loses_a_worker_and_a_node(tiny, cluster):
    config = tiny(*LONG_SHARD)
    uri = artifacts_of(config).clips.uri
    job = cluster.job("shard", config)
    new_shards(uri, 0, job)
    _, worker = worker_of(cluster, "ray::Map(shard_task)")
    worker.kill()
    before = new_shards(uri, 4, job)
    node, _ = worker_of(cluster, "ray::Map(shard_task)")
    cluster.kill(node)
    assert job.finish()["computed_shards"] == 30
    clips = ClipSet(uri)
    assert clips.manifest.frames == 60 * 60
    assert len({v.video_id for v in clips.videos}) == len(clips.videos) == 60
    assert clips.manifest.bad == ()
    assert_kept(before, uri)


@pytest.mark.fault("SIGKILL of a Data actor", "cache", "every row is there once")
@pytest.mark.fault("SIGKILL of a node's raylet", "cache", "the same, in the same job")
def test_cache_loses_an_actor_and_a_node(tiny, cluster):
    size = ["dataset.synthetic.videos=60", "dataset.synthetic.frames=24", "clips.videos_per_shard=1"]
    config = tiny(*TEACHER, *size, "targets.views=6", "targets.batch_size=2")
    cluster.job("shard", config).finish()
    clips = ClipSet(artifacts_of(config).clips.uri)
    uri = artifacts_of(config).targets.uri
    job = cluster.job("cache", config)
    new_shards(uri, 0, job)
    _, actor = worker_of(cluster, "ray::MapWorker")
    actor.kill()
    before = new_shards(uri, 6, job)
    node, _ = worker_of(cluster, "ray::MapWorker")
    cluster.kill(node)
    assert job.finish()["computed_shards"] == 60
    targets = TargetSet(uri)
    for name in clips.shards:
        for row in range(6):
            video, index, _ = targets.read(name, 0, row)
            assert (video, index) == (clips.read_clip(name, 0).video_id, 0)
    assert_kept(before, uri)


@pytest.fixture(scope="module")
def unbroken(shared_tiny, any_cluster):
    """Clips and targets, and the losses of a distillation that nothing happens to."""
    cluster = whole(any_cluster)
    config = shared_tiny(*LONG_DISTILL, "distill.name=unbroken", "distill.checkpoint_every=100")
    cluster.job("shard", config).finish()
    cluster.job("cache", config).finish()
    return storage.read_json(cluster.job("distill", config).finish()["history"])


def checkpoints(run):
    folder = Path(run) / "checkpoints"
    return sorted(int(p.parent.name.removeprefix("step_")) for p in folder.glob(f"*/{storage.MANIFEST}"))


@pytest.mark.fault("SIGKILL of a node's raylet", "distill", "goes on from a checkpoint to the unbroken curve")
def test_distillation_loses_a_node(shared_tiny, cluster, unbroken):
    config = shared_tiny(*LONG_DISTILL, "distill.name=loses a node", "distill.checkpoint_every=30")
    run = artifacts_of(config).student.uri
    job = cluster.job("distill", config)
    wait_for(lambda: checkpoints(run) or not job.running())
    node, _ = worker_of(cluster, "RayTrainWorker")
    cluster.kill(node)
    whole(cluster)
    summary = job.finish()
    assert max(resumed_from(job.output())) >= 30
    assert storage.read_json(summary["history"]) == unbroken


@pytest.mark.fault(
    "SIGKILL of a node's raylet, and no node comes",
    "distill",
    "elastic: fewer workers, on the unbroken curve",
)
def test_an_elastic_distillation_goes_on_without_a_node(shared_tiny, cluster):
    # Two workers and one round differently; at this learning rate that does not grow as the steps go on.
    settings = [*LONG_DISTILL, "distill.learning_rate=1e-5", "distill.method=no_kd", "distill.steps=100"]
    cluster.job("shard", shared_tiny(*settings)).finish()
    alone = distill(shared_tiny(*settings, "distill.name=alone", "distill.workers=0"))
    options = ["distill.name=elastic", "distill.workers=[1, 2]", "distill.checkpoint_every=20"]
    config = shared_tiny(*settings, *options)
    run = artifacts_of(config).student.uri
    job = cluster.job("distill", config)
    wait_for(lambda: checkpoints(run) or not job.running(), 280)
    node, _ = worker_of(cluster, "RayTrainWorker")
    cluster.kill(node)
    summary = job.finish()
    said = [int(n) for n in re.findall(r"on (\d) workers? \(workers=\[1, 2\]\)", job.output())]
    assert (said[0], said[-1]) == (2, 1)
    assert max(resumed_from(job.output())) >= 20
    assert RunManifest.read(summary["uri"]).tags["workers"] == "1"
    # Of the losses; the gradient jumps where a unit of the decoder is on the edge of its ReLU.
    keys = ("total", "contrast", "reconstruction")
    curves = [[row[key] for row in storage.read_json(s["history"]) for key in keys] for s in (summary, alone)]
    assert len(curves[0]) == 300
    assert curves[0] == pytest.approx(curves[1], rel=1e-5, abs=1e-5)


@pytest.mark.fault(
    "preemption notice", "distill", "a checkpoint at once, from which it goes on to the unbroken curve"
)
def test_a_preemption_notice_makes_a_checkpoint_at_once(shared_tiny, cluster, unbroken):
    config = shared_tiny(*LONG_DISTILL, "distill.name=preempted", "distill.checkpoint_every=300")
    run = artifacts_of(config).student.uri
    job = cluster.job("distill", config)
    node, _ = worker_of(cluster, "RayTrainWorker")
    wait_for(lambda: "steps/s" in job.output())
    raylet = processes(cluster, node, "raylet/raylet")[0]
    seconds = 20
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "drain-node", "--address", cluster.address, "--node-id", node_id(raylet)]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    command += ["--deadline-remaining-seconds", str(seconds)]
    subprocess.run(command, env=cluster.job_environment(), check=True, capture_output=True)
    asked = time.monotonic()
    noticed = wait_for(lambda: checkpoints(run) or not job.running())
    assert job.running()
    assert noticed[0] < 300
    assert time.monotonic() - asked < seconds, "the node was gone before the checkpoint was there"
    cluster.kill(node)  # before its time, as on a fast machine the training would end before that
    whole(cluster)
    summary = job.finish()
    assert "is about to be taken away" in job.output()
    assert noticed[0] in resumed_from(job.output())
    assert storage.read_json(summary["history"]) == unbroken


def node_id(raylet):
    """Ray's id of a node, from its raylet's command line."""
    return next(word.split("=")[1] for word in raylet.cmdline() if word.startswith("--node_id="))


@pytest.mark.fault("two jobs on the same targets", "cache", "one works, both end well with the same targets")
def test_two_cache_jobs_at_once(shared_tiny, cluster, unbroken):
    config = shared_tiny(*LONG_DISTILL, "targets.views=3")
    uri = artifacts_of(config).targets.uri
    jobs = [cluster.job("cache", config), cluster.job("cache", config)]
    summaries = [job.finish() for job in jobs]
    assert {s["uri"] for s in summaries} == {uri}
    shards = ClipSet(artifacts_of(config).clips.uri).shards
    assert sorted(s["computed_shards"] for s in summaries) == [0, len(shards)]
    assert any("another job is at this already" in job.output() for job in jobs)


def test_a_job_waits_for_the_gpus_that_it_asks_for(shared_tiny, cluster, unbroken):
    config = shared_tiny(*LONG_DISTILL, "targets.views=2", "ray.gpus=1")
    job = cluster.job("cache", config)
    wait_for(lambda: "waiting for GPUs, 0 of 1" in job.output() or not job.running())
    assert job.running()
    cluster.start_worker("gpu-node", 1, "--num-gpus=1", *SMALL_STORE)
    try:
        assert job.finish()["views"] == 2
    finally:
        cluster.stop("gpu-node")


def driver_of(cluster, title):
    """The submitted driver itself, not the shell around it."""
    found = [p for p in processes(cluster, "head", title) if "python" in p.name().lower() and is_alive(p)]
    return found[-1] if found else None


@pytest.mark.fault(
    "SIGKILL of a submitted job's driver", "shard", "submitted again, it makes what is missing"
)
@pytest.mark.fault("ray job stop", "shard", "the same")
@pytest.mark.fault("SIGKILL of the head and all nodes", "shard", "the same, on a new head")
def test_a_submitted_job_is_killed_stopped_and_loses_its_cluster(tiny, cluster):
    config = tiny(*LONG_SHARD, "dataset.synthetic.videos=90")
    uri = artifacts_of(config).clips.uri
    ray = str(Path(sys.executable).with_name("ray"))

    first = cluster.submit("shard", config)
    made = new_shards(uri, 1, first)
    wait_for(lambda: driver_of(cluster, "jobs.shard")).send_signal(signal.SIGKILL)
    assert first.end() == (1, None)
    assert not storage.is_complete(uri)

    second = cluster.submit("shard", config)
    made = new_shards(uri, len(made) + 2, second)
    stop = [ray, "job", "stop", re.search(r"slotmatch-shard-[\d-]+", second.output())[0]]
    subprocess.run(stop, env={**os.environ, **cluster.environment}, check=True, capture_output=True)
    assert second.end()[0] == 1
    assert not storage.is_complete(uri)

    third = cluster.submit("shard", config)
    made = new_shards(uri, len(made) + 2, third)
    for node in ("head", "node-1", "node-2"):
        cluster.kill(node)
    assert third.end()[0] != 0
    assert not storage.is_complete(uri)

    cluster.start_head(0, *SMALL_STORE)
    whole(cluster)
    fourth = cluster.submit("shard", config)
    made = new_shards(uri, 0, fourth)
    summary = fourth.finish()
    assert summary["computed_shards"] + summary["reused_shards"] == 45
    assert summary["reused_shards"] >= len(made) - 3
    assert_kept(made, uri)
    assert shard_split(config, "")["computed_shards"] == 0
    assert ClipSet(uri).manifest.frames == 90 * 60
