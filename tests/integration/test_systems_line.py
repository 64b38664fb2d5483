"""Every system through the stages: trained, cached, distilled from, scored, registered, pulled, and put to use."""

import math

import pytest
import yaml
from PIL import Image
from places import CONFIGS
from tiny_models import tiny_section

from pipeline import storage
from pipeline.clips.stage import shard
from pipeline.config import load_config, with_overrides
from pipeline.distill.stage import distill, train_teacher
from pipeline.distill.students import NO_KD, students_of
from pipeline.evaluate.scoring import SCORES
from pipeline.evaluate.stage import evaluate
from pipeline.models import load_slot_model
from pipeline.registry.lineage import trace
from pipeline.registry.stage import pull, register, register_run
from pipeline.report.stage import report
from pipeline.segment.stage import segment
from pipeline.sweep.rivals import rivals
from pipeline.targets.stage import cache

TRAINING = {"batch_size": 4, "workers": 0, "log_every": 1, "learning_rate": 0.002, "checkpoint_every": 20}
# What each needs to be small; the rest is its preset's.
SYSTEMS = {
    "solv": {
        **{key: value for key, value in tiny_section(32, 48).items() if key != "decoder_hidden_sizes"},
        "solv": {"decoder_size": 32},
        **{"num_slots": 4, "slot_size": 16},
    },
    "savi": {
        "savi": {"encoder_channels": [8, 8], "decoder_channels": [8, 8, 8]},
        **{"image_size": 32, "num_slots": 4, "slot_size": 16},
    },
    "steve": {
        "steve": {"width": 16, "cnn_width": 8, "vocabulary": 32, "decoder_blocks": 1},
        **{"image_size": 32, "num_slots": 4, "slot_size": 16},
    },
    "diod": {
        **{"image_size": 32, "num_slots": 5, "slot_size": 16},
        "diod": {"widths": [4, 8], "blocks": [1, 1], "burn_in": 0.5, "smallest_segment": 10},
    },
}


def of_system(system, steps):
    return {
        "clips": {"motion": "masks"} if system == "diod" else {},
        "teacher": {**SYSTEMS[system], "train": {**TRAINING, "steps": steps}},
    }


def config_of(folder, system=None):
    """The demo's, with the system's preset laid over it, and over both what makes it small."""
    values = {
        **(of_system(system, 30) if system else {}),
        "dataset": {"synthetic": {"videos": 6, "validation_videos": 2, "frames": 9, "size": 48}},
        "student": {**tiny_section(24, 48, (32,)), "initialisation": "default"},
        "targets": {"student_features": False},
        "distill": {**TRAINING, "steps": 20, "warmup_steps": 2, "validate_every": 0},
        "ray": {"teacher_cpus": 1.5},
        "storage": {"root": str(folder / "root")},
    }
    small = folder / "small.yaml"
    small.write_text(yaml.safe_dump(values))
    presets = [CONFIGS / "systems" / f"{system}.yaml"] if system else []
    return load_config(CONFIGS / "demo.yaml", presets=[*presets, small])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_from_videos_to_segments(system, local_ray, tmp_path):
    config = config_of(tmp_path, system)
    shard(config)
    trained = train_teacher(config)
    curve = storage.read_json(trained["history"])
    assert [row["step"] for row in curve] == list(range(1, 31))
    assert all(math.isfinite(row["total"]) for row in curve)
    teacher = load_slot_model(trained["model"])
    assert teacher.config.to_dict()["system"] == system

    cache(config)
    student = distill(config)
    curve = storage.read_json(student["history"])
    assert all(math.isfinite(row["slot_kd"]) for row in curve)
    assert load_slot_model(student["model"]).config.num_slots == teacher.config.num_slots
    for model in (None, trained["model"], f"{trained['uri']}/teacher.ckpt"):
        scores = evaluate(with_overrides(config, {"evaluate.model": model}))["scores"]
        assert all(-1 <= scores[name] <= 1 for name in SCORES)

    report(config, latency_runs=1)
    text = (tmp_path / "root" / "report" / "report.md").read_text()
    assert f"| {config.teacher.title} (teacher) |" in text

    versions = [register(config), register_run(config, trained["uri"], None, contend=False)]
    video = next((tmp_path / "root" / "generated").rglob("*.mp4"))
    for version, of in zip(versions, (student, trained), strict=True):
        assert trace(version["uri"], config.tracking_uri).missing == []
        folder = tmp_path / f"version {version['version']}"
        pull(version["uri"], folder, config.tracking_uri)
        pulled = load_slot_model(folder)
        assert pulled.config == load_slot_model(of["model"]).config
        assert segment(pulled, video, folder / "segmented")["frames"] == 9


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rivals_are_trained_once_and_stand_beside_each_other(tmp_path):
    """Without Ray, as one CPU needs none."""
    presets = {}
    for system in ("savi", "diod"):
        values = yaml.safe_load((CONFIGS / "systems" / f"{system}.yaml").read_text())
        small = of_system(system, 4)
        values["clips"] |= small["clips"]
        values["teacher"] |= small["teacher"]
        presets[system] = str(tmp_path / f"{system}.yaml")
        (tmp_path / f"{system}.yaml").write_text(yaml.safe_dump(values))
    document = tmp_path / "page.md"
    document.write_text("# Mine\n\n<!-- rivals: begin -->\n<!-- rivals: end -->\n")
    keys = {"rivals.systems": presets, "rivals.seeds": [0, 1], "rivals.document": str(document)}
    config = with_overrides(config_of(tmp_path), {**keys, "ray.num_cpus": 1})
    first = rivals(with_overrides(config, {"rivals.train": ["savi:0"]}))
    assert first["missing"] == ["SAVi, 1 of 2 seeds", "DIOD (uses motion), 2 of 2 seeds"]
    assert "| DIOD (uses motion) | – |" in document.read_text()
    teachers = tmp_path / "root" / "teachers"
    (known,) = teachers.iterdir()
    made = (known / "manifest.json").stat().st_mtime_ns

    no_kd = students_of(config)[NO_KD]
    shard(no_kd)
    distill(no_kd)
    second = rivals(config)
    assert second["missing"] == []
    assert len(list(teachers.iterdir())) == 4
    assert (known / "manifest.json").stat().st_mtime_ns == made, "found, and not made again"
    titles = ["SlotContrast (teacher)", "Student (no KD)", "SAVi", "DIOD (uses motion)"]
    assert list(second["scores"]) == titles
    lines = document.read_text().splitlines()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in lines if line.startswith("|")}
    assert list(rows)[2:7] == [*titles, "one slot"]
    assert rows["SAVi"][:2] == ["2", "4"]
    assert float(rows["SAVi"][2]) > 0, "MLflow has its speed"
    assert all("(n=2)" in cell for cell in rows["DIOD (uses motion)"][5:])
    assert "](page-frames.png)" in document.read_text()
    with Image.open(tmp_path / "page-frames.png") as picture:
        assert picture.width > 300

    report(config, latency_runs=0)
    text = (tmp_path / "root" / "report" / "report.md").read_text()
    for title in ("SAVi", "DIOD (uses motion)"):
        assert f"| {title} | {' | '.join(rows[title][5:])}" in text
