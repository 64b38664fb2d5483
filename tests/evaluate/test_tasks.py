"""How an evaluation is cut into tasks."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from clip_sets import random_clips
from tiny_models import tiny_model

from pipeline.clips.library import artifacts_of
from pipeline.config import resolve_config
from pipeline.config.protocols import PRESETS
from pipeline.evaluate import stage
from pipeline.evaluate.backbones import FeatureMemory, remembering
from pipeline.evaluate.stage import ScoreTask, score_baseline, score_subjects
from pipeline.evaluate.subjects import Subject, baseline_subjects, feature_subjects
from pipeline.models import SlotModel, save_slot_model
from pipeline.models.backbone import Backbone


@pytest.fixture
def asked(monkeypatch):
    """The tasks that were run, in this process; nothing is recorded."""
    asked = []

    def in_this_process(config, task, rows, *, arguments):
        for row in rows:
            asked.append((task, row["subject"], row["shard"]))
            yield task(*arguments)(row) if isinstance(task, type) else task(row, *arguments)

    monkeypatch.setattr(stage, "map_tasks", in_this_process)
    monkeypatch.setattr(stage, "record_evaluations", lambda *_: None)
    return asked


def test_trivial_baselines_run_without_what_a_model_needs(tmp_path, asked):
    """A class has a GPU, or `ray.teacher_cpus`, for each process; a function has one CPU (see `map_tasks`)."""
    config = resolve_config({"storage": {"root": str(tmp_path / "root")}})
    clips = random_clips(tmp_path / "clips", {"a": 5, "b": 5, "c": 5})
    save_slot_model(tiny_model(4, 16), tmp_path / "model")
    subjects = {**baseline_subjects(4), "mine": Subject(str(tmp_path / "model"))}
    results = score_subjects(artifacts_of(config, clips.uri), clips, subjects)

    tasks = {index: {task for task, i, _ in asked if i == index} for index in range(4)}
    assert tasks == {**{index: {score_baseline} for index in range(3)}, 3: {ScoreTask}}
    assert len(asked) == len(set(asked)) == 4 * len(clips.shards)
    assert all(result.videos == 3 for result in results.values())
    one_slot, grid = (results[name].scores for name in ("one slot", "grid"))
    assert (one_slot["slots_in_use"], grid["slots_in_use"]) == (1, 4)
    assert one_slot["video_fg_ari"] == pytest.approx(0)
    assert np.isfinite(results["mine"].scores["video_mbo"])


def test_a_protocol_that_leaves_no_object_says_which_rules_do(tmp_path, asked):
    """The objects of these clips have at most 64 pixels, `diod` wants 501."""
    values = {"storage": {"root": str(tmp_path / "root")}, "evaluate": {"protocol": "diod"}}
    clips = random_clips(tmp_path / "clips", {"a": 5})
    subjects = {"grid": Subject(baseline="grid", num_slots=4)}
    refused = (
        r"at least 501 pixels, samples of at least 2 objects: not one video has an annotated object .*; "
        r"try evaluate\.min_objects=0 evaluate\.min_object_area=0"
    )
    with pytest.raises(ValueError, match=refused):
        score_subjects(artifacts_of(resolve_config(values), clips.uri), clips, subjects)
    values["evaluate"] |= {"min_objects": 0, "min_object_area": 0}
    found = score_subjects(artifacts_of(resolve_config(values), clips.uri), clips, subjects)["grid"]
    assert found.protocol.name == "diod, min_object_area=0, min_objects=0"
    assert found.videos == 1


def test_feature_kmeans_is_a_row_of_its_own_beside_the_models(tmp_path, asked):
    """One for each kind of features: students that share a frozen backbone share it, the teacher has its own."""
    config = resolve_config({"storage": {"root": str(tmp_path / "root")}})
    clips = random_clips(tmp_path / "clips", {"a": 5, "b": 5})
    models = {}
    for name, method, size, seed in [
        ("teacher", "teacher", 32, 0),
        ("seed 1", "slotmatch", 16, 1),
        ("seed 2", "no_kd", 16, 2),
        ("given", "other", 32, 3),
    ]:
        model = tiny_model(4, 16, image_size=size, seed=seed)
        model.encoder.backbone = tiny_model(4, 16, image_size=size).encoder.backbone
        save_slot_model(model, tmp_path / name)
        models[name] = Subject(str(tmp_path / name), tags={"method": method})
    found = feature_subjects(models)
    assert list(found) == [f"k-means on the {who}'s features" for who in ("teacher", "student", "model")]
    assert [subject.record()["name"].partition(" (")[2] for subject in found.values()] == [
        "N = 4, 32 px)",
        "N = 4, 16 px)",
        "N = 4, 32 px)",
    ]
    assert all(subject.record()["method"] == "baseline" for subject in found.values())

    artifacts = artifacts_of(config, clips.uri)
    alone = score_subjects(artifacts, clips, models)
    results = score_subjects(artifacts, clips, found | models)
    assert {task for task, *_ in asked} == {ScoreTask}
    assert len({result.uri for result in results.values()}) == len(results)
    assert {name: results[name].uri for name in models} == {name: alone[name].uri for name in models}
    assert all(results[name].scores["slots_in_use"] > 1 for name in found)
    other = feature_subjects({"seed 2": models["seed 2"]})
    assert score_subjects(artifacts, clips, other)["k-means on the student's features"].uri == (
        results["k-means on the student's features"].uri
    )


def test_a_backbone_cut_short_is_named_by_its_blocks(tmp_path):
    whole = tiny_model(4, 16)
    cut = SlotModel(replace(whole.config, backbone=replace(whole.config.backbone, blocks=1)))
    for name, model in (("whole", whole), ("cut", cut)):
        save_slot_model(model, tmp_path / name)
    students = {
        name: Subject(str(tmp_path / name), tags={"method": "slotmatch"}) for name in ("whole", "cut")
    }
    assert [subject.record()["name"] for subject in feature_subjects(students).values()] == [
        "k-means on the student's features (N = 4, 32 px)",
        "k-means on the student's features (N = 4, 32 px, blocks 1 to 1)",
    ]


def test_another_backbone_of_another_setting_is_named_after_it(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        save_slot_model(tiny_model(4, 16, seed=seed), tmp_path / name)
    students = {name: Subject(str(tmp_path / name), tags={"method": "slotmatch"}) for name in ("a", "b")}
    assert list(feature_subjects(students)) == [
        "k-means on the student's features",
        "k-means on the student's features (b)",
    ]


def test_students_of_one_backbone_compute_its_features_once(tmp_path, monkeypatch):
    """And have the scores that they have alone; one whose backbone has other weights shares nothing."""
    clips = random_clips(tmp_path / "clips", {"a": 5, "b": 5})
    models = {
        "first": tiny_model(4, 16, seed=1),
        "second": tiny_model(4, 16, seed=2),
        "other": tiny_model(4, 16),
    }
    models["second"].encoder.backbone.load_state_dict(models["first"].encoder.backbone.state_dict())
    with torch.no_grad():
        models["other"].encoder.backbone.model.patch_embed.proj.weight *= 2
    work = []
    for name, model in models.items():
        save_slot_model(model, tmp_path / name)
        work.append((Subject(str(tmp_path / name)), str(tmp_path / "scores" / name)))
    computed = []
    compute = Backbone._compute
    monkeypatch.setattr(Backbone, "_compute", lambda self, x: computed.append(len(x)) or compute(self, x))

    together = ScoreTask(clips.uri, work, PRESETS["slotcontrast"])
    frames = []
    for index, name in enumerate(models):
        computed.clear()
        for shard in clips.shards:
            together({"subject": index, "shard": shard})
        frames.append(sum(computed))
        alone = ScoreTask(
            clips.uri, [(work[index][0], str(tmp_path / "alone" / name))], PRESETS["slotcontrast"]
        )
        for shard in clips.shards:
            alone({"subject": 0, "shard": shard})
        written = [path for path in (tmp_path / "alone" / name).rglob("*") if path.is_file()]
        assert len(written) == len(clips.shards)
        for file in written:
            beside = tmp_path / "scores" / name / file.relative_to(tmp_path / "alone" / name)
            assert pq.read_table(file).equals(pq.read_table(beside))
    assert frames == [10, 0, 10]
    shared = {id(model.encoder.backbone) for model in together.models.values()}
    assert len(shared) == 2


def test_features_beyond_the_limit_are_forgotten():
    model = tiny_model(4, 16)
    pixels = torch.rand(3, 1, 3, 32, 32)
    alone = [model.encoder.backbone(x) for x in pixels]
    with remembering(model, FeatureMemory(limit=2 * alone[0].nbytes)):
        for _ in range(2):
            for x, expected in zip(pixels, alone, strict=True):
                assert torch.equal(model.encoder.backbone(x), expected)
    assert model.encoder.backbone.remember is None
