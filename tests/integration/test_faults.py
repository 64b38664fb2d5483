"""Jobs that are killed are run again, and nothing is lost, repeated or half-written."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from helpers import (
    GOLDEN_TEACHER,
    assert_kept,
    command_line,
    kill_with_family,
    published_shards,
    resumed_from,
    wait_for,
)

from pipeline import storage
from pipeline.clips.library import artifacts_of
from pipeline.clips.stage import shard_split
from pipeline.clips.table import ClipSet
from pipeline.distill.stage import NonFiniteLoss, distill, train_teacher
from pipeline.models import load_slot_model
from pipeline.targets.stage import cache


def kill_at_two_shards(process, uri):
    """SIGKILL of the driver once two shards are there; what was published by then."""
    wait_for(lambda: len(published_shards(uri)) >= 2 or process.popen.poll() is not None)
    assert process.popen.poll() is None, "the job ended before it could be killed: too little work"
    kill_with_family(process)
    assert not storage.is_complete(uri)
    return published_shards(uri)


@pytest.mark.slow
@pytest.mark.fault("SIGKILL of the driver", "shard", "run again, it makes what is missing and nothing else")
def test_shard_killed_goes_on_with_what_is_missing(tiny, job):
    size = ["dataset.synthetic.videos=60", "dataset.synthetic.frames=60", "dataset.synthetic.size=96"]
    config = tiny(*size, "clips.videos_per_shard=2", "evaluate.split=null")
    uri = artifacts_of(config).clips.uri
    before = kill_at_two_shards(job("shard", config), uri)
    assert 2 <= len(before) < 30
    summary = job("shard", config).finish()
    assert summary["reused_shards"] == len(before)
    assert summary["computed_shards"] == 30 - len(before)
    assert_kept(before, uri)
    assert ClipSet(uri).manifest.frames == 60 * 60


@pytest.mark.slow
@pytest.mark.fault("SIGKILL of the driver", "cache", "run again, it makes what is missing and nothing else")
def test_cache_killed_goes_on_with_what_is_missing(tiny, job, local_ray):
    size = ["dataset.synthetic.videos=40", "dataset.synthetic.frames=24", "clips.videos_per_shard=1"]
    config = tiny(*GOLDEN_TEACHER, *size, "targets.views=4", "targets.batch_size=2")
    shard_split(config, "")
    uri = artifacts_of(config).targets.uri
    before = kill_at_two_shards(job("cache", config), uri)
    assert 2 <= len(before) < 40
    summary = cache(config)
    assert summary["reused_shards"] == len(before)
    assert summary["computed_shards"] == 40 - len(before)
    assert_kept(before, uri)


@pytest.mark.slow
@pytest.mark.timeout(900)  # three starts of Ray, on machines that may be busy
@pytest.mark.fault("SIGKILL of a Train worker", "distill", "goes on from a checkpoint to the unbroken curve")
@pytest.mark.fault("SIGKILL of the driver", "distill", "run again, the same")
def test_distillation_killed_twice_gives_the_unbroken_curve(tiny, job, local_ray):
    """SIGKILL of a Ray Train worker, then of the whole driver; then the job is run once more."""
    settings = ["distill.workers=2", "distill.cpus_per_worker=0.5", "distill.steps=240", "targets.views=2"]
    settings += ["distill.checkpoint_every=30", "distill.keep_checkpoints=10", "distill.log_every=1"]
    settings += ["student.decoder_hidden_sizes=[512,512]", "student.num_slots=4"]
    unbroken = tiny(*settings, "distill.name=unbroken")
    shard_split(unbroken, "")
    train_teacher(unbroken)
    cache(unbroken)
    expected = storage.read_json(distill(unbroken)["history"])

    broken = tiny(*settings, "distill.name=broken")
    run = Path(artifacts_of(broken).student.uri)
    process = job("distill", broken)
    checkpoints = run / "checkpoints"
    wait_for(lambda: (checkpoints / "step_00000030" / storage.MANIFEST).exists())
    family = psutil.Process(process.popen.pid).children(recursive=True)
    worker = next(child for child in family if "RayTrainWorker" in command_line(child))
    worker.send_signal(signal.SIGKILL)
    wait_for(lambda: len(list(checkpoints.glob(f"*/{storage.MANIFEST}"))) >= 4)
    kill_with_family(process)
    assert not storage.is_complete(str(run))
    assert max(resumed_from(process.error_output())) >= 30

    last = job("distill", broken)
    summary = last.finish()
    assert max(resumed_from(last.error_output())) >= 120
    assert summary["steps"] == 240
    resumed = storage.read_json(summary["history"])
    assert [row["step"] for row in resumed] == list(range(1, 241))
    assert resumed == expected


@pytest.mark.fault("NaN loss", "distill", "stops, says why, keeps the last good checkpoint")
def test_nan_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tiny, local_ray):
    settings = ["distill.learning_rate=1e30", "distill.gradient_clip=1e30", "distill.warmup_steps=3"]
    config = tiny(*settings, "distill.checkpoint_every=1")
    shard_split(config, "")
    train_teacher(config)
    cache(config)
    with pytest.raises(NonFiniteLoss, match="learning rate"):
        distill(config)
    run = artifacts_of(config).student.uri
    assert not storage.is_complete(run)
    names = sorted(os.listdir(Path(run) / "checkpoints"))
    assert names
    load_slot_model(Path(run) / "checkpoints" / names[-1])


OTHER_RAY = "import ray, sys; ray.init('local', num_cpus=1); print('there', flush=True); sys.stdin.read()"


@pytest.mark.fault(
    "another Ray on this machine", "distill", "the training knows which it is on, and no longer"
)
def test_another_ray_beside_a_training(tiny, local_ray, monkeypatch, capfd):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = tiny("distill.method=no_kd", "distill.workers=1")
    shard_split(config, "")
    command = [sys.executable, "-c", OTHER_RAY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "there\n"
        summary = distill(config)
    assert summary["steps"] == config.distill.steps
    assert "Traceback" not in capfd.readouterr().err
    assert "RAY_ADDRESS" not in os.environ, "what is started now has a Ray of its own"
