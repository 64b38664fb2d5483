"""Every preset of a student's backbone on the demo's generated videos, from shards to exported files."""

import math

import pytest
from places import CONFIGS, ROOT

from pipeline import storage
from pipeline.clips.stage import shard
from pipeline.config import load_config
from pipeline.distill.stage import distill
from pipeline.evaluate.scoring import SCORES
from pipeline.evaluate.stage import evaluate
from pipeline.models import load_slot_model
from pipeline.registry.export import export
from pipeline.targets.stage import cache

# What each needs to be small: other weights, the demo's image size, few videos and steps.
SMALL = [
    "student.backbone_weights=random",
    "student.image_size=96",
    "student.initialisation=soft_kmeans",  # of random features nothing leads to the teacher's
    f"teacher.checkpoint={ROOT / 'demo' / 'teacher'}",
]
SMALL += [f"dataset.synthetic.{key}" for key in ("videos=6", "validation_videos=2", "frames=8")]
SMALL += [
    "distill.steps=20",
    "distill.log_every=1",
    "distill.warmup_steps=2",
    "distill.validate_every=0",
    "distill.measure_bound_every=0",
]
SMALL += ["evaluate.baselines=false", "evaluate.teacher=false", "ray.teacher_cpus=1.5"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("preset", sorted((CONFIGS / "students").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_preset_from_videos_to_exported_files(preset, local_ray, tmp_path):
    settings = [*SMALL, f"storage.root={tmp_path / 'root'}"]
    config = load_config(CONFIGS / "demo.yaml", settings, presets=[preset])
    shard(config)
    cache(config)  # of the student's features too
    trained = distill(config)
    curve = storage.read_json(trained["history"])
    assert [row["step"] for row in curve] == list(range(1, 21))
    assert all(math.isfinite(row["total"]) for row in curve)
    scores = evaluate(config)["scores"]
    assert all(-1 <= scores[name] <= 1 for name in SCORES)
    model = load_slot_model(trained["model"])
    assert model.config.backbone.name == config.student.backbone
    summary = export(config, model, trained["model"], str(tmp_path / "exported"))
    assert summary["frames_compared"] == 30
    for file in ("model.onnx", "model.pt2"):
        form = summary["forms"][file]
        assert max(form["difference"]["slots"], form["difference"]["masks"]) < 1e-4
        assert set(form["scores"]) == set(SCORES)
