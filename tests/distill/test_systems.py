"""Systems beside slot models are trained by the same trainer, each for its own loss."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clip_sets import make_clip_set, random_video
from places import CONFIGS, GOLDEN
from safetensors.torch import save_file
from tiny_models import tiny_section
from training_runs import TRAINING, make_targets, student_run

from pipeline import storage
from pipeline.artifacts.subjects import model_identity
from pipeline.clips.library import artifacts_of
from pipeline.config import ConfigError, load_config, resolve_config, with_overrides
from pipeline.config.models import Teacher
from pipeline.config.rivals import ALL_USE, RIVALS
from pipeline.distill.diod import recoloured
from pipeline.distill.run import Run, build
from pipeline.distill.system_objective import SystemBatch
from pipeline.distill.systems import OBJECTIVES
from pipeline.distill.trainer import NoLogger, Trainer
from pipeline.evaluate import stage as evaluation
from pipeline.evaluate.subjects import teacher_subject
from pipeline.models import load_slot_model, save_slot_model
from pipeline.models.backbone import Backbone, BackboneConfig
from pipeline.models.build import checkpoint_hints, load_teacher
from pipeline.models.build_teachers import build_teacher
from pipeline.models.rivals import solv
from pipeline.models.rivals.solv_files import dinov2_positions

VIT = {key: value for key, value in tiny_section(32, 32).items() if key != "decoder_hidden_sizes"}
SOLV = {**VIT, "image_width": 48, "system": "solv", "num_slots": 4, "slot_size": 16}
PIXELS = {"image_size": 16, "num_slots": 4, "slot_size": 16}
DIOD = {"image_size": 32, "image_width": 48, "system": "diod", "num_slots": 4, "slot_size": 16}
SYSTEMS = {
    "solv": {**SOLV, "solv": {"decoder_size": 16, "merging_epochs": 4}},
    "savi": {**PIXELS, "system": "savi", "savi": {"encoder_channels": [8, 8], "decoder_channels": [8, 8]}},
    "steve": {**PIXELS, "system": "steve", "steve": {"width": 16, "vocabulary": 16, "decoder_blocks": 1}},
    "diod": {**DIOD, "diod": {"widths": [4, 8], "blocks": [1, 1], "burn_in": 0.5, "smallest_segment": 4}},
}
SETTINGS = {"steps": 12, "checkpoint_every": 5, "precision": "fp32", "gradient_clip": 1.0}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    rng = np.random.default_rng(0)
    videos = {f"v{i}": random_video(rng, 12) for i in range(5)}
    return make_clip_set(tmp_path_factory.mktemp("clips"), videos, clip_frames=6, motion=True).uri


def config_of(system, root, *overrides, clip_frames=6):
    own = {"alpha": 0} | ({"warmup_steps": 0} if system == "solv" else {})
    values = {
        "storage": {"root": str(root)},
        "clips": {"clip_frames": clip_frames, "motion": "masks"},
        "teacher": {**SYSTEMS[system], "train": {**TRAINING, **SETTINGS, **own}},
        "student": tiny_section(32, 32),
    }
    return resolve_config(values, overrides)


def run_of(system, root, clips, *overrides, name="run"):
    return Run.teacher(config_of(system, root, *overrides), str(root / name), clips)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_is_trained_stopped_and_goes_on(clips, tmp_path, system):
    """What it draws follows from the step, so that the curve is that of a run that was not stopped."""
    whole = Trainer(run_of(system, tmp_path, clips)).train()
    assert (whole.status, whole.step) == ("ok", 12)
    assert all(np.isfinite(list(row.values())).all() for row in whole.history)
    run = run_of(system, tmp_path, clips, name="stopped")
    trainer = Trainer(run)

    def stop(step):
        raise Stopped

    trainer.hooks = replace(trainer.hooks, after_checkpoint=stop)
    with pytest.raises(Stopped):
        trainer.train()
    again = Trainer(run)
    assert again.train().history == whole.history
    model = load_slot_model(f"{run.uri}/model")
    for other in (load_slot_model(f"{tmp_path}/run/model"), load_slot_model(f"{run.uri}/teacher.ckpt")):
        assert other.config == model.config
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
    assert model.config.num_slots == 4


def test_a_system_that_is_saved_slim_has_no_public_file(clips, tmp_path):
    run = run_of("solv", tmp_path, clips, "teacher.save=slim", "teacher.train.steps=1")
    Trainer(run).train()
    model = load_slot_model(f"{run.uri}/model")
    assert not storage.exists(f"{run.uri}/teacher.ckpt")
    whole = Trainer(run_of("solv", tmp_path, clips, "teacher.train.steps=1", name="whole"))
    whole.train()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


# --- SOLV --------------------------------------------------------------------------------------------------


class Rates(NoLogger):
    def __init__(self):
        self.rates = []

    def metrics(self, values, step):
        self.rates.append(values["learning_rate"])


def test_solv_learns(clips, tmp_path):
    """One rate for all that trains: up in a twentieth of the steps, then down to an eighth."""
    settings = ("teacher.train.steps=40", "teacher.train.learning_rate=0.004", "teacher.train.precision=bf16")
    logger = Rates()
    history = Trainer(run_of("solv", tmp_path, clips, *settings), logger=logger).train().history
    losses = [row["total"] for row in history]
    assert np.mean(losses[-10:]) < 0.95 * np.mean(losses[:10])
    assert all(row["total"] == row["reconstruction"] for row in history)
    assert all(1 <= row["slots_left"] <= 4 for row in history)
    np.testing.assert_allclose(logger.rates[:3], 0.004 * np.array([1e-5, 0.5, 1]), rtol=1e-3)
    assert logger.rates[-1] == pytest.approx(0.004 * 0.5 ** (37 / 12))


def test_solv_merges_more_and_more(clips, tmp_path, monkeypatch):
    objective, _ = build(run_of("solv", tmp_path, clips))
    shares = [objective.merging(step) for step in range(12)]
    expected = np.log(np.arange(1, 5)) / np.log(4)  # of 12 steps three in each of four epochs
    np.testing.assert_allclose(shares, expected.repeat(3))
    pixels = [torch.randint(0, 256, (6, 40, 40, 3), dtype=torch.uint8) for _ in range(3)]
    monkeypatch.setattr(solv, "clusters", lambda slots, distance: torch.tensor([0, 1, 1, 0]))
    left = [objective(SystemBatch(pixels, step, seed=1))["slots_left"].item() for step in (0, 11)]
    assert left == [4, 2]


def test_solvs_windows_end_with_the_clip(clips, tmp_path):
    objective, _ = build(run_of("solv", tmp_path, clips))
    clip = (torch.arange(6) * 40).to(torch.uint8)[:, None, None, None].expand(6, 32, 48, 3)
    torch.manual_seed(0)
    frames, present = objective.windows([clip] * 64)
    model = objective.model
    own = model.prepare([clip])[0]
    middles = set()
    for window, there in zip(frames, present, strict=True):
        assert there[2]
        assert not window[~there].any()
        middle = next(t for t in range(6) if torch.equal(own[t], window[2]))
        middles.add(middle)
        expected = [t for t in range(middle - 2, middle + 3) if 0 <= t < 6]
        assert there.tolist() == [0 <= t < 6 for t in range(middle - 2, middle + 3)]
        assert torch.equal(window[there], own[expected])
    assert middles == set(range(6))


def test_solv_needs_clips_of_a_window(tmp_path):
    with pytest.raises(ConfigError, match=r"^clips.clip_frames: 4 frames are fewer .* nearest valid: 5$"):
        config_of("solv", tmp_path, clip_frames=4)
    assert config_of("solv", tmp_path, "teacher.solv.half_window=1", clip_frames=4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.num_slots=1", r"^teacher.system=solv: num_slots: 1, but SOLV .* nearest valid: 2$"),
        ("teacher.slot_size=12", r"slot_size: 12 is no multiple of SOLV's 8 heads; nearest valid: 16"),
        ("teacher.image_width=50", r"^teacher.image_width: 50 is not a multiple .* nearest: 48 or 56"),
        ("teacher.backbone=test_convnext", "SOLV drops tokens of a plain ViT"),
        ("teacher.system=slov", r"'slov' is not one of slotcontrast, solv.*; nearest: solv"),
    ],
)
def test_what_solv_can_not_be(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        build_teacher(config_of("solv", tmp_path, override))


def test_solvs_positions_are_dinov2s_own(tmp_path):
    """Of a table of 5 x 5 patches, at 4 x 6."""
    vit = Backbone(BackboneConfig(None, 40, SYSTEMS["solv"]["backbone"])).model.state_dict()
    save_file(vit, tmp_path / "vit.safetensors")
    file = f"teacher.backbone_weights={tmp_path / 'vit.safetensors'}"
    model = build_teacher(config_of("solv", tmp_path, file))
    expected = dinov2_positions(vit["pos_embed"], (4, 6), 1)
    assert torch.equal(model.backbone.model.pos_embed, expected)
    assert torch.equal(model.backbone.model.blocks[0].attn.qkv.weight, vit["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_uses_what_the_config_lets_it_have(system, tmp_path, monkeypatch):
    """What its builder and its objective read of `teacher`, but for what of a ViT SOLV hands on and can't have."""
    config, read = config_of(system, tmp_path), set()

    def watched(section, name):
        if name in type(section).model_fields:
            read.add(name)
        return object.__getattribute__(section, name)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "__getattribute__", watched, raising=False)
        model = build_teacher(config)
        OBJECTIVES[system](model, config.teacher)
    rival, shared = RIVALS[system], ALL_USE - {"name", "checkpoint"}
    assert read - shared - rival.keys - {system} <= {"stride", "grid"}
    assert rival.keys - {"save"} <= read
    assert {system, "system", "image_size", "num_slots", "slot_size", "train"} <= read


