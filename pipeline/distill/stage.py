"""Stages `distill` and `teacher`: a training run, resumable and published once."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from pipeline import storage, tracking
from pipeline.artifacts.identity import Artifacts
from pipeline.artifacts.manifests import MODEL_FOLDER, RunManifest, TargetManifest
from pipeline.artifacts.once import is_whole, once, require_files
from pipeline.artifacts.subjects import model_files
from pipeline.clips.library import artifacts_of, check_disjoint, clip_files, open_clips
from pipeline.config import Config, ConfigError, Model
from pipeline.distill.hooks import Outcome
from pipeline.distill.ray_train import fit, machines
from pipeline.distill.run import OnValidation, Run, build
from pipeline.distill.validation import Validation
from pipeline.log import log
from pipeline.models.build import teacher_title
from pipeline.targets.stage import cache_features, target_files
from pipeline.tracking.client import optional
from pipeline.tracking.datasets import log_training_data
from pipeline.tracking.runs import git_revision
from pipeline.tracking.system_metrics import check_system_metrics

# One run at a time begins in a process, as what is built draws PyTorch's global random numbers.
_beginning = threading.Lock()


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became NaN or infinite; the last good checkpoint is kept."""


def distill(
    config: Config,
    artifacts: Artifacts | None = None,
    *,
    title: str = "",
    run_tags: Mapping[str, str] = MappingProxyType({}),
    workers: int | None = None,
    on_validation: OnValidation | None = None,
    train_callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Distils a student from cached targets (or a live teacher; or, with `method: no_kd`, from none).

    With `student.cached_features` the features that it reads are made first, where they lack.

    Finished runs of the same config, clips and targets are found and reused; an unfinished one goes on
    from its last checkpoint. Returns the job's summary.

    Args:
        artifacts: the config's, where they are known already.
        title: what messages and a new MLflow run call it; without one `distill.name`.
        run_tags: further tags of a new MLflow run.
        workers: see `machines`.
        on_validation, train_callbacks: see `fit`.

    Raises:
        ConfigError: the clips have not been made, the student doesn't fit the teacher, or the workers the cluster.
        storage.IncompleteError: the targets are not published.
        NonFiniteLoss: training diverged.
    """
    if artifacts is None:
        artifacts = artifacts_of(config)
        check_disjoint(artifacts)
    clips = open_clips(artifacts.clips)
    inputs = artifacts.student_inputs
    if inputs.targets_uri is not None:
        TargetManifest.read(inputs.targets_uri)
        require_files(inputs.targets_uri, target_files, "cache")
    run = Run.student(
        config,
        artifacts.student.uri,
        clips.uri,
        targets_uri=inputs.targets_uri,
        teacher_uri=inputs.teacher_uri,
        teacher_config=artifacts.teacher_config,
        features_uri=_features_uri(artifacts, config.student),
        title=title,
    )
    tags = {
        "clips": clips.fingerprint,
        "method": config.distill.method,
        "settings": artifacts.student_settings,
        "teacher": teacher_title(config, artifacts.teacher_config),  # without KD: whose design it has
        "trained_on": config.dataset.title,
    }
    if config.distill.distils and inputs.targets_uri is not None:
        tags["targets"] = artifacts.targets.fingerprint
    if config.distill.distils_slots:
        tags["beta"] = f"{config.distill.beta:g}"
    return _train(run, artifacts, tags, run_tags, workers, on_validation, train_callbacks)


def train_teacher(config: Config, artifacts: Artifacts | None = None) -> dict[str, Any]:
    """Trains a teacher on the clips; cached features, return value and errors as in `distill`.

    Raises:
        ConfigError: `teacher.checkpoint` gives one.
    """
    if artifacts is None:
        artifacts = artifacts_of(config)
        check_disjoint(artifacts)
    if config.teacher.checkpoint:
        raise ConfigError(
            f"teacher.checkpoint: is set ({config.teacher.checkpoint!r}), so there is none to train"
        )
    clips = open_clips(artifacts.clips)
    features_uri = _features_uri(artifacts, config.teacher)
    run = Run.teacher(config, artifacts.teacher_run.uri, clips.uri, features_uri=features_uri)
    tags = {
        "clips": clips.fingerprint,
        "method": "teacher",
        "settings": artifacts.teacher_settings,
        "teacher": config.teacher.title,
        "trained_on": config.dataset.title,
    }
    if config.teacher.system != "slotcontrast":
        tags["system"] = config.teacher.recorded_system
    if config.teacher.uses_motion:
        tags["motion"] = config.clips.motion
    return _train(run, artifacts, tags)


def _features_uri(artifacts: Artifacts, section: Model) -> str | None:
    """Where stored features of a section's backbone are or will be, if it trains on them."""
    return artifacts.features(section).uri if section.cached_features else None


def run_files(uri: str) -> list[str]:
    """The files that a finished run can't do without."""
    return [*model_files(uri), tracking.HISTORY_FILE]


def _train(
    run: Run,
    artifacts: Artifacts,
    tags: dict[str, str],
    run_tags: Mapping[str, str] = MappingProxyType({}),
    workers: int | None = None,
    on_validation: OnValidation | None = None,
    train_callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Trains and publishes a run, or finds it finished."""
    inputs = [run.clips_uri, run.targets_uri, run.features_uri, run.teacher_uri]
    if run.settings.validate_every and run.config.evaluate.split is not None:
        inputs.append(artifacts.evaluation_clips.uri)
    with once(run.uri, run.label, files=run_files, inputs=inputs) as needed:
        if needed:
            if run.features_uri is not None:
                cache_features(artifacts, run.section)
            with _beginning:
                run = _prepare(run, artifacts)
            with machines(run, workers) as run:
                with _beginning:
                    run, tags = _begin(run, tags, run_tags)
                started = time.monotonic()
                try:
                    outcome = fit(run, on_validation, train_callbacks)
                    _check_finite(run, outcome)
                except BaseException as error:
                    assert run.mlflow_run is not None
                    tracking.RunLogger(run.config, run.mlflow_run).end_with(error)
                    raise
            tags = {**tags, "precision": outcome.precision, "workers": str(outcome.workers)}
            _publish(run, outcome, tags, seconds=time.monotonic() - started)
    manifest = RunManifest.read(run.uri)
    if not needed:
        log(f"{run.label}: this run is finished, reusing {run.uri}")
    # Of ours, whoever was faster in publishing.
    tracking.complete_run(run.config, run.uri, run.mlflow_run or manifest.mlflow_run, wait=needed)
    return {
        "uri": run.uri,
        "model": storage.join(run.uri, MODEL_FOLDER),
        "history": storage.join(run.uri, tracking.HISTORY_FILE),
        "mlflow_run": manifest.mlflow_run,
        "steps": manifest.steps,
        "losses": manifest.losses,
        "reused": not needed,
    }


def _prepare(run: Run, artifacts: Artifacts) -> Run:
    """The run with its validation clips, after a look at all that can be wrong with its config."""
    settings = run.settings
    if settings.warmup_steps >= settings.steps:
        log(
            f"{run.label}: WARNING, warm-up ({settings.warmup_steps} steps) outlasts training "
            f"({settings.steps} steps); set warmup_steps to a tenth of it or less"
        )
    check_system_metrics(run.config)
    build(run)  # what can't be built is said here and now, not by every worker several times over
    return replace(run, validation_uri=_validation_clips(run, artifacts))


def _begin(run: Run, tags: dict[str, str], run_tags: Mapping[str, str]) -> tuple[Run, dict[str, str]]:
    """The run and its tags, with its MLflow run, which has begun."""
    config, settings = run.config, run.settings
    storage.write_bytes(storage.join(run.uri, "config.yaml"), config.to_yaml().encode())
    tags = {
        **tags,
        "role": run.kind,
        "seed": str(settings.seed),
        "steps": str(settings.steps),
        "git_revision": git_revision(),
        "mlflow.runName": run.run_name,
    }
    name = run.title or run.run_name
    run_id = tracking.start_run(config, run.uri, name, {**tags, "mlflow.runName": name, **run_tags})
    with optional("the data sets of this run"):
        mlflow = tracking.connect(config)
        log_training_data(mlflow, mlflow.get_run(run_id), run.clips_uri, run.targets_uri, run.validation_uri)
    return replace(run, mlflow_run=run_id), tags


def _validation_clips(run: Run, artifacts: Artifacts) -> str | None:
    """The clip set to validate on, where the config asks for it.

    Raises:
        ConfigError: no split is named, its clips have not been made, or none of them can be scored.
    """
    if not run.settings.validate_every:
        return None
    split = run.config.evaluate.split
    if split is None:
        raise ConfigError("validate_every: needs evaluate.split, the videos with masks to score on")
    uri = artifacts.evaluation_clips.uri
    if not is_whole(uri, clip_files):
        raise ConfigError(
            f"validate_every: the clips of {split!r} are not there ({uri}); python -m jobs.shard CONFIG"
        )
    Validation(uri, run.config.evaluate)
    return uri


def _check_finite(run: Run, outcome: Outcome) -> None:
    if outcome.status == "non-finite":
        raise NonFiniteLoss(
            f"{run.label}: the gradient was not finite in step {outcome.step + 1}; the last good checkpoint "
            f"is kept in {run.uri}. Lower the learning rate ({run.settings.learning_rate:g}), or set precision=fp32"
        )


def _publish(run: Run, outcome: Outcome, tags: dict[str, str], *, seconds: float) -> None:
    if storage.is_complete(run.uri):
        return  # what is published is never changed, whoever was faster
    assert run.mlflow_run is not None
    RunManifest(
        kind=run.kind,
        fingerprint=storage.name(run.uri),
        created=storage.timestamp(),
        clips_uri=run.clips_uri,
        targets_uri=run.targets_uri,
        features_uri=run.features_uri,
        teacher_uri=run.teacher_uri,
        mlflow_run=run.mlflow_run,
        steps=run.settings.steps,
        seconds=round(seconds, 1),
        losses=outcome.history[-1] if outcome.history else {},
        tags=tags,
    ).publish(run.uri)
