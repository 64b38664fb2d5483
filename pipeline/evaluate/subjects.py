"""What is scored: models by where they come from, and trivial baselines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline import storage
from pipeline.artifacts.identity import Artifacts
from pipeline.artifacts.manifests import MODEL_FOLDER, RunManifest
from pipeline.artifacts.once import missing_files
from pipeline.artifacts.subjects import baseline_subject, feature_subject, model_files, model_subject
from pipeline.clips.library import require_clips
from pipeline.config import Config, ConfigError
from pipeline.config.models import system_with_boxes
from pipeline.evaluate.baselines import BASELINES
from pipeline.log import log
from pipeline.models import CheckpointHints, SlotModel
from pipeline.models.build import checkpoint_hints, exported_file, load_model, teacher_title
from pipeline.models.export import hash_weights
from pipeline.models.segmenter import SegmenterConfig
from pipeline.models.systems import of_config
from pipeline.tracking.versions import fetch_model


@dataclass(frozen=True)
class Subject:
    """What is scored: a model, or one of the trivial baselines with as many slots.

    A baseline that has a model too is k-means on that model's features, which `features` decides.
    """

    model_uri: str | None = None
    hints: CheckpointHints = field(default_factory=CheckpointHints)  # what a public file does not tell
    baseline: str | None = None
    num_slots: int = 1  # of the baseline
    tags: dict[str, str] = field(default_factory=dict)  # how it came about, for its record
    features: Mapping[str, Any] | None = None

    def identity(self) -> dict[str, Any]:
        if self.features is not None:
            return feature_subject(self.baseline or "", self.num_slots, self.features)
        if self.model_uri is None:
            return baseline_subject(self.baseline or "", self.num_slots)
        return model_subject(self.model_uri, self.hints)

    def record(self) -> dict[str, str]:
        """Its tags in MLflow."""
        if self.baseline is not None:
            of = [] if self.num_slots == 1 else [f"N = {self.num_slots}"]
            if self.features:
                backbone = self.features["backbone"]
                of.append(f"{backbone['image_size']} px")
                of += [f"blocks 1 to {blocks}"] if (blocks := backbone.get("blocks")) else []
            name = f"{self.baseline} ({', '.join(of)})" if of else self.baseline
            return {"method": "baseline", "name": name}
        loading = {"model_uri": str(self.model_uri), "hints": json.dumps(self.hints.to_dict())}
        return {"method": "other", **self.tags, **loading}


def finished_student(artifacts: Artifacts) -> str:
    """The run folder of a config's student.

    Raises:
        ConfigError: its clips have not been made, it needs a teacher that is not there, or its model is gone.
        storage.IncompleteError: it is not finished.
    """
    require_clips(artifacts.clips)
    uri = artifacts.student.uri
    if not storage.is_complete(uri):
        raise storage.IncompleteError(
            f"the student of this config is not finished ({uri}): train it (python -m jobs.distill CONFIG), or give "
            "all settings that it was trained with (distill.name is one of them)"
        )
    if missing := missing_files(uri, model_files):
        raise ConfigError(f"{uri} has lost {missing[0]}; make it again: python -m jobs.distill CONFIG")
    return uri


# Of a run's tags, with its scores.
RECORDED = ("method", "beta", "seed", "steps", "settings", "teacher", "system", "trained_on", "precision")


def _recorded(tags: dict[str, str]) -> dict[str, str]:
    return {key: tags[key] for key in RECORDED if key in tags}


def run_subject(run_uri: str) -> Subject:
    """The model of a finished run, a student's or a teacher's."""
    tags = RunManifest.read(run_uri).tags
    return Subject(model_uri=storage.join(run_uri, MODEL_FOLDER), tags=_recorded(tags))


def teacher_subject(config: Config, teacher_uri: str, model: SegmenterConfig | None = None) -> Subject:
    """The config's teacher; what a file was trained on is not known.

    Args:
        model: its own config, as far as it is known.
    """
    system = config.teacher.recorded_system if model is None else _system_of(model)
    tags = {"method": "teacher", "teacher": teacher_title(config, model), **_system_tag(system)}
    if config.teacher.checkpoint is None:
        tags["trained_on"] = config.dataset.title
        run_uri = teacher_uri.removesuffix(f"/{MODEL_FOLDER}")
        if storage.is_complete(run_uri):
            tags = {**run_subject(run_uri).tags, **tags}
    return Subject(model_uri=teacher_uri, hints=checkpoint_hints(config), tags=tags)


def _system_tag(system: str | None) -> dict[str, str]:
    """What tells a record that its model is no slot model."""
    return {"system": system} if system not in (None, "slotcontrast") else {}


def of_its_system(subject: Subject, config: SegmenterConfig) -> Subject:
    """A model that has been opened, with a tag that says which system it is of, if it is no slot model."""
    return replace(subject, tags={**subject.tags, **_system_tag(_system_of(config))})


def _system_of(model: SegmenterConfig) -> str | None:
    """What records call it; None: a slot model."""
    name = model.to_dict().get("system")
    return system_with_boxes(name) if name and of_config(model).uses_boxes(model) else name


def baseline_subjects(num_slots: int) -> dict[str, Subject]:
    """Trivial segmentations with as many slots as a model has."""
    return {
        name: Subject(baseline=name, num_slots=1 if name == "one slot" else num_slots) for name in BASELINES
    }


def trivial_subjects(config: Config, num_slots: int, models: Mapping[str, Subject]) -> dict[str, Subject]:
    """The trivial segmentations that a config asks for, to stand beside models with so many slots."""
    chosen = baseline_subjects(num_slots) if config.evaluate.baselines else {}
    return chosen | (feature_subjects(models) if config.evaluate.feature_kmeans else {})


def feature_subjects(models: Mapping[str, Subject]) -> dict[str, Subject]:
    """k-means on the features of each model, with as many clusters as it has slots.

    Of models that share features one of a kind: the seeds of a student make one row.
    """
    found: dict[str, Subject] = {}
    for name, subject in models.items():
        assert subject.model_uri is not None
        if exported_file(subject.model_uri) is not None:
            log(f"evaluate: no k-means on the features of {name}, as an exported file does not give them")
            continue
        model = load_model(subject.model_uri, subject.hints)
        if not isinstance(model, SlotModel):
            log(f"evaluate: no k-means on the features of {name}, a {type(model).__name__}")
            continue
        method = subject.tags.get("method", "other")
        whose = {"teacher": "teacher", "other": "model"}.get(method, "student")
        title = baseline = f"k-means on the {whose}'s features"
        new = Subject(
            subject.model_uri,
            subject.hints,
            baseline,
            model.config.num_slots,
            features=_features_of(model),
        )
        if any(other.identity() == new.identity() for other in found.values()):
            continue
        if title in found:
            title = f"{baseline} ({name})"
        found[title] = new
    return found


def _features_of(model: SlotModel) -> dict[str, Any]:
    """What decides a model's features: its backbone, whatever it was trained for, and what that sees."""
    config = model.config.to_dict()
    design = {key: config[key] for key in ("backbone", "mean", "std")}
    return {**design, "weights": hash_weights(model.encoder.backbone)}


