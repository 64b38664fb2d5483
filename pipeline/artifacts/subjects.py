"""How models, their backbones and trivial baselines are known: by their files' bytes and by what these don't tell."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from pipeline import storage
from pipeline.artifacts.counted import counted, counted_fields, later
from pipeline.artifacts.manifests import MODEL_FOLDER
from pipeline.config import ConfigError, Model, ViT
from pipeline.models import CheckpointHints
from pipeline.models.checkpoints import CONFIG_FILE, MODEL_FILES
from pipeline.models.slim import without_places


def model_identity(uri: str, hints: CheckpointHints) -> dict[str, Any]:
    """What decides what a loaded model computes: its files, and what they don't tell.

    Raises:
        ConfigError: nothing there.
    """
    folder = storage.is_folder(uri)
    files = [storage.join(uri, name) for name in MODEL_FILES] if folder else [uri]
    # Folders have a config, and hints are ignored there.
    return {
        "files": [_hash(file, f"teacher.checkpoint: there is no model at {uri!r}") for file in files],
        "hints": None if folder else _counted_hints(hints),
    }


def _counted_hints(hints: CheckpointHints) -> dict[str, Any]:
    counted_hints = counted_fields(hints)
    if (weights := hints.backbone_weights) is not None:
        counted_hints["backbone_weights"] = _hash(weights, f"backbone_weights: there is no file {weights!r}")
    return counted_hints


def model_files(uri: str) -> list[str]:
    """The files of its model that a finished run can't do without, by their paths in its folder."""
    return [f"{MODEL_FOLDER}/{name}" for name in MODEL_FILES]


def model_subject(uri: str, hints: CheckpointHints) -> dict[str, Any]:
    """How an evaluation knows a model."""
    return {"model": model_identity(uri, hints), "baseline": None, "slots": 1}


def baseline_subject(name: str, num_slots: int) -> dict[str, Any]:
    """How an evaluation knows a trivial baseline."""
    return {"model": None, "baseline": name, "slots": num_slots}


def feature_subject(name: str, num_slots: int, features: Mapping[str, Any]) -> dict[str, Any]:
    """How an evaluation knows a trivial baseline on a backbone's features, which `features` decides."""
    return {**baseline_subject(name, num_slots), "features": dict(features)}


def backbone_identity(section: Model) -> dict[str, Any]:
    """What decides the features of a backbone, which are cached before they are scaled."""
    own = set(type(section).model_fields) - set(Model.model_fields)  # a teacher's, of all else that it is
    weights = section.backbone_weights
    if weights not in ("timm", "random"):
        weights = _hash(weights, f"backbone_weights: there is no file {weights!r}")
    return {
        "name": None if isinstance(section.backbone, ViT) else section.backbone,
        "arguments": counted(section.backbone) if isinstance(section.backbone, ViT) else None,
        "image_size": section.image_size,
        "weights": weights,
        "mean": section.mean,
        "std": section.std,
        **later(section, but={"feature_scale", "cached_features", *own}),
    }


def features_identity(section: Model) -> dict[str, Any]:
    """`backbone_identity` without a word of whose the backbone is."""
    return {key.rpartition(".")[2]: value for key, value in backbone_identity(section).items()}


def _hash(uri: str, otherwise: str) -> str:
    """A file's hash; raises ConfigError with the text `otherwise` where there is none."""
    try:
        return _hash_once(uri, storage.version(uri))
    except storage.MissingBucketError:
        raise
    except FileNotFoundError:
        raise ConfigError(otherwise + storage.nearest(uri)) from None


@functools.cache
def _hash_once(uri: str, version: str) -> str:
    """Weights are hundreds of megabytes, and every trial of a sweep asks for their hash."""
    if storage.name(uri) == CONFIG_FILE and (content := without_places(storage.read_bytes(uri))):
        return storage.fingerprint(content.decode())
    return storage.hash_file(uri)
