"""A config with all that its fingerprints are made of, without videos, teachers or students: made-up sources, and
manifests and model files where artifacts look for them."""

import clip_sets
from tiny_models import tiny_vit

from pipeline import storage
from pipeline.artifacts import identity
from pipeline.artifacts.identity import Artifacts
from pipeline.artifacts.manifests import TargetManifest
from pipeline.artifacts.subjects import baseline_subject, model_subject
from pipeline.clips.library import ClipLibrary
from pipeline.clips.sources import VideoRef
from pipeline.clips.table import VideoEntry
from pipeline.config import load_config, with_overrides
from pipeline.models import BackboneConfig, SlotModelConfig
from pipeline.models.build import checkpoint_hints
from pipeline.sweep.settings import plan_trials
from pipeline.sweep.stage import _locate


class MadeUpVideos(ClipLibrary):
    def videos(self, config, split):
        return [VideoRef(f"video_{i}", f"/videos/{i}.mp4", f"content-{i} of {split}") for i in range(3)]


def use_one_decoder(monkeypatch):
    """Fingerprints do not depend on the PyAV of this machine."""
    monkeypatch.setattr(identity, "_decoder", lambda: {"av": "1.0", "libavcodec": (1, 2, 3)})


FIRST_DEMO = [
    "student.initialisation=soft_kmeans",
    "distill.initial_slots_from_teacher=null",
    "distill.steps=1000",
    "distill.checkpoint_every=500",
    "distill.validate_every=500",
    "distill.measure_bound_every=500",
]


def world(name, root, *overrides):
    """`Artifacts` of `configs/NAME.yaml`, its clips published and its teacher there; of the demo the student that it
    had at first."""
    of_old = FIRST_DEMO if name == "demo" else []
    config = load_config(f"configs/{name}.yaml", [*of_old, *overrides])
    return at(with_overrides(config, {"storage.root": str(root)}))


def at(config):
    artifacts = Artifacts(config, MadeUpVideos())
    for clips in (artifacts.clips, artifacts.evaluation_clips):
        publish_clips(clips.uri)
    if config.teacher.checkpoint is None:
        write_model(artifacts.teacher.uri, 1)
        publish_targets(artifacts)
    return artifacts


def publish_clips(uri):
    entries = [VideoEntry(f"video_{i}", "shard-00000.parquet", i, 1, 1, 4, 8, 8, True) for i in range(3)]
    clip_sets.publish_clips(uri, entries, (), {"clip_frames": 4})


def write_model(uri, number):
    """Files of a model that nobody loads."""
    config = SlotModelConfig(BackboneConfig(None, 16, tiny_vit()), 15, 128)
    storage.write_json(f"{uri}/config.json", config.to_dict())
    storage.write_bytes(f"{uri}/model.safetensors", bytes([number]) * 8)


def publish_targets(artifacts):
    """Says what the teacher is, so that it need not be loaded."""
    config = storage.read_json(f"{artifacts.teacher.uri}/config.json")
    views = {"views": artifacts.config.targets.views}
    TargetManifest(views=views, teacher_config=config, rows=3).publish(artifacts.targets.uri)


def fingerprints(artifacts):
    """Of everything that is made of a config."""
    config = artifacts.config
    write_model(artifacts.student_model, 2)
    evaluated = artifacts.evaluation_clips.uri
    teacher = model_subject(artifacts.teacher.uri, checkpoint_hints(config))
    found = {
        "clips": artifacts.clips.fingerprint,
        "evaluation clips": artifacts.evaluation_clips.fingerprint,
        "targets": artifacts.targets.fingerprint,
        "student": artifacts.student.fingerprint,
        "student: settings": artifacts.student_settings,
        "protocol": artifacts.rules_on(evaluated).fingerprint,
        "evaluation": artifacts.evaluation.fingerprint,
        "evaluation of the teacher": artifacts.scores_of(teacher, evaluated).fingerprint,
        "evaluation of a grid": artifacts.scores_of(baseline_subject("grid", 6), evaluated).fingerprint,
        "sweep": storage.name(_locate(artifacts, plan_trials(config)).uri),
    }
    if config.teacher.checkpoint is None:
        found["teacher"] = artifacts.teacher_run.fingerprint
    return found
