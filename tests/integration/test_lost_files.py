"""A published folder that has lost a file: who reads it names the way out, who makes it makes it again."""

from pathlib import Path

import pytest

from pipeline.clips.library import artifacts_of
from pipeline.clips.stage import shard
from pipeline.config import ConfigError
from pipeline.distill.stage import distill, train_teacher
from pipeline.evaluate.stage import evaluate
from pipeline.targets.stage import cache


@pytest.fixture(scope="module")
def line(shared_tiny, local_ray):
    """A config, and the folders of all that was made of it."""
    config = shared_tiny("clips.videos_per_shard=2", "evaluate.baselines=false")
    shard(config)
    train_teacher(config)
    cache(config)
    distill(config)
    evaluate(config)
    return config


def lose(uri, pattern):
    """Deletes one file of a folder; returns it with its bytes."""
    file = sorted(Path(uri).glob(pattern))[0]
    content = file.read_bytes()
    file.unlink()
    return file, content


@pytest.mark.fault(
    "a published shard was deleted", "shard, cache, distill", "named by the others, made again by shard"
)
def test_a_lost_shard_of_clips_is_made_again(line, capfd):
    file, content = lose(artifacts_of(line).clips.uri, "data/*.parquet")
    for stage in (cache, distill):
        with pytest.raises(ConfigError, match=r"lost 1 of its files .*python -m jobs\.shard CONFIG"):
            stage(line)
    summary = shard(line)
    assert (summary["computed_shards"], summary["reused_shards"] > 0) == (1, True)
    assert file.read_bytes() == content
    assert "making it again" in capfd.readouterr().err
    assert distill(line)["reused"]


def test_lost_targets_are_made_again(line):
    file, _ = lose(artifacts_of(line).targets.uri, "data/*.parquet")
    with pytest.raises(ConfigError, match=r"lost 1 of its files .*python -m jobs\.cache CONFIG"):
        distill(line)
    assert cache(line)["computed_shards"] == 1
    assert file.exists()


def test_a_lost_student_is_published_again_from_its_last_checkpoint(line, capfd):
    file, content = lose(artifacts_of(line).student.uri, "model/model.safetensors")
    assert not distill(line)["reused"]
    assert "going on from step 8" in capfd.readouterr().err
    assert file.read_bytes() == content


def test_lost_scores_are_made_again(line):
    before = evaluate(line)
    file, content = lose(before["uri"], "videos.parquet")
    assert evaluate(line) == before
    assert file.read_bytes() == content
