"""A disk that is full: under local storage, and under Ray's object store where it spills to."""

import contextlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from clusters import running_cluster
from helpers import GOLDEN_TEACHER, assert_kept, published_shards, wait_for

from pipeline import storage
from pipeline.clips.library import artifacts_of
from pipeline.clips.stage import shard_split
from pipeline.distill.stage import distill
from pipeline.log import root_cause
from pipeline.targets.stage import cache


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of some size (`3m`) in memory; its `resize(size)`."""
    folder.mkdir()

    def mount(*options):
        return subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)

    done = mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    if done.returncode:
        pytest.skip(f"this machine lets nobody mount a small disk ({done.stderr.strip()})")
    try:
        yield lambda size: mount("-o", f"remount,size={size}")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def half_written(folder):
    return [str(p) for p in Path(folder).rglob(".tmp-*")]


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", "64m") as resize:
        yield tmp_path / "disk", resize


def used(folder):
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


CHECKED = "names the disk, publishes nothing by half; with room again it makes what is missing"


@pytest.mark.slow
@pytest.mark.fault("full disk under local storage", "shard, cache, distill", CHECKED)
def test_a_full_disk_under_local_storage(tiny, disk, local_ray):
    folder, resize = disk
    settings = ["dataset.synthetic.videos=12", "dataset.synthetic.frames=24", "dataset.synthetic.size=96"]
    settings += ["clips.videos_per_shard=1", "clips.codec=raw", "targets.views=8", "evaluate.split=null"]
    places = [
        f"storage.root={folder / 'root'}",
        f"mlflow.tracking_uri=sqlite:///{folder.parent / 'mlflow.db'}",
    ]
    config = tiny(*GOLDEN_TEACHER, *settings, *places)

    def fills_up(stage, room):
        """Runs a stage with so much room, which is too little, then with enough."""
        resize(used(folder) + room)
        with pytest.raises(Exception, match="No space left on device") as caught:
            stage()
        assert str(root_cause(caught.value)).startswith("[Errno 28] No space left on device"), (
            "as the job says it"
        )
        assert half_written(folder) == []
        resize("64m")

    uri = artifacts_of(config).clips.uri
    fills_up(lambda: shard_split(config, ""), 3_500_000)  # a shard is 0.7 MB
    assert not storage.is_complete(uri)
    before = published_shards(uri)
    assert shard_split(config, "")["reused_shards"] == len(before)
    assert_kept(before, uri)

    targets = artifacts_of(config).targets.uri
    fills_up(lambda: cache(config), 300_000)  # a shard is 0.1 MB
    assert not storage.is_complete(targets)
    assert cache(config)["rows"] == 12 * 6 * 8

    fills_up(lambda: distill(config), 60_000)  # a checkpoint is more
    run = artifacts_of(config).student.uri
    assert not storage.is_complete(run)
    assert distill(config)["steps"] == config.distill.steps


FILLER = textwrap.dedent("""
    import logging, sys, time
    import numpy as np, ray
    ray.init(address="auto", logging_level=logging.ERROR)
    kept = []
    try:
        for _ in range(100):
            kept.append(ray.put(np.random.default_rng(0).bytes(10_000_000)))
    except Exception as error:
        print("full:", type(error).__name__, flush=True)
    time.sleep(600)
""")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.fault(
    "full disk under the object store's spill",
    "shard, cache",
    "both end well: only names and counts cross the store",
)
def test_a_full_disk_under_the_spill(tiny, tmp_path):
    config = tiny(*GOLDEN_TEACHER, "evaluate.split=null")
    spill = (f"--object-spilling-directory={tmp_path / 'spill'}", "--object-store-memory=80000000")
    with (
        small_disk(tmp_path / "spill", "30m"),
        running_cluster(tmp_path / "cluster", nodes=1, head_cpus=2, options=spill) as cluster,
    ):
        filler = subprocess.Popen(
            [sys.executable, "-c", FILLER], env=cluster.job_environment(), stdout=subprocess.PIPE, text=True
        )
        try:
            assert any(line.startswith("full: ") for line in filler.stdout)  # after what Ray says of it
            wait_for(lambda: used(tmp_path / "spill") > 0)
            assert cluster.job("shard", config).finish()["frames"] == 90
            assert cluster.job("cache", config).finish()["rows"] == 30
        finally:
            filler.kill()
