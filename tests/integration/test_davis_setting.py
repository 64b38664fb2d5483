"""The setting of DAVIS for two cores, on a tiny data set of its layout with one object a video, and a tiny ViT."""

import io
from pathlib import Path

import numpy as np
import pytest
from layouts import png_bytes, write_davis
from PIL import Image
from places import CONFIGS
from tiny_models import tiny_vit

from pipeline import storage
from pipeline.artifacts.manifests import FeatureManifest, RunManifest, SweepManifest
from pipeline.clips.stage import shard
from pipeline.clips.table import ClipSet
from pipeline.config import load_config, with_overrides
from pipeline.distill.stage import train_teacher
from pipeline.models.build import load_teacher
from pipeline.sweep.evidence import evidence

pytestmark = pytest.mark.usefixtures("not_exported")

TINY = {
    "dataset.splits": {"validation": {"of": "val", "take": 1}, "test": {"of": "val", "skip": 1}},
    "clips.short_side": 32,
    "teacher.image_size": 32,
    "student.image_size": 16,
    "sweep.variants": {"no KD": {"distill.method": "no_kd"}, "SlotMatch": {"distill.method": "slotmatch"}},
    "sweep.seeds": [0],
    "sweep.seeds_of": {"SlotMatch": [0, 1]},
    "evidence.claims": ["SlotMatch > no KD"],
}


def one_object(folder):
    """Masks as those of DAVIS 2016: all objects are one."""
    for path in (folder / "Annotations_unsupervised").rglob("*.png"):
        labels = np.array(Image.open(io.BytesIO(path.read_bytes())))
        path.write_bytes(png_bytes(np.where(labels == 255, 255, np.minimum(labels, 1)).astype(np.uint8)))


@pytest.fixture
def config(tmp_path):
    write_davis(tmp_path / "DAVIS", videos=4, frames=4)
    one_object(tmp_path / "DAVIS")
    values = {**TINY, "dataset.path": str(tmp_path / "DAVIS"), "storage.root": str(tmp_path / "runs")}
    for section in ("teacher", "student"):
        vit = {"backbone": tiny_vit(depth=2), "backbone_weights": "random", "decoder_hidden_sizes": [8]}
        values |= {f"{section}.{key}": value for key, value in vit.items()}
    for section in ("teacher.train", "distill"):
        small = {"steps": 2, "warmup_steps": 1, "batch_size": 2, "validate_every": 1}
        values |= {f"{section}.{key}": value for key, value in small.items()}
    shipped = load_config(CONFIGS / "davis_small.yaml", presets=[CONFIGS / "sweeps/davis_small.yaml"])
    return with_overrides(shipped, values)


def test_methods_on_a_test_part_of_davis(config, local_ray, capfd):
    summary = shard(config)
    assert summary["evaluation"]["videos"] == 1
    assert ClipSet(summary["evaluation"]["uri"]).manifest.split == "validation"
    assert load_teacher(config, train_teacher(config)["model"]).config.backbone.image_size == 32

    found = evidence(config)
    err = capfd.readouterr().err
    page = Path(found["table"]).read_text()
    assert page.startswith("# Evidence\n\n2 videos of the split 'test'")
    for masks in ("the decoder", "slot attention"):
        assert page.count(f"### DAVIS, test, masks of {masks}") == 2, "scores and orderings"
    assert page.count("| no KD | 1 | 2 |") == page.count("| SlotMatch | 2 | 2 |") == 2
    assert page.count("| SlotMatch \\> no KD | video mBO | 1 |") == 2, "of the seed that both have"
    assert page.count("| grid |") == 1
    assert "k-means on the student's features" in page
    assert "| setting | step 1 | step 2 |" in page
    assert "FG-ARI" in err
    assert {p.name for p in Path(found["uri"]).glob("*.png")} == {
        "evidence.png",
        "evidence-attention.png",
        "evidence-curves.png",
        "evidence-frames.png",
    }

    manifest = SweepManifest.read(storage.join(config.storage.root, "sweeps", found["sweep"]))
    runs = [RunManifest.read(trial.run) for trial in manifest.trials]
    assert [trial.setting for trial in manifest.trials] == ["no KD", "SlotMatch", "SlotMatch"]
    (features,) = {run.features_uri for run in runs}
    assert FeatureManifest.read(features).backbone["image_size"] == 16
    times = {
        trial.run: Path(trial.run, "model/model.safetensors").stat().st_mtime_ns for trial in manifest.trials
    }
    assert evidence(config)["uri"] == found["uri"]
    assert {run: Path(run, "model/model.safetensors").stat().st_mtime_ns for run in times} == times
    assert "all scores found, reusing them" in capfd.readouterr().err
