"""Stages `distill` and `teacher`: the training loop on Ray Train, resumable and published once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from pipeline import storage, tracking
from pipeline.artifacts.identity import (
    MODEL_FOLDER,
    _but_seed_and_name,
    _has_features,
    _what_decides,
    backbone_identity,
    find_targets,
    model_identity,
    require_teacher,
    teacher_location,
    teacher_run_uri,
    view_recipe,
)
from pipeline.artifacts.once import lease
from pipeline.clips.stage import check_disjoint, find_clips, training_clips
from pipeline.clips.table import ClipSet
from pipeline.config import Config, ConfigError
from pipeline.distill.run import OnValidation, TrainingSpec, build
from pipeline.distill.validation import Validation
from pipeline.log import log
from pipeline.models.build import checkpoint_hints, load_teacher, student_sizes
from pipeline.targets.table import TargetSet
from pipeline.tracking.runs import HISTORY_FILE, git_revision


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became NaN or infinite; the last good checkpoint is kept."""


def distill(
    config: Config,
    clips_uri: str,
    *,
    title: str = "",
    run_tags: Mapping[str, str] | None = None,
    on_validation: OnValidation | None = None,
    train_callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Distils a student from cached targets (or a live teacher; or, with `method: no_kd`, from none).

    Finished runs of the same config, clips and targets are found and reused; an unfinished one goes on
    from its last checkpoint. Returns the job's summary.

    Args:
        title: what messages and a new MLflow run call it; without one `distill.name`.
        run_tags: further tags of a new MLflow run.
        on_validation: see `train_loop`; called in this process, so only with `distill.workers` = 0.
        train_callbacks: Ray Train's, to follow the same validations of its workers (`ray.train.report`).

    Raises:
        storage.IncompleteError: clips or targets are not published.
        ConfigError: the student doesn't fit the teacher.
        NonFiniteLoss: training diverged.
    """
    spec, tags = _student_spec(config, clips_uri)
    return _train(replace(spec, title=title), tags, run_tags or {}, on_validation, train_callbacks)


def find_student(config: Config, clips_uri: str) -> str:
    """The run folder of this config's student, whether it has been trained yet or not."""
    return _student_spec(config, clips_uri)[0].run_uri


def _student_spec(config: Config, clips_uri: str) -> tuple[TrainingSpec, dict[str, str]]:
    clips = ClipSet(clips_uri)
    settings = config.distill
    with_teacher = settings.distils
    location: str | None = None
    if with_teacher or settings.initial_slots_from_teacher or config.teacher.checkpoint is not None:
        location = require_teacher(config, clips.fingerprint)
    elif config.targets.student_features:
        trained = teacher_location(config, clips.fingerprint)
        location = trained if storage.exists(trained) else None
    targets_uri = teacher_config = None
    if location is not None:
        targets_uri = find_targets(config, clips)
        # Without KD the cache only spares the student its backbone, where it has been filled with features.
        if settings.live_teacher or not (with_teacher or _has_features(config, targets_uri)):
            targets_uri = None
        if targets_uri is not None:
            teacher_config = TargetSet(targets_uri).teacher_config
        else:
            teacher_config = load_teacher(config, location).config
    content: dict[str, Any] = {
        "clips": clips.fingerprint,
        "student": config.student.model_dump(exclude={"backbone_weights", "num_slots", "slot_size"}),
        "sizes": student_sizes(config, teacher_config),
        "backbone": backbone_identity(config.student),
        "features": config.targets.feature_dtype if config.targets.student_features else None,
        "distill": _what_decides(settings),
        "views": view_recipe(config),
    }
    if with_teacher and settings.live_teacher:
        assert location is not None
        identity = model_identity(location, checkpoint_hints(config))
        content["teacher"] = [identity, config.targets.rollout]
    elif with_teacher:
        assert targets_uri is not None
        content["targets"] = storage.name(targets_uri)
    elif settings.initial_slots_from_teacher:
        assert location is not None
        content["teacher"] = model_identity(location, checkpoint_hints(config))
    uri = storage.join(storage.absolute(config.storage.root), "students", storage.fingerprint(content))
    spec = TrainingSpec(
        config,
        "student",
        uri,
        clips_uri,
        targets_uri,
        location if with_teacher or settings.initial_slots_from_teacher else None,
        teacher_config,
    )
    return spec, {
        "clips": clips.fingerprint,
        "targets": str(content.get("targets")),
        "method": settings.method,
        **({"beta": f"{settings.beta:g}"} if settings.distils_slots else {}),
        "settings": storage.fingerprint({**content, "distill": _but_seed_and_name(content["distill"])}),
        "teacher": config.teacher.name,  # also of a student without KD: it has that teacher's design
        "trained_on": config.dataset.title,
    }


def train_teacher(config: Config, clips_uri: str) -> dict[str, Any]:
    """Trains a SlotContrast teacher on the clips; errors and return value as in `distill`."""
    clips = ClipSet(clips_uri)
    uri = teacher_run_uri(config, clips.fingerprint)
    spec = TrainingSpec(config, "teacher", uri, clips_uri)
    return _train(spec, {"clips": clips.fingerprint, "method": "teacher", "trained_on": config.dataset.title})


def _train(
    spec: TrainingSpec,
    tags: dict[str, str],
    run_tags: Mapping[str, str] = MappingProxyType({}),
    on_validation: OnValidation | None = None,
    train_callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    uri = spec.run_uri
    if not storage.is_complete(uri):
        with lease(uri, spec.label):
            if not storage.is_complete(uri):
                _train_to_the_end(spec, tags, run_tags, on_validation, train_callbacks)
                return {**_summary(spec), "reused": False}
    log(f"{spec.label}: this run is finished, reusing {uri}")
    summary = _summary(spec)
    tracking.complete_run(spec.config, uri, summary["mlflow_run"], wait=False)
    return {**summary, "reused": True}


def _train_to_the_end(
    spec: TrainingSpec,
    tags: dict[str, str],
    run_tags: Mapping[str, str],
    on_validation: OnValidation | None,
    train_callbacks: Sequence[Any],
) -> None:
    """Trains and publishes the run."""
    config, uri = spec.config, spec.run_uri
    if spec.settings.warmup_steps >= spec.settings.steps:
        log(
            f"{spec.label}: WARNING, warm-up ({spec.settings.warmup_steps} steps) outlasts training "
            f"({spec.settings.steps} steps); set warmup_steps to a tenth of it or less"
        )
    build(spec)  # what can't be built is said here and now, not by every worker several times over
    spec = replace(spec, validation_uri=_validation_clips(spec))
    storage.write_bytes(storage.join(uri, "config.yaml"), config.to_yaml().encode())
    name = config.distill.name if spec.role == "student" else ""
    tags = {
        **tags,
        "role": spec.role,
        "seed": str(spec.settings.seed),
        "steps": str(spec.settings.steps),
        "git_revision": git_revision(),
        "mlflow.runName": name or f"{spec.role}-{storage.name(uri)[:8]}",
    }
    run_name = spec.title or tags["mlflow.runName"]
    run_id = tracking.start_run(config, uri, run_name, {**tags, "mlflow.runName": run_name, **run_tags})
    logger = tracking.RunLogger(config, run_id)
    spec = replace(spec, mlflow_run=run_id)
    started = time.monotonic()
    try:
        result = _fit(spec, on_validation, train_callbacks)
    except BaseException:
        logger.end("FAILED")
        raise
    if result["status"] == "non-finite":
        logger.end("FAILED")
        raise NonFiniteLoss(
            f"{spec.label}: the gradient was not finite in step {result['step'] + 1}; the last good checkpoint "
            f"is kept in {uri}. Lower the learning rate ({spec.settings.learning_rate:g}), or set precision=fp32"
        )
    if not storage.is_complete(uri):  # what is published is never changed, whoever was faster
        storage.publish(
            uri,
            {
                "kind": spec.role,
                "fingerprint": storage.name(uri),
                "created": storage.timestamp(),
                "clips_uri": spec.clips_uri,
                "targets_uri": spec.targets_uri,
                "teacher_uri": spec.teacher_uri,
                "mlflow_run": run_id,
                "steps": spec.settings.steps,
                "seconds": round(time.monotonic() - started, 1),
                "losses": result["history"][-1] if result["history"] else {},
                "tags": tags,
            },
        )
    tracking.complete_run(config, uri, run_id)


def _validation_clips(spec: TrainingSpec) -> str | None:
    """The clip set to validate on, where the config asks for it.

    Raises:
        ConfigError: no split is named, its clips have not been made, or none of them can be scored.
    """
    if not spec.settings.validate_every:
        return None
    split = spec.config.evaluate.split
    if split is None:
        raise ConfigError("validate_every: needs evaluate.split, the videos with masks to score on")
    uri = find_clips(spec.config, split)
    if not storage.is_complete(uri):
        raise ConfigError(
            f"validate_every: the clips of {split!r} are not there ({uri}); python -m jobs.shard CONFIG"
        )
    Validation(uri, spec.config.evaluate)
    return uri


def _summary(spec: TrainingSpec) -> dict[str, Any]:
    manifest = storage.read_manifest(spec.run_uri)
    return {
        "uri": spec.run_uri,
        "model": storage.join(spec.run_uri, MODEL_FOLDER),
        "history": storage.join(spec.run_uri, HISTORY_FILE),
        "mlflow_run": manifest["mlflow_run"],
        "steps": manifest["steps"],
        "losses": manifest["losses"],
    }


def teacher_stage(config: Config) -> dict[str, Any]:
    check_disjoint(config)
    if config.teacher.checkpoint:
        raise ConfigError(
            f"teacher.checkpoint: is set ({config.teacher.checkpoint!r}), so there is none to train"
        )
    return train_teacher(config, training_clips(config))


def distill_stage(config: Config) -> dict[str, Any]:
    check_disjoint(config)
    return distill(config, training_clips(config))
