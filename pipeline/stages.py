"""Each stage from a config alone: what the jobs call, and what the whole pipeline calls in turn."""

from __future__ import annotations

from typing import Any

from pipeline import storage
from pipeline.baselines import BASELINES
from pipeline.builders import MODEL_FOLDER, require_teacher
from pipeline.clips.shard import find_clips, shard
from pipeline.clips.table import ClipSet
from pipeline.config import Config, ConfigError
from pipeline.distill.train import distill, find_student, train_teacher
from pipeline.evaluate import evaluate, score_table
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


def evaluate_student(config: Config) -> dict[str, Any] | None:
    """Scores the student of this config; None where the config has no evaluation split."""
    if config.evaluate.split is None:
        return None
    run_uri = find_student(config, training_clips(config))
    storage.read_manifest(run_uri)
    clips = _published_clips(config, config.evaluate.split)
    return evaluate(config, clips, model_uri=storage.join(run_uri, MODEL_FOLDER))


def evaluate_teacher(config: Config) -> dict[str, Any]:
    clips = _published_clips(config, str(config.evaluate.split))
    uri = require_teacher(config, ClipSet(training_clips(config)).fingerprint)
    return evaluate(config, clips, model_uri=uri, num_heads=config.teacher.num_heads)


def evaluate_baselines(config: Config, num_slots: int) -> dict[str, dict[str, Any]]:
    """Trivial segmentations with as many slots as the models have."""
    clips = _published_clips(config, str(config.evaluate.split))
    return {name: evaluate(config, clips, baseline=name, num_slots=num_slots) for name in BASELINES}


def evaluate_stage(config: Config) -> dict[str, Any]:
    """Scores the student of this config, beside trivial baselines, and prints the table."""
    if config.evaluate.split is None:
        raise ConfigError("evaluate.split: is not set; name the sub-folder whose videos have masks")
    result = evaluate_student(config)
    assert result is not None
    rows = []
    if config.evaluate.baselines:
        slots = student_slots(config)
        rows = [(name, r["scores"]) for name, r in evaluate_baselines(config, slots).items()]
    print(score_table([*rows, (config.distill.name or "student", result["scores"])]))
    return {key: result[key] for key in ("uri", "scores", "videos", "protocol")}


def student_slots(config: Config) -> int:
    """The slot count of this config's finished student."""
    run_uri = find_student(config, training_clips(config))
    return int(storage.read_json(storage.join(run_uri, MODEL_FOLDER, "config.json"))["num_slots"])


def register_stage(config: Config) -> dict[str, Any]:
    """Registers the student of this config with its scores, if its videos have masks."""
    run_uri = find_student(config, training_clips(config))
    storage.read_manifest(run_uri)
    return register(config, run_uri, evaluate_student(config))