def test_the_preset_is_the_authors():
    config = load_config(None, presets=[CONFIGS / "systems" / "solv.yaml"])
    section = config.teacher
    assert (section.system, section.sizes) == ("solv", {"num_slots": 8, "slot_size": 128})
    assert (section.train.learning_rate, section.train.batch_size, section.train.gradient_clip) == (
        4e-4,
        48,
        1,
    )
    assert (config.distill.method, config.distill.matching) == ("slotmatch_hungarian", "frame")


# --- DIOD --------------------------------------------------------------------------------------------------


def test_diod_is_taught_by_its_average_after_the_burn_in(clips, tmp_path):
    settings = "teacher.train.warmup_steps=4", "teacher.train.precision=bf16"
    trainer = Trainer(run_of("diod", tmp_path, clips, *settings), logger=Rates())
    objective, model = trainer.objective, trainer.model
    weights = []
    own = objective.after_step

    def after_step(step):
        before = {name: value.clone() for name, value in objective.average.state_dict().items()}
        own(step)
        weights.append((before, {name: value.clone() for name, value in model.state_dict().items()}))

    objective.after_step = after_step
    history = trainer.train().history
    assert ["teacher" in row for row in history] == [False] * 6 + [True] * 6
    assert all(0 < row["moving"] < 0.5 for row in history)
    np.testing.assert_allclose(
        trainer.logger.rates, [0.002 * min(n / 4, 1) * 0.5 ** (n / 50_000) for n in range(1, 13)]
    )
    name = "decoder.conv6.weight"
    torch.testing.assert_close(weights[6][0][name], weights[5][1][name], rtol=0, atol=0)
    expected = 0.996 * weights[11][0][name] + 0.004 * weights[11][1][name]
    torch.testing.assert_close(objective.average.state_dict()[name], expected)
    assert not any(p.requires_grad for p in objective.heads.parameters())


