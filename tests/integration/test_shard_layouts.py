"""Data sets in their public layouts through the real `shard` stage."""

import pytest
from layouts import EVALUATION_SPLITS, SHIPPED, WRITERS, assert_holds, of_split, training_split, upload

from pipeline import storage
from pipeline.clips.stage import TooManyBadVideos, shard
from pipeline.clips.table import ClipSet
from pipeline.config import load_config


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_becomes_clip_sets(name, local_ray, tmp_path):
    """With nothing changed but places, and slices of a data set that has no 300 videos."""
    kind = SHIPPED[name]
    truth = WRITERS[kind](tmp_path / "data", videos=4)
    overrides = [f"dataset.path={tmp_path / 'data'}", f"storage.root={tmp_path / 'root'}"]
    if kind == "ytvis":
        overrides += ["dataset.split=train[:-1]", "evaluate.split=train[-1:]"]
    config = load_config(f"configs/{name}.yaml", overrides)
    summary = shard(config)
    training, evaluation = (list(of_split(truth, s)) for s in (training_split(kind), EVALUATION_SPLITS[kind]))
    expected = [(summary, training), (summary.get("evaluation"), evaluation)]
    if kind == "ytvis":
        expected = [(summary, training[:-1]), (summary["evaluation"], training[-1:])]
    if kind == "ovis":  # scored on what is sharded, trained on nothing
        assert expected.pop()[0] is None
    for part, names in expected:
        assert part["bad"] == []
        videos = ClipSet(part["uri"]).videos
        assert [v.video_id for v in videos] == names
        assert {min(v.height, v.width) for v in videos} == {config.clips.short_side}
        assert part["annotated_videos"] == len(names)
    assert shard(config)["computed_shards"] == 0


def test_a_problem_found_while_listing_counts_as_a_bad_video(tiny, local_ray, tmp_path):
    WRITERS["movi"](tmp_path / "data")
    path = tmp_path / "data" / "movi_e-train.tfrecord-00001-of-00002"
    path.write_bytes(path.read_bytes()[:-9])
    overrides = ["dataset.kind=movi", f"dataset.path={tmp_path / 'data'}", "dataset.split=train"]
    overrides += ["evaluate.split=null", "clips.videos_per_shard=2"]
    with pytest.raises(TooManyBadVideos, match=r"1 of 3 videos .*movi_e-train-00001/0000"):
        shard(tiny(*overrides))
    summary = shard(tiny(*overrides, "clips.max_bad_fraction=0.4"))
    assert summary["videos"] == 2
    assert [b["video"] for b in summary["bad"]] == ["movi_e-train-00001/0000"]
    assert "the file ends within the record" in summary["bad"][0]["reason"]
    assert summary["computed_shards"] == 0, "more tolerance is no other work"


def test_from_s3_to_s3(tiny, s3, job, tmp_path):
    """In a process of its own, with the environment that leads to the server."""
    truth = WRITERS["webdataset"](tmp_path / "data")
    root = storage.join(s3, "stage")
    upload(tmp_path / "data", storage.join(root, "data"))
    overrides = ["dataset.kind=webdataset", f"dataset.path={root}/data", "dataset.split=train"]
    overrides += ["evaluate.split=null", f"storage.root={root}/runs", "ray.num_cpus=2"]
    summary = job("shard", tiny(*overrides)).finish()
    assert summary["uri"].startswith(root)
    assert_holds(ClipSet(summary["uri"]), of_split(truth, "train"))
