"""Every system through the stages: trained, cached, distilled from, scored, registered, pulled, and put to use."""

import math

import pytest
import yaml
from places import CONFIGS
from tiny_models import tiny_section

from pipeline import storage
from pipeline.clips.stage import shard
from pipeline.config import load_config, with_overrides
from pipeline.distill.stage import distill, train_teacher
from pipeline.evaluate.scoring import SCORES
from pipeline.evaluate.stage import evaluate
from pipeline.models import load_slot_model
from pipeline.registry.lineage import trace
from pipeline.registry.stage import pull, register, register_run
from pipeline.report.stage import report
from pipeline.segment.stage import segment
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


def config_of(system, folder):
    """The demo's, with the system's preset laid over it, and over both what makes it small."""
    values = {
        "clips": {"motion": "masks"} if system == "diod" else {},
        "dataset": {"synthetic": {"videos": 6, "validation_videos": 2, "frames": 9, "size": 48}},
        "teacher": {**SYSTEMS[system], "train": {**TRAINING, "steps": 30}},
        "student": {**tiny_section(24, 48, (32,)), "initialisation": "default"},
        "targets": {"student_features": False},
        "distill": {**TRAINING, "steps": 20, "warmup_steps": 2, "validate_every": 0},
        "ray": {"teacher_cpus": 1.5},
        "storage": {"root": str(folder / "root")},
    }
    small = folder / "small.yaml"
    small.write_text(yaml.safe_dump(values))
    return load_config(CONFIGS / "demo.yaml", presets=[CONFIGS / "systems" / f"{system}.yaml", small])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_from_videos_to_segments(system, local_ray, tmp_path):
    config = config_of(system, tmp_path)
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