def own_models(artifacts: Artifacts) -> dict[str, Subject]:
    """The student of a config and, where there is one, its teacher."""
    config = artifacts.config
    models = {config.distill.name or "student": run_subject(finished_student(artifacts))}
    if config.evaluate.teacher and storage.exists(artifacts.teacher.uri):
        models["teacher"] = teacher_subject(config, artifacts.teacher.uri, artifacts.teacher_config)
    return models


def named_model(config: Config) -> dict[str, Subject]:
    """`evaluate.model`: a version of the registry, a run's model folder, an exported file, or a public one.

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
        raise ConfigError(f"evaluate.model: there is no file or folder {model!r}{storage.nearest(model)}")
    if (file := exported_file(model)) is not None:
        return {storage.name(file): Subject(model_uri=storage.pinned(file))}
    folder = model.rstrip("/")
    places = () if storage.on_hub(model) else (folder, folder.removesuffix(f"/{MODEL_FOLDER}"))
    for place in places:  # pulled, or a run's own
        if storage.is_complete(place):
            tags = _recorded(storage.read_manifest(place).get("tags", {}))
            own = storage.join(place, MODEL_FOLDER)
            uri = own if storage.exists(own) else place
            return {storage.name(place): Subject(model_uri=uri, tags=tags)}
    return {storage.name(model): Subject(model_uri=storage.pinned(model), hints=checkpoint_hints(config))}