def test_diods_segments_are_shown_as_its_pixels_are(clips, tmp_path):
    """Crops, flips and sizes: pixels that say where the segments are arrive where these do."""
    views = ("targets.views=8", "targets.crop=random", "targets.min_scale=0.5")
    trainer = Trainer(run_of("diod", tmp_path, clips, "teacher.diod.smallest_segment=0", *views))
    with trainer.loader() as loader:
        raw, _ = next(iter(loader))
    for sample, view, motion in zip(raw.samples, raw.views, raw.motion, strict=True):
        labels = trainer.clips.read_motion(sample.video.shard, sample.row)
        expected = labels[:, view.top : view.top + view.height, view.left : view.left + view.width]
        np.testing.assert_array_equal(motion, expected[..., ::-1] if view.flip else expected)
    large = torch.zeros(1, 24, 24, dtype=torch.uint8)
    large[:, 6:12, :8], large[:, 20:, 20:] = 3, 1
    rows, columns = (torch.arange(32) * 24 // 32), (torch.arange(48) * 24 // 48)
    found = trainer.objective.segments([large])
    torch.testing.assert_close(found[0], large[:, rows][:, :, columns].long())
    small = replace_setting(trainer.objective, smallest_segment=8 * 16).segments([large])
    assert small.unique().tolist() == [0]
    assert replace_setting(trainer.objective, smallest_segment=8 * 16 - 1).segments(
        [large]
    ).unique().tolist() == [0, 3]


def replace_setting(objective, **values):
    objective.settings = objective.settings.model_copy(update=values)
    return objective


def test_diod_needs_motion_segments(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^clips.motion: none, but diod learns from motion .* nearest valid: flow"
    ):
        config_of("diod", tmp_path, "clips.motion=none")
    rng = np.random.default_rng(0)
    still = make_clip_set(tmp_path / "clips", {"v": random_video(rng, 6)}, clip_frames=6).uri
    with pytest.raises(ValueError, match=r"no motion segments; make some that do: clips.motion=flow"):
        Trainer(run_of("diod", tmp_path, still)).train()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.num_slots=1", r"^teacher.system=diod: num_slots: 1, but DIOD.* nearest valid: 2$"),
        ("teacher.image_width=50", r"image_width: 50 is no multiple of 4, .* nearest valid: 52"),
    ],
)
def test_what_diod_can_not_be(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        build_teacher(config_of("diod", tmp_path, override))


def test_diods_colours_are_one_change_for_all_frames():
    clip = torch.randint(0, 256, (1, 8, 8, 3), dtype=torch.uint8).expand(3, -1, -1, -1)
    drawn = []
    for seed in range(6):
        torch.manual_seed(seed)
        drawn.append(recoloured(clip))
        assert drawn[-1].dtype == torch.uint8
        assert all(torch.equal(frame, drawn[-1][0]) for frame in drawn[-1])
    assert len({tuple(change.flatten().tolist()) for change in drawn}) > 3


@torch.no_grad()
def test_diods_targets_do_not_depend_on_the_batch(tmp_path):
    model = build_teacher(config_of("diod", tmp_path)).eval()
    video = torch.randn(2, 6, 3, 32, 48)
    slots = model.target_slots(video, [0, 0])
    torch.testing.assert_close(slots[1:], model.target_slots(video[1:], [0]))
    torch.testing.assert_close(slots[1:], model(video[1:]).slots)


def test_rows_of_diod_say_that_it_uses_motion(clips, tmp_path):
    """By what the config says of a teacher that is to be trained, by what a file is of one that is there."""
    config = config_of("diod", tmp_path, "teacher.name=DIOD")
    assert teacher_subject(config, "model").tags["teacher"] == "DIOD (uses motion)"
    assert config_of("solv", tmp_path).teacher.title == "SlotContrast"
    for file, name in (("diod_tiny.ckpt", "mine (uses motion)"), ("stosavi_mlp_tiny.pth", "mine")):
        there = resolve_config({"teacher": {"checkpoint": str(GOLDEN / "rivals" / file), "name": "mine"}})
        artifacts = artifacts_of(there, clips)
        subject = teacher_subject(there, artifacts.teacher.uri, artifacts.teacher_config)
        assert subject.tags["teacher"] == name


@pytest.mark.parametrize(
    ("file", "name"),
    [("diod_tiny.ckpt", "diod_tiny.ckpt (uses motion)"), ("stosavi_mlp_tiny.pth", "stosavi_mlp_tiny.pth")],
)
def test_a_file_that_is_scored_is_named_by_what_it_is(file, name, monkeypatch):
    """The config need not say `teacher.system`."""
    seen = []

    def scored(artifacts, clips, subjects):
        seen.extend(subjects)
        raise Stopped

    monkeypatch.setattr(evaluation, "artifacts_of", lambda config: SimpleNamespace(evaluation_clips=None))
    monkeypatch.setattr(evaluation, "open_clips", lambda clips: None)
    monkeypatch.setattr(evaluation, "score_subjects", scored)
    model = str(GOLDEN / "rivals" / file)
    with pytest.raises(Stopped):
        evaluation.evaluate(
            resolve_config({"evaluate": {"model": model, "split": "val", "baselines": False}})
        )
    assert seen == [name]


# --- as teachers -------------------------------------------------------------------------------------------

# Without the contrast, whose pull outweighs the teacher's in the first steps.
MATCHED = ("distill.method=slotmatch_hungarian", "distill.matching=frame", "distill.alpha=0")
MATCHED += ("distill.precision=fp32",)


@pytest.fixture(scope="module", params=SYSTEMS)
def taught(request, clips, tmp_path_factory):
    """A system's config, with a model of it as teacher, and its targets."""
    root = tmp_path_factory.mktemp("taught")
    model = build_teacher(config_of(request.param, root))
    save_slot_model(model, root / "teacher")
    training = [f"distill.{key}={value}" for key, value in {**TRAINING, "steps": 6}.items()]
    config = config_of(request.param, root, f"teacher.checkpoint={root / 'teacher'}", *training, *MATCHED)
    return config, model.eval(), make_targets(config, clips, str(root / "teacher"), str(root / "targets"))


def test_students_of_a_system_learn_cached_or_live(taught, clips, tmp_path):
    config, model, targets = taught
    where = {"teacher_uri": config.teacher.checkpoint}
    cached = Trainer(student_run(config, str(tmp_path / "a"), clips, targets_uri=targets, **where)).train()
    assert cached.history[-1]["slot_kd"] < cached.history[0]["slot_kd"]
    live = with_overrides(config, {"distill.live_teacher": True})
    other = Trainer(student_run(live, str(tmp_path / "b"), clips, **where)).train()
    np.testing.assert_allclose(
        [r["total"] for r in other.history], [r["total"] for r in cached.history], 1e-5
    )
    student = load_slot_model(tmp_path / "a" / "model").config
    assert (student.num_slots, student.slot_size) == (model.config.num_slots, model.config.slot_size)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"distill.initial_slots_from_teacher": True}, "starts its frames in another way"),
        ({"distill.method": "reconstruction_kd"}, "its slots are all that is distilled"),
        ({"targets.teacher_features": True}, r"^targets.teacher_features: .* nearest valid: false"),
        ({"distill.measure_bound_every": 3}, "nearest valid: 0"),
        ({"teacher.num_slots": 5}, "has 4 slots"),
    ],
)
def test_what_a_system_can_not_teach(taught, clips, overrides, message):
    """Also where nothing but its file says that it is one: refused once that is read."""
    config, _, targets = taught
    if "teacher.num_slots" not in overrides:
        with pytest.raises(
            ConfigError, match=rf"^{next(iter(overrides))}: .*\(teacher.system\).* nearest valid: "
        ):
            with_overrides(config, overrides)
    config = with_overrides(config, {"teacher.system": "slotcontrast", **overrides})
    with pytest.raises(ConfigError, match=message):
        build(student_run(config, "", clips, teacher_uri=config.teacher.checkpoint, targets_uri=targets))


