"""Training on stored features of the frozen backbone: the curve of the live ViT, without its passes."""

import pytest
from training_runs import make_clips, make_config, make_features, make_targets, student_run

from pipeline import storage
from pipeline.clips.table import SHARD_FOLDER, ClipSet
from pipeline.distill.run import Run
from pipeline.distill.trainer import Trainer
from pipeline.models.backbone import Backbone
from pipeline.targets.maker import FeatureMaker
from pipeline.targets.table import FeatureSet, TargetMismatch

SHARD = "shard-00000.parquet"
FP32 = ("teacher.train.precision=fp32", "distill.precision=fp32", "targets.teacher_features=false")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture
def passes(monkeypatch):
    """The number of images of each pass of any backbone, in a list that grows."""
    seen, real = [], Backbone.forward
    monkeypatch.setattr(
        Backbone, "forward", lambda model, images: seen.append(len(images)) or real(model, images)
    )
    return seen


def check_curves(live, stored):
    assert len(live) == len(stored) == 20
    for one, other in zip(live, stored, strict=True):
        assert set(one) == set(other)
        for name in set(one) - {"grad_norm"}:
            assert other[name] == pytest.approx(one[name], rel=1e-5), (one["step"], name)
    assert live[-1]["total"] < live[0]["total"]


@pytest.mark.parametrize("initial", ["learned", "random"])
def test_a_teacher_on_stored_features_has_the_live_curve(clips, tmp_path, passes, initial):
    """Of random crops, flips and drawn slots too."""
    config = make_config(tmp_path, *FP32, f"teacher.initial_slots={initial}")
    live = Trainer(Run.teacher(config, str(tmp_path / "live"), clips)).train().history
    features = make_features(config, clips, config.teacher, str(tmp_path / "features"))
    passes.clear()
    run = Run.teacher(config, str(tmp_path / "stored"), clips, features_uri=features)
    check_curves(live, Trainer(run).train().history)
    assert not passes


def test_teacher_and_student_read_one_store(clips, tmp_path, passes):
    config = make_config(tmp_path, *FP32, "teacher.train.steps=2")
    features = make_features(config, clips, config.teacher, str(tmp_path / "features"))
    Trainer(Run.teacher(config, str(tmp_path / "teacher"), clips, features_uri=features)).train()
    taught = {"teacher_uri": str(tmp_path / "teacher" / "model")}
    taught["targets_uri"] = make_targets(config, clips, taught["teacher_uri"], str(tmp_path / "targets"))
    live = Trainer(student_run(config, str(tmp_path / "live"), clips, **taught)).train().history
    passes.clear()
    run = student_run(config, str(tmp_path / "stored"), clips, features_uri=features, **taught)
    check_curves(live, Trainer(run).train().history)
    assert not passes
    assert "slot_kd" in live[0]


def test_stored_features_are_verified_and_of_their_clips(clips, tmp_path):
    config = make_config(tmp_path, "targets.feature_dtype=float16")
    uri = make_features(config, clips, config.teacher, str(tmp_path / "features"))
    maker = FeatureMaker(config, clips, config.teacher)
    report = maker.verify_shard(SHARD, uri, 1.0)
    assert report["checked"] == 2 * 4, "two views of four full clips"
    assert 0 < report["worst"] < 1e-3, "rounded to half precision"
    assert FeatureSet(uri).reader.file(SHARD).metadata.num_rows == 2 * 6, "shorter tails have rows too"

    other = ClipSet(clips).shards[1]
    at = storage.join(uri, SHARD_FOLDER)
    storage.write_bytes(storage.join(at, SHARD), storage.read_bytes(storage.join(at, other)))
    with pytest.raises(TargetMismatch, match="the features are of other clips"):
        Trainer(Run.teacher(config, str(tmp_path / "run"), clips, features_uri=uri)).train()
