"""Data sets in their public layouts through the real `shard` stage, both splits of each."""

import pytest
from layouts import EVALUATION_SPLITS, WRITERS, assert_holds, of_split, training_split, upload

from pipeline import storage
from pipeline.clips.shard import TooManyBadVideos
from pipeline.clips.table import ClipSet
from pipeline.stages import shard_stage


def settings(kind, path):
    overrides = [f"dataset.kind={kind}", f"dataset.path={path}", f"dataset.split={training_split(kind)}"]
    overrides += [f"evaluate.split={EVALUATION_SPLITS[kind]}", "clips.videos_per_shard=2"]
    if kind == "coco":
        overrides += ["clips.clip_frames=1", "distill.alpha=0", "teacher.train.alpha=0"]
    return overrides


@pytest.mark.parametrize("kind", WRITERS)
def test_a_data_set_becomes_two_clip_sets(kind, tiny, local_ray, tmp_path):
    truth = WRITERS[kind](tmp_path / "data")
    config = tiny(*settings(kind, tmp_path / "data"))
    summary = shard_stage(config)
    assert (summary["videos"], summary["evaluation"]["videos"]) == (3, 2)
    assert summary["computed_shards"] == 2
    assert summary["bad"] == summary["evaluation"]["bad"] == []
    assert_holds(ClipSet(summary["uri"]), of_split(truth, training_split(kind)))
    assert_holds(ClipSet(summary["evaluation"]["uri"]), of_split(truth, EVALUATION_SPLITS[kind]))
    assert shard_stage(config)["computed_shards"] == 0


def test_slices_make_disjoint_clip_sets(tiny, local_ray, tmp_path):
    truth = of_split(WRITERS["ytvis"](tmp_path / "data", videos=4), "train")
    config = tiny(
        "dataset.kind=ytvis",
        f"dataset.path={tmp_path / 'data'}",
        "dataset.split=train[:-1]",
        "evaluate.split=train[-1:]",
    )
    summary = shard_stage(config)
    names = list(truth)
    assert_holds(ClipSet(summary["uri"]), {n: truth[n] for n in names[:-1]})
    assert_holds(ClipSet(summary["evaluation"]["uri"]), {names[-1]: truth[names[-1]]})


def test_a_problem_found_while_listing_counts_as_a_bad_video(tiny, local_ray, tmp_path):
    WRITERS["movi"](tmp_path / "data")
    path = tmp_path / "data" / "movi_e-train.tfrecord-00001-of-00002"
    path.write_bytes(path.read_bytes()[:-9])
    overrides = [*settings("movi", tmp_path / "data"), "evaluate.split=null"]
    with pytest.raises(TooManyBadVideos, match=r"1 of 3 videos .*movi_e-train-00001/0000"):
        shard_stage(tiny(*overrides))
    summary = shard_stage(tiny(*overrides, "clips.max_bad_fraction=0.4"))
    assert summary["videos"] == 2
    assert [b["video"] for b in summary["bad"]] == ["movi_e-train-00001/0000"]
    assert "the file ends within the record" in summary["bad"][0]["reason"]
    assert summary["computed_shards"] == 0, "more tolerance is no other work"


@pytest.mark.parametrize("kind", ["movi", "webdataset", "davis"])
def test_from_s3_to_s3(kind, tiny, s3, job, tmp_path):
    """In processes of their own, with the environment that leads to the server."""
    truth = WRITERS[kind](tmp_path / "data")
    root = storage.join(s3, "stage", kind)
    upload(tmp_path / "data", storage.join(root, "data"))
    config = tiny(*settings(kind, storage.join(root, "data")), f"storage.root={root}/runs", "ray.num_cpus=2")
    summary = job("shard", config).finish()
    assert summary["uri"].startswith(root)
    assert_holds(ClipSet(summary["uri"]), of_split(truth, "train"))
