"""Each stage from a config alone: what the jobs call, and what the whole pipeline calls in turn."""

from __future__ import annotations

from typing import Any

from pipeline import storage
from pipeline.baselines import BASELINES
from pipeline.builders import MODEL_FOLDER
from pipeline.clips.shard import find_clips, shard
from pipeline.config import Config, ConfigError
from pipeline.distill.train import distill, find_student, train_teacher
from pipeline.evaluate import Subject, evaluate, score_table
from pipeline.models.checkpoints import CONFIG_FILE
from pipeline.registry import register
from pipeline.targets import cache


def training_clips(config: Config) -> str:
    """The published clip set to train on.

    Raises:
        ConfigError: it has not been made.
    """
    return _published_clips(config, config.dataset.split)


def _published_clips(config: Config, split: str) -> str:
    uri = find_clips(config, split)
    if not storage.is_complete(uri):
        raise ConfigError(
            f"the clips of these videos and settings are not there ({uri}); make them: python -m jobs.shard CONFIG"
        )
    return uri


def shard_stage(config: Config) -> dict[str, Any]:
    """Shards the training split, and the evaluation split where there is one."""
    summary = shard(config, config.dataset.split)
    if config.evaluate.split is not None:
        summary["evaluation"] = shard(config, config.evaluate.split)
    return summary


def teacher_stage(config: Config) -> dict[str, Any]:
    if config.teacher.checkpoint:
        raise ConfigError(
            f"teacher.checkpoint: is set ({config.teacher.checkpoint!r}), so there is none to train"
        )
    return train_teacher(config, training_clips(config))


def cache_stage(config: Config) -> dict[str, Any]:
    return cache(config, training_clips(config))


def distill_stage(config: Config) -> dict[str, Any]:
    return distill(config, training_clips(config))


def finished_student(config: Config) -> str:
    """The run folder of this config's student; raises storage.IncompleteError where it is not finished."""
    run_uri = find_student(config, training_clips(config))
    storage.read_manifest(run_uri)
    return run_uri


def student_subject(run_uri: str) -> Subject:
    return Subject(model_uri=storage.join(run_uri, MODEL_FOLDER))


def baseline_subjects(run_uri: str) -> dict[str, Subject]:
    """Trivial segmentations with as many slots as a student has."""
    slots = int(storage.read_json(storage.join(run_uri, MODEL_FOLDER, CONFIG_FILE))["num_slots"])
    return {name: Subject(baseline=name, num_slots=slots) for name in BASELINES}


def evaluate_subjects(config: Config, subjects: dict[str, Subject]) -> dict[str, dict[str, Any]]:
    """Scores on the evaluation split.

    Raises:
        ConfigError: the config names none.
    """
    if config.evaluate.split is None:
        raise ConfigError("evaluate.split: is not set; name the sub-folder whose videos have masks")
    return evaluate(config, _published_clips(config, config.evaluate.split), subjects)


def evaluate_stage(config: Config) -> dict[str, Any]:
    """Scores the student of this config, beside trivial baselines, and prints the table."""
    name = config.distill.name or "student"
    run_uri = finished_student(config)
    baselines = baseline_subjects(run_uri) if config.evaluate.baselines else {}
    results = evaluate_subjects(config, {**baselines, name: student_subject(run_uri)})
    print(score_table([(n, r["scores"]) for n, r in results.items()]))
    return {key: results[name][key] for key in ("uri", "scores", "videos", "protocol")}


def register_stage(config: Config) -> dict[str, Any]:
    """Registers the student of this config with its scores, if its videos have masks."""
    run_uri = finished_student(config)
    evaluation = None
    if config.evaluate.split is not None:
        evaluation = evaluate_subjects(config, {"student": student_subject(run_uri)})["student"]
    return register(config, run_uri, evaluation)
