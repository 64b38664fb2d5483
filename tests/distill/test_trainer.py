"""The trainer: what it needs, what it calls when, and that a run goes on to the identical curve."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from places import python
from tiny_models import tiny_model
from training_runs import make_clips, make_config, student_run

from pipeline import storage
from pipeline.config import ConfigError
from pipeline.distill.checkpoint import latest_checkpoint
from pipeline.distill.run import Run, build
from pipeline.distill.trainer import Hooks, NoLogger, Trainer
from pipeline.models import load_slot_model, save_slot_model


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """What `train_bare.py` says."""
    out, _ = python(Path(__file__).with_name("train_bare.py"), tmp_path_factory.mktemp("bare"))
    return json.loads(out)


def test_training_needs_no_ray_mlflow_matplotlib_or_av(bare):
    assert bare["imported"] == []
    assert len(bare["unbroken"]) == 20
    assert bare["unbroken"][-1]["total"] < bare["unbroken"][0]["total"]
    assert [row["step"] for row in bare["unbroken"] if "validation_video_mbo" in row] == [10, 20]
    assert bare["shape"] == [1, 2, 4, 16]


def test_a_run_that_was_stopped_has_the_unbroken_curve(bare):
    assert bare["going_on_from"] == 12
    assert bare["resumed"] == bare["unbroken"]
    assert bare["same_model"]


def test_a_teacher_trains_alike_and_is_published_in_the_public_layout_too(bare):
    assert bare["teacher"][-1]["total"] < bare["teacher"][0]["total"]
    assert "slot_kd" not in bare["teacher"][0]
    assert bare["public"] == 4


class Recorder(NoLogger):
    def __init__(self):
        self.logged, self.files = [], []

    def metrics(self, values, step):
        self.logged.append((step, values))

    def file(self, path, folder=None):
        self.files.append((folder, Path(path).name, Image.open(path).size))


def small(root, *overrides):
    base = ("distill.method=no_kd", "distill.log_every=5", "distill.checkpoint_every=8", "evaluate.split=x")
    return make_config(root, *base, *overrides)


def test_what_is_called_and_when(clips, tmp_path):
    config = small(tmp_path, "distill.validate_every=10", "distill.overlays=2", "distill.steps=25")
    run = replace(student_run(config, str(tmp_path / "run"), clips), validation_uri=clips)
    logger, saved, validated = Recorder(), [], []
    hooks = Hooks(
        after_checkpoint=saved.append,
        on_validation=lambda step, scores: validated.append((step, scores)),
        preempted=lambda: len(logger.logged) >= 2,  # from step 10 on
    )

    def draw(frames, labels):
        assert frames.shape == (4, 24, 24, 3)
        assert labels.shape == frames.shape[:3]
        return Image.fromarray(frames[0])

    outcome = Trainer(run, hooks=hooks, logger=logger, draw=draw).train()
    assert (outcome.status, outcome.step) == ("ok", 25)
    assert saved == [8, 10, 16, 24, 25]  # one more because of the notice
    assert [step for step, _ in logger.logged] == [5, 10, 15, 20, 25]
    assert [row["step"] for row in outcome.history] == [5, 10, 15, 20, 25]
    assert {"learning_rate", "frames_per_second", "data_wait_share"} <= set(logger.logged[0][1])
    names = {f"validation_{level}_{score}" for level in ("image", "video") for score in ("fg_ari", "mbo")}
    assert [(step, set(scores)) for step, scores in validated] == [(10, names), (20, names)]
    assert logger.files == [("overlays", f"overlay_{s:08d}.png", (24, 24)) for s in (12, 24, 25)]
    assert storage.read_json(f"{run.uri}/history.json") == outcome.history
    # Whoever follows the validations hears those before the checkpoint again.
    again = []
    Trainer(run, hooks=Hooks(on_validation=lambda step, scores: again.append((step, scores)))).train()
    assert again == validated


def test_a_gradient_that_is_not_finite_ends_the_run(clips, tmp_path):
    config = small(tmp_path, "distill.learning_rate=1e30", "distill.warmup_steps=0")
    run = student_run(config, str(tmp_path / "run"), clips)
    outcome = Trainer(run).train()
    assert outcome.status == "non-finite"
    assert outcome.step < 20
    assert not storage.exists(f"{run.uri}/model")


@pytest.mark.parametrize("log_every", [1, 6])
def test_a_run_that_looks_late_is_the_run_that_looks_at_every_step(clips, tmp_path, log_every):
    """As on a GPU: the history is the same, and after a gradient that is not finite nothing is kept of later steps."""
    config = small(tmp_path, f"distill.log_every={log_every}", "distill.checkpoint_every=3")
    outcomes, checkpoints = [], []
    for asynchronous in (False, True):
        for last in (20, 7):
            run = student_run(config, str(tmp_path / f"{asynchronous}-{last}"), clips)
            trainer = Breaking(run, last)
            trainer.asynchronous = asynchronous
            outcomes.append(replace(trainer.train(), precision="fp32"))
            checkpoints.append(storage.list_names(f"{run.uri}/checkpoints"))
            assert storage.exists(f"{run.uri}/model") == (last == 20)
    assert outcomes[:2] == outcomes[2:]
    assert checkpoints[:2] == checkpoints[2:]
    assert [(o.status, o.step) for o in outcomes[:2]] == [("ok", 20), ("non-finite", 7)]
    assert max(row["step"] for row in outcomes[1].history) == (7 if log_every == 1 else 6)
    assert checkpoints[1] == ["step_00000003", "step_00000006"]


class Breaking(Trainer):
    """Its gradients are finite in the first steps alone."""

    def __init__(self, run, steps):
        super().__init__(run)
        self.finite = steps

    def batch(self, raw):
        batch = super().batch(raw)
        self.finite -= 1
        return batch if self.finite >= 0 else replace(batch, video=batch.video * float("nan"))


def test_slim_students_are_the_whole_ones_without_their_backbone(clips, tmp_path):
    """Also where the training is stopped and goes on; their backbone is kept once for all of them."""
    published = {}
    for save in ("whole", "slim"):
        config = small(tmp_path / "root", f"student.save={save}", "distill.steps=8")
        run = student_run(config, str(tmp_path / "root" / "students" / save), clips)
        Trainer(run).train()
        published[save] = run.uri
    slim = student_run(config, str(tmp_path / "root" / "students" / "resumed"), clips)
    shutil.copytree(f"{published['slim']}/checkpoints", f"{slim.uri}/checkpoints")
    Trainer(slim).train()  # at its end already: it publishes
    whole = load_slot_model(f"{published['whole']}/model").state_dict()
    for folder in (f"{published['slim']}/model", f"{slim.uri}/model", latest_checkpoint(slim.uri)):
        assert os.path.getsize(f"{folder}/model.safetensors") < os.path.getsize(
            f"{published['whole']}/model/model.safetensors"
        )
        found = load_slot_model(folder).state_dict()
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[key], whole[key]) for key in whole)
    assert len(list((tmp_path / "root" / "backbones").rglob("*.safetensors"))) == 1


def test_what_another_job_has_published_stays(clips, tmp_path):
    run = student_run(small(tmp_path, "distill.steps=1"), str(tmp_path / "run"), clips)
    storage.publish(run.uri, {"kind": "student"})
    assert Trainer(run).train().status == "ok"
    assert not storage.exists(f"{run.uri}/model")


def test_runs_have_names(clips, tmp_path):
    named = student_run(small(tmp_path, "distill.name=mine"), str(tmp_path / "0123456789abcdef"), clips)
    plain = student_run(small(tmp_path), named.uri, clips)
    teacher = Run.teacher(small(tmp_path), named.uri, clips)
    runs = (named, plain, replace(named, title="trial 1"), teacher)
    assert [run.label for run in runs] == ["distill (mine)", "distill", "distill (trial 1)", "teacher"]
    assert [run.run_name for run in runs] == ["mine", "student-01234567", "mine", "teacher-01234567"]
    assert [run.kind for run in runs] == ["student"] * 3 + ["teacher"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("distill.measure_bound_every=5", r"distill\.measure_bound_every: .* nearest valid: 0"),
        ("distill.method=reconstruction_kd", r"distill\.method=reconstruction_kd: .* none can be distilled"),
    ],
)
def test_a_teacher_that_lacks_what_a_setting_needs(clips, tmp_path, setting, message):
    design = {"decoder": "slot_mixer", "decoder_blocks": 1, "decoder_outputs": ("similarity",)}
    save_slot_model(tiny_model(4, 16, **design), tmp_path)
    config = make_config(tmp_path, f"teacher.checkpoint={tmp_path}", "teacher.slot_size=null", setting)
    with pytest.raises(ConfigError, match=message):
        build(student_run(config, str(tmp_path / "run"), clips, teacher_uri=str(tmp_path)))