@torch.no_grad()
def test_solvs_targets_are_its_slots_before_merging_linked(clips, tmp_path):
    model = build_teacher(config_of("solv", tmp_path)).eval()
    video = torch.randn(2, 6, 3, 32, 48)
    slots, all_of_them = model.target_slots(video, [0, 0]), model(video, merge=True).slots_temporal
    torch.testing.assert_close(slots[:, 0], all_of_them[:, 0])
    for linked, one_frame in zip(slots.flatten(0, 1), all_of_them.flatten(0, 1), strict=True):
        torch.testing.assert_close(linked.sort(0).values, one_frame.sort(0).values)
    assert linked_similarity(slots) >= linked_similarity(all_of_them)
    with pytest.raises(ValueError, match=r"4 frames is shorter than the window of 5 .*clips\.clip_frames"):
        model.target_slots(video[:, :4], [0, 0])


def linked_similarity(slots):
    return torch.cosine_similarity(slots[:, 1:].double(), slots[:, :-1].double(), dim=-1).sum()


def test_a_public_file_of_solv_as_teacher(tmp_path):
    file, vit = GOLDEN / "rivals" / "solv_tiny.pt", GOLDEN / "rivals" / "solv_tiny_vit.pt"
    said = [f"teacher.checkpoint={file}", "teacher.num_heads=3"]
    with pytest.raises(ConfigError, match=r"^teacher.backbone_weights: must be given.*teacher.system=solv"):
        load_teacher(resolve_config({}, said), str(file))
    config = resolve_config({}, [*said, "teacher.system=solv", f"teacher.backbone_weights={vit}"])
    model = load_teacher(config, str(file))
    expected = load_slot_model(file, num_heads=3, backbone_weights=vit)
    assert model.config == expected.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    # Known by the bytes of both files, wherever they are.
    shutil.copy(vit, tmp_path / "vit.pt")
    known = [
        model_identity(str(file), checkpoint_hints(resolve_config({}, [*said, *more])))
        for more in (
            ["teacher.system=solv", f"teacher.backbone_weights={vit}"],
            ["teacher.system=solv", f"teacher.backbone_weights={tmp_path / 'vit.pt'}"],
            ["teacher.system=solv", f"teacher.backbone_weights={file}"],
            [f"teacher.backbone_weights={vit}"],
            [],
        )
    ]
    assert known[0] == known[1]
    assert known[2] != known[0] != known[4]
    assert known[3] == known[4], "of a file that holds its ViT these weights say nothing"
