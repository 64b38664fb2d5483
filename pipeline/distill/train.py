"""Stages `distill` and `teacher`: the training loop on Ray Train, resumable and published once."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from pipeline import storage, tracking
from pipeline.builders import (
    MODEL_FOLDER,
    RUN_DETAILS,
    backbone_identity,
    checkpoint_hints,
    load_teacher,
    model_identity,
    require_teacher,
    student_sizes,
    teacher_location,
    teacher_run_uri,
    view_recipe,
)
from pipeline.clips.shard import find_clips
from pipeline.clips.table import ClipSet
from pipeline.config import Config, ConfigError, Distill, Training
from pipeline.distill.loop import HISTORY_FILE, OnValidation, TrainingSpec, build, train_loop
from pipeline.distill.validation import Validation
from pipeline.lease import lease
from pipeline.progress import log
from pipeline.ray_session import gpus_to_use, ray_session
from pipeline.targets import TargetSet, find_targets


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


def _worker(options: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs on every worker."""
    import ray.train
    import ray.train.torch

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    context = ray.train.get_context()

    def report(step: int) -> None:
        ray.train.report({"step": step})  # a barrier: every worker reports as often

    return train_loop(
        options["spec"],
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=ray.train.torch.get_device(),
        after_checkpoint=report,
        on_validation=lambda step, scores: ray.train.report({"step": step, **scores}),
        preempted=lambda: ray.train.get_preemption_info() is not None,
    )


def _fit(
    spec: TrainingSpec, on_validation: OnValidation | None, train_callbacks: Sequence[Any]
) -> dict[str, Any]:
    if spec.settings.workers == 0:
        return train_loop(spec, on_validation=on_validation) if on_validation else train_loop(spec)
    with ray_session(spec.config):
        return _fit_on_ray(spec, train_callbacks)


def _fit_on_ray(spec: TrainingSpec, callbacks: Sequence[Any]) -> dict[str, Any]:
    import ray.train
    import ray.train.torch

    config, settings = spec.config, spec.settings
    root = storage.join(storage.absolute(config.storage.root), "ray")
    # Ray keeps only its own bookkeeping here; the checkpoints are ours. A name of its own for every
    # attempt: Ray would take a finished run of the same name for one to be resumed.
    name = f"{spec.role}-{uuid.uuid4().hex[:12]}"
    gpus = gpus_to_use(config)
    _check_resources(settings, gpus)
    worker: Any = _worker
    run_config: Any = ray.train.RunConfig  # typed as the older one, which has no logging_config
    trainer = ray.train.torch.TorchTrainer(
        worker,
        train_loop_config={"spec": spec},
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": settings.cpus_per_worker, **({"GPU": 1} if gpus else {})},
        ),
        run_config=run_config(
            name=name,
            storage_path=storage.filesystem(root)[1],
            storage_filesystem=arrow_filesystem(root),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
            callbacks=list(callbacks),
        ),
    )
    try:
        result: Any = trainer.fit()
        return result.return_value
    finally:
        storage.delete(storage.join(root, name))


def _check_resources(settings: Training, gpus: int) -> None:
    """More workers than the cluster can ever hold would wait without a word.

    Raises:
        ConfigError: naming the number that fits.
    """
    import ray

    total = gpus if gpus else ray.cluster_resources().get("CPU", 1)
    fits = max(1, int(total if gpus else total // settings.cpus_per_worker))
    if settings.workers > fits:
        unit = "GPUs" if gpus else f"CPUs ({settings.cpus_per_worker:g} a worker)"
        raise ConfigError(
            f"workers: {settings.workers} don't fit this cluster's {total:g} {unit}; nearest valid: {fits}"
        )


def arrow_filesystem(uri: str) -> Any:
    """What Ray Train and Tune take as `storage_filesystem`; None, which they understand, for a local path."""
    if not storage.is_remote(uri):
        return None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return PyFileSystem(FSSpecHandler(storage.filesystem(uri)[0]))


def git_revision() -> str:
    """`SLOTMATCH_REVISION` where it is set (a submitted job has no .git), else this checkout's commit or "unknown"."""
    import os
    import subprocess
    from pathlib import Path

    if os.environ.get("SLOTMATCH_REVISION"):
        return os.environ["SLOTMATCH_REVISION"]

    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() if result.returncode == 0 else "unknown"
