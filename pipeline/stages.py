"""Each stage from a config alone: what the jobs call, and what the whole pipeline calls in turn."""

from __future__ import annotations

from typing import Any

from pipeline import storage
from pipeline.baselines import BASELINES
from pipeline.builders import MODEL_FOLDER, checkpoint_hints, load_model, teacher_location
from pipeline.clips.shard import find_clips, find_videos, shard
from pipeline.clips.table import ClipSet
from pipeline.config import Config, ConfigError, parse_split
from pipeline.distill.train import distill, find_student, train_teacher
from pipeline.evaluate import Subject, evaluate, score_table
from pipeline.registry import fetch_model, register
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
    check_disjoint(config)
    summary = shard(config, config.dataset.split)
    if config.evaluate.split not in (None, config.dataset.split):
        assert config.evaluate.split is not None
        summary["evaluation"] = shard(config, config.evaluate.split)
    return summary


def check_disjoint(config: Config) -> None:
    """Raises ConfigError where slices of one split overlap: a video would be trained on and scored."""
    training, evaluation = config.dataset.split, config.evaluate.split
    if evaluation in (None, training):
        return  # the same one twice is refused, unless nothing is trained on it
    assert evaluation is not None
    if parse_split(training)[0] != parse_split(evaluation)[0]:
        return  # video ids are unique in a split only
    ids = [{v.video_id for v in find_videos(config, split)} for split in (training, evaluation)]
    if both := sorted(ids[0] & ids[1]):
        raise ConfigError(
            f"evaluate.split: {evaluation!r} and dataset.split {training!r} share {len(both)} videos "
            f"({both[0]}, …): they would be trained on and scored"
        )


def teacher_stage(config: Config) -> dict[str, Any]:
    check_disjoint(config)
    if config.teacher.checkpoint:
        raise ConfigError(
            f"teacher.checkpoint: is set ({config.teacher.checkpoint!r}), so there is none to train"
        )
    return train_teacher(config, training_clips(config))


def cache_stage(config: Config) -> dict[str, Any]:
    return cache(config, training_clips(config))


def distill_stage(config: Config) -> dict[str, Any]:
    check_disjoint(config)
    return distill(config, training_clips(config))


def finished_student(config: Config) -> str:
    """The run folder of this config's student; raises storage.IncompleteError where it is not finished."""
    run_uri = find_student(config, training_clips(config))
    storage.read_manifest(run_uri)
    return run_uri


# Of a run's tags, with its scores.
RECORDED = ("method", "beta", "seed", "steps", "settings", "teacher", "trained_on")


def _recorded(tags: dict[str, str]) -> dict[str, str]:
    return {key: tags[key] for key in RECORDED if key in tags}


def student_subject(run_uri: str) -> Subject:
    tags = storage.read_manifest(run_uri)["tags"]
    return Subject(model_uri=storage.join(run_uri, MODEL_FOLDER), tags=_recorded(tags))


def teacher_subject(config: Config, teacher_uri: str) -> Subject:
    """The config's teacher; what a file was trained on is not known."""
    tags = {"method": "teacher", "teacher": config.teacher.name}
    if config.teacher.checkpoint is None:
        tags["trained_on"] = config.dataset.title
    return Subject(model_uri=teacher_uri, hints=checkpoint_hints(config), tags=tags)


def baseline_subjects(num_slots: int) -> dict[str, Subject]:
    """Trivial segmentations with as many slots as a model has."""
    return {
        name: Subject(baseline=name, num_slots=1 if name == "one slot" else num_slots) for name in BASELINES
    }


def evaluate_subjects(config: Config, subjects: dict[str, Subject]) -> dict[str, dict[str, Any]]:
    """Scores on the evaluation split.

    Raises:
        ConfigError: the config names none.
    """
    if config.evaluate.split is None:
        raise ConfigError("evaluate.split: is not set; name the split whose videos have masks")
    return evaluate(config, _published_clips(config, config.evaluate.split), subjects)


def evaluate_stage(config: Config) -> dict[str, Any]:
    """Scores `evaluate.model` or the student of this config, beside its teacher and trivial baselines.

    Prints the table; the summary is the student's.
    """
    models = _named_model(config) if config.evaluate.model else _own_models(config)
    name, subject = next(iter(models.items()))
    assert subject.model_uri is not None
    # Also without baselines: a file of which the config says too little is refused before Ray starts.
    slots = load_model(subject.model_uri, subject.hints).config.num_slots
    baselines = baseline_subjects(slots) if config.evaluate.baselines else {}
    results = evaluate_subjects(config, {**baselines, **models})
    print(score_table([(n, r["scores"]) for n, r in results.items()]))
    print(f"protocol {results[name]['protocol']['name']}: {results[name]['protocol']['in_words']}")
    return results[name]


def _own_models(config: Config) -> dict[str, Subject]:
    """The student of this config and, where there is one, its teacher."""
    clips_uri = training_clips(config)
    models = {config.distill.name or "student": student_subject(finished_student(config))}
    teacher = teacher_location(config, ClipSet(clips_uri).fingerprint)
    if config.evaluate.teacher and storage.exists(teacher):
        models["teacher"] = teacher_subject(config, teacher)
    return models


def _named_model(config: Config) -> dict[str, Subject]:
    """`evaluate.model`: a version of the registry, a run's model folder, or a public file.

    Raises:
        ConfigError: nothing there.
    """
    model = config.evaluate.model
    assert model is not None
    if model.startswith("models:/"):
        root = storage.absolute(config.storage.root)
        uri, tags = fetch_model(model, storage.join(root, "pulled"), config.tracking_uri)
        return {model.removeprefix("models:/"): Subject(model_uri=uri, tags=_recorded(tags))}
    if not storage.exists(model):
        raise ConfigError(f"evaluate.model: there is no file or folder {model!r}")
    folder = model.rstrip("/")
    for place in (folder, folder.removesuffix(f"/{MODEL_FOLDER}")):  # pulled, or a run's own
        if storage.is_complete(place):
            tags = _recorded(storage.read_manifest(place).get("tags", {}))
            own = storage.join(place, MODEL_FOLDER)
            uri = own if storage.exists(own) else place
            return {storage.name(place): Subject(model_uri=uri, tags=tags)}
    return {storage.name(model): Subject(model_uri=model, hints=checkpoint_hints(config))}


def register_stage(config: Config) -> dict[str, Any]:
    """Registers the student of this config with its scores, if its videos have masks."""
    run_uri = finished_student(config)
    evaluation = None
    if config.evaluate.split is not None:
        name = config.distill.name or "student"
        evaluation = evaluate_subjects(config, {name: student_subject(run_uri)})[name]
    return register(config, run_uri, evaluation)
