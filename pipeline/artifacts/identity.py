"""What an artifact is."""

from __future__ import annotations

from typing import Any

from pipeline import storage
from pipeline.clips.sources.base import VideoRef
from pipeline.clips.table import ClipSet
from pipeline.config.sections import Clips, Config, ConfigError, Distill, Model
from pipeline.models.build import backbone_config, checkpoint_hints
from pipeline.models.checkpoints import CONFIG_FILE, WEIGHTS_FILE, CheckpointHints

MODEL_FOLDER = "model"


def model_identity(uri: str, hints: CheckpointHints) -> dict[str, Any]:
    """What decides what a loaded model computes, for fingerprints: its files, and what they don't tell.

    Raises:
        ConfigError: nothing there.
    """
    folder = storage.is_folder(uri)
    files = [storage.join(uri, name) for name in (CONFIG_FILE, WEIGHTS_FILE)] if folder else [uri]
    try:
        # Folders have a config, and hints are ignored there.
        return {
            "files": [storage.hash_file(file) for file in files],
            "hints": None if folder else hints.to_dict(),
        }
    except storage.MissingBucketError:
        raise
    except FileNotFoundError:
        raise ConfigError(f"teacher.checkpoint: there is no model at {uri!r}") from None


def backbone_identity(section: Model) -> dict[str, Any]:
    """What decides the features of a backbone: for fingerprints."""
    weights = section.backbone_weights
    if weights not in ("timm", "random"):
        try:
            weights = storage.hash_file(weights)
        except storage.MissingBucketError:
            raise
        except FileNotFoundError:
            raise ConfigError(f"backbone_weights: there is no file {weights!r}") from None
    config = backbone_config(section)
    return {
        "name": config.name,
        "arguments": config.arguments,
        "image_size": config.image_size,
        "weights": weights,
        "mean": section.mean,
        "std": section.std,
    }


def teacher_location(config: Config, clips_fingerprint: str) -> str:
    """Where the teacher is: `teacher.checkpoint`, or the place where `jobs.teacher` writes it."""
    if config.teacher.checkpoint:
        return storage.absolute(config.teacher.checkpoint)
    return storage.join(teacher_run_uri(config, clips_fingerprint), MODEL_FOLDER)


def teacher_run_uri(config: Config, clips_fingerprint: str) -> str:
    section = config.teacher
    content = {
        "clips": clips_fingerprint,
        "model": {
            **section.model_dump(exclude={"name", "checkpoint", "num_heads", "train", "backbone_weights"}),
            **section.sizes,
        },
        "backbone": backbone_identity(section),
        "train": section.train.model_dump(exclude=RUN_DETAILS),
        "views": view_recipe(config),
    }
    return storage.join(storage.absolute(config.storage.root), "teachers", storage.fingerprint(content))


# Settings of a training run that don't change what is learned.
RUN_DETAILS = {
    "cpus_per_worker",
    "loader_threads",
    "log_every",
    "checkpoint_every",
    "validate_every",
    "keep_checkpoints",
    "overlays",
    "max_failures",
    "measure_bound_every",
}


def view_recipe(config: Config) -> dict[str, Any]:
    """What decides the views, for fingerprints."""
    keys = {"views", "crop", "min_scale", "flip"}
    return {**config.targets.model_dump(include=keys), "seed": config.dataset.seed}


def require_teacher(config: Config, clips_fingerprint: str) -> str:
    """`teacher_location`, after making sure that something is there.

    Raises:
        ConfigError: no model there.
    """
    uri = teacher_location(config, clips_fingerprint)
    if not storage.exists(uri):
        if config.teacher.checkpoint:
            raise ConfigError(f"teacher.checkpoint: there is no file or folder {config.teacher.checkpoint!r}")
        raise ConfigError(
            "there is no teacher of these clips and settings: train one (python -m jobs.teacher CONFIG), or name one "
            "that you have (teacher.checkpoint=PATH)"
        )
    return uri


def clip_set_uri(config: Config, videos: list[VideoRef]) -> str:
    """The folder that a clip set of these videos has or will have."""
    return storage.join(storage.absolute(config.storage.root), "clips", _fingerprint(config.clips, videos))


def _fingerprint(settings: Clips, videos: list[VideoRef]) -> str:
    return storage.fingerprint(
        {
            "format": FORMAT,
            "settings": _content_settings(settings),
            "decoder": {
                "av": av.__version__,
                **{k: v for k, v in av.library_versions.items() if "codec" in k},
            },
            "sources": [(v.video_id, v.content) for v in videos],
        }
    )


def _content_settings(settings: Clips) -> dict[str, Any]:
    """The settings that decide what a clip set holds, so not how many bad videos are tolerated."""
    return settings.model_dump(exclude={"max_bad_fraction"})


def find_targets(config: Config, clips: ClipSet) -> str:
    """The URI of the target set that `cache` makes of a clip set, published yet or not."""
    return _describe(config, clips)[0]


def _describe(config: Config, clips: ClipSet) -> tuple[str, dict[str, Any]]:
    teacher_uri = teacher_location(config, clips.fingerprint)
    content = {
        "format": FORMAT,
        "clips": clips.fingerprint,
        "teacher": model_identity(teacher_uri, checkpoint_hints(config)),
        "rollout": config.targets.rollout,
        "views": view_recipe(config),
        "student_features": None,
        "teacher_features": config.targets.feature_dtype if config.targets.teacher_features else None,
    }
    if config.targets.student_features:
        content["student_features"] = {
            **backbone_identity(config.student),
            "dtype": config.targets.feature_dtype,
        }
    uri = storage.join(storage.absolute(config.storage.root), "targets", storage.fingerprint(content))
    return uri, content


def _what_decides(settings: Distill) -> dict[str, Any]:
    """The settings that decide what is learned: of a method that does not use them, no weights."""
    unused = set(RUN_DETAILS)
    if not settings.distils_slots:
        unused.add("beta")
    if not settings.distils_reconstruction:
        unused.add("reconstruction_kd_weight")
    if settings.method != "feature_kd":
        unused.add("feature_kd_weight")
    if settings.method != "slotmatch_hungarian":
        unused.add("matching")
    if not settings.distils:
        unused |= {"live_teacher", "slot_map"}
    copies = settings.initial_slots_from_teacher
    return {
        **settings.model_dump(exclude=unused),
        "initial_slots_from_teacher": settings.distils if copies is None else copies,
    }


def _but_seed_and_name(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in ("seed", "name")}


def _has_features(config: Config, targets_uri: str) -> bool:
    return config.targets.student_features and storage.is_complete(targets_uri)
