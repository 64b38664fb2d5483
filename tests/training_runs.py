"""Small training runs without a stage: made-up clips, a config, targets written in this process."""

from clip_sets import random_clips
from tiny_models import tiny_section

from pipeline import storage
from pipeline.artifacts.manifests import FeatureManifest, TargetManifest
from pipeline.clips.table import SHARD_FOLDER, ClipSet
from pipeline.config import resolve_config
from pipeline.distill.run import Run
from pipeline.models.build import load_teacher
from pipeline.targets.maker import FeatureMaker, TargetMaker

MODEL = tiny_section(32, 32, (16, 16))
TRAINING = {"steps": 20, "warmup_steps": 2, "batch_size": 4, "log_every": 1, "workers": 0}
TRAINING |= {"learning_rate": 0.002, "alpha": 0.5}


def make_clips(folder):
    return random_clips(folder, {f"v{i}": 9 for i in range(5)}).uri


def make_config(root, *overrides):
    values = {
        "storage": {"root": str(root)},
        "teacher": {**MODEL, "num_slots": 4, "slot_size": 16, "train": dict(TRAINING)},
        "student": MODEL,
        "targets": {"views": 2, "crop": "random", "min_scale": 0.6, "teacher_features": True},
        "distill": dict(TRAINING),
    }
    return resolve_config(values, overrides)


def make_targets(config, clips_uri, teacher_uri, uri):
    """As the stage `cache` makes them."""
    clips, maker = ClipSet(clips_uri), TargetMaker(config, clips_uri, teacher_uri)
    for shard in clips.shards:
        maker.write_shard(shard, storage.join(uri, SHARD_FOLDER))
    manifest = TargetManifest(
        fingerprint=storage.name(uri),
        clips=clips.fingerprint,
        clips_uri=clips_uri,
        teacher_uri=teacher_uri,
        teacher_config=maker.teacher.config.to_dict(),
        views=config.targets.model_dump(include={"views", "crop", "min_scale", "flip"}),
        student_features={"name": None} if config.targets.student_features else None,
        teacher_features=config.targets.feature_dtype if config.targets.teacher_features else None,
        shards=tuple(clips.shards),
        rows=sum(v.clips for v in clips.videos) * config.targets.views,
    )
    manifest.publish(uri)
    return uri


def make_features(config, clips_uri, section, uri):
    """As the stage `teacher` makes them."""
    clips, maker = ClipSet(clips_uri), FeatureMaker(config, clips_uri, section)
    for shard in clips.shards:
        maker.write_shard(shard, storage.join(uri, SHARD_FOLDER))
    FeatureManifest(
        clips=clips.fingerprint,
        backbone={},
        dtype=config.targets.feature_dtype,
        views=config.targets.model_dump(include={"views", "crop", "min_scale", "flip"}),
        rows=sum(v.clips for v in clips.videos) * config.targets.views,
    ).publish(uri)
    return uri


def student_run(config, uri, clips_uri, *, teacher_uri=None, targets_uri=None, features_uri=None):
    """Of a teacher, where there is one; with its targets, or with it live."""
    teacher_config = load_teacher(config, teacher_uri).config if teacher_uri else None
    taught = {"targets_uri": targets_uri, "teacher_uri": teacher_uri, "teacher_config": teacher_config}
    taught["features_uri"] = features_uri
    return Run.student(config, uri, clips_uri, **taught)
