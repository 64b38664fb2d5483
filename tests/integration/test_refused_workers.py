"""A training run that the machines have no room for ends before anything says that it has begun."""

from pathlib import Path

import pytest

from pipeline import storage
from pipeline.clips.library import artifacts_of
from pipeline.clips.stage import shard
from pipeline.config import ConfigError
from pipeline.distill.stage import distill


def test_workers_that_do_not_fit_leave_no_run(tiny, local_ray):
    config = tiny("distill.method=no_kd", "distill.workers=4", "evaluate.split=null")  # 4 × 0.8 of 3 CPUs
    shard(config)
    with pytest.raises(ConfigError, match=r"workers: 4 don't fit .* nearest valid: 2"):
        distill(config)
    assert not storage.exists(storage.join(artifacts_of(config).student.uri, "config.yaml"))
    assert not Path(config.tracking_uri.removeprefix("sqlite:///")).exists()
