"""Every kind of teacher: its cached slots are what it computes live, and students of its kind learn.

All in this process; that Ray's actors write the same is for test_cached_targets.py.
"""

import numpy as np
import pytest
import torch
from clip_sets import random_clips
from places import GOLDEN
from tiny_models import tiny_model, tiny_section, tiny_vit
from training_runs import TRAINING, make_targets, student_run

from pipeline.clips.views import apply_view
from pipeline.config import resolve_config
from pipeline.distill.trainer import Trainer
from pipeline.models import load_slot_model, save_public_checkpoint
from pipeline.models.build import load_teacher
from pipeline.targets.maker import teacher_outputs
from pipeline.targets.table import TargetSet

STUDENT = tiny_section(24, 40, (32,))
DRAWN = {"initial_slots": "random"}
# Of each teacher: what the config says of its file, and a student of its kind.
TEACHERS = {
    "slotcontrast": ({"num_heads": 3}, {}),
    "videosaur": (
        {"num_heads": 3, "num_slots": 4, "mean": [0.5] * 3, "std": [0.5] * 3},
        {**DRAWN, "decoder": "slot_mixer", "decoder_blocks": 1, "corrector_mlp": False},
    ),
    "dinosaur": ({"num_heads": 2, "num_slots": 3}, {**DRAWN, "predictor": False}),
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return random_clips(tmp_path_factory.mktemp("clips"), {f"video {i}": 9 for i in range(4)}, size=(40, 48))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Public files; DINOSAUR's is made here: no predictor, and no `.module` in its names."""
    model = tiny_model(vit=tiny_vit(32, depth=2), hidden=(16,), initializer="random", predictor=False)
    path = tmp_path_factory.mktemp("dinosaur") / "dinosaur.ckpt"
    save_public_checkpoint(model, path)
    torch.save({"state_dict": torch.load(path, weights_only=True)["state_dict"]}, path)
    return {"dinosaur": path, **{k: GOLDEN / f"{k}_tiny.ckpt" for k in ("slotcontrast", "videosaur")}}


@pytest.fixture(scope="module")
def cached(clips, checkpoints, tmp_path_factory):
    """`cached(kind, rollout)`: the config, and the targets of 4 views with crops and flips."""
    made = {}
    root = tmp_path_factory.mktemp("root")

    def make(kind, rollout="forward"):
        if (kind, rollout) not in made:
            hints, student = TEACHERS[kind]
            values = {
                "teacher": {"checkpoint": str(checkpoints[kind]), **hints},
                "student": {**STUDENT, **student},
                "targets": {
                    "views": 4,
                    "crop": "random",
                    "min_scale": 0.6,
                    "rollout": rollout,
                    "batch_size": 5,
                },
                "distill": {**TRAINING, "steps": 6, "warmup_steps": 1, "alpha": float(kind != "dinosaur")},
                "storage": {"root": str(root)},
            }
            config = resolve_config(values)
            uri = make_targets(config, clips.uri, str(checkpoints[kind]), str(root / f"{kind} {rollout}"))
            made[kind, rollout] = config, TargetSet(uri)
        return made[kind, rollout]

    return make


@pytest.mark.parametrize(
    ("kind", "rollout"),
    [("videosaur", "forward"), ("videosaur", "cyclic"), ("dinosaur", "forward"), ("slotcontrast", "cyclic")],
)
def test_cached_slots_are_the_live_teachers(cached, clips, checkpoints, kind, rollout):
    _, target_set = cached(kind, rollout)
    teacher = load_slot_model(checkpoints[kind], **TEACHERS[kind][0])
    seen = []
    for video in clips.videos:
        for index in range(video.full_clips):
            clip = clips.read_clip(video.shard, video.first_row + index)
            rows = [target_set.read(video.shard, video.first_row + index, k)[2] for k in range(4)]
            with torch.no_grad():
                slots, _ = teacher_outputs(
                    teacher, [apply_view(clip.frames, r.view) for r in rows], [r.view for r in rows], rollout
                )
            np.testing.assert_allclose(np.stack([r.slots for r in rows]), slots.numpy(), rtol=1e-5, atol=1e-5)
            seen += rows
    assert len(seen) == 4 * 2 * 4
    assert {r.view.flip for r in seen} == {False, True}
    assert len({(r.view.top, r.view.left, r.view.height) for r in seen}) > 10
    assert len({r.slots.tobytes() for r in seen}) == len(seen)


def test_the_two_roll_outs_differ(cached, clips):
    """But for the last frame, which keeps its slots."""
    video = clips.videos[0]
    targets = [cached("videosaur", rollout)[1] for rollout in ("forward", "cyclic")]
    one, other = (t.read(video.shard, video.first_row, 1)[2].slots for t in targets)
    np.testing.assert_allclose(one[-1], other[-1], rtol=1e-5, atol=1e-5)
    assert all(np.abs(one[t] - other[t]).max() > 1e-3 for t in range(3))


@pytest.mark.parametrize("kind", ["videosaur", "dinosaur"])
def test_drawn_initial_slots_are_the_same_on_both_sides_cached_and_live(cached, clips, kind):
    """The view's noise seed draws them, and the student starts with the teacher's mean and deviation."""
    config, target_set = cached(kind)
    live = resolve_config(config.model_dump(mode="json"), ["distill.live_teacher=true"])
    trainers = [
        Trainer(student_run(c, "", clips.uri, teacher_uri=config.teacher.checkpoint, targets_uri=uri))
        for c, uri in ((config, target_set.uri), (live, None))
    ]
    assert [trainer.targets is not None for trainer in trainers] == [True, False]
    assert [trainer.teacher is not None for trainer in trainers] == [False, True]
    teacher = load_teacher(config, config.teacher.checkpoint)
    with trainers[0].loader() as first, trainers[1].loader() as second:
        for (raw, _), (raw_live, _) in zip(first, second, strict=True):
            assert raw.views == raw_live.views
            batch, batch_live = trainers[0].batch(raw), trainers[1].batch(raw_live)
            drawn = teacher.initial_slots(len(raw.views), [view.noise_seed for view in raw.views])
            assert torch.equal(batch.initial_slots, drawn)
            assert torch.equal(batch_live.initial_slots, drawn)
            assert len({row.numpy().tobytes() for row in drawn.detach()}) == len(set(raw.views))
            torch.testing.assert_close(batch.target_slots, batch_live.target_slots, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", TEACHERS)
def test_students_of_every_kind_learn(cached, clips, kind, tmp_path):
    config, target_set = cached(kind, "cyclic" if kind == "slotcontrast" else "forward")
    location = config.teacher.checkpoint
    run = student_run(config, str(tmp_path), clips.uri, teacher_uri=location, targets_uri=target_set.uri)
    outcome = Trainer(run).train()
    assert outcome.status == "ok"
    assert outcome.history[-1]["total"] < outcome.history[0]["total"]
    design = load_slot_model(f"{run.uri}/model").config
    teacher = load_teacher(config, location).config
    for name in ("num_slots", "slot_size", "initializer", "predictor", "corrector_mlp", "decoder"):
        assert getattr(design, name) == getattr(teacher, name), name
