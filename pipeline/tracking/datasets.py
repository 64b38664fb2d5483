"""What a run was made from, as MLflow's inputs: clip sets and targets, known by their fingerprints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline import storage
from pipeline.artifacts.manifests import ClipManifest, Manifest, TargetManifest

TRAINING, VALIDATION, EVALUATION = "training", "validation", "evaluation"  # contexts, as MLflow calls them
_MAX_DIGEST, _MAX_NAME = 36, 500  # characters that MLflow takes


def clips_dataset(uri: str) -> Any:
    """A published clip set as an `mlflow.entities.Dataset`: named as the data set, with its counts as the profile.

    Raises:
        storage.IncompleteError, ValueError: as `Manifest.read`.
    """
    manifest = ClipManifest.read(uri)
    counts = {"videos", "clips", "frames", "annotated_videos", "split"}
    profile = {**manifest.model_dump(include=counts), "set_aside": len(manifest.bad)}
    shape = (-1, manifest.clip_frames, -1, -1, 3)
    return _dataset(uri, manifest, _name(uri, manifest), profile, {"frames": ("uint8", shape)})


def targets_dataset(uri: str, clips_uri: str) -> Any:
    """Published targets of a clip set, likewise; errors as in `clips_dataset`."""
    manifest = TargetManifest.read(uri)
    keys = {"rows", "clips", "rollout", "views", "student_features", "teacher_features"}
    sizes = [manifest.teacher_config.get(key, -1) for key in ("num_slots", "slot_size")]
    name = f"{_name(clips_uri, ClipManifest.read(clips_uri))} targets"
    profile = {**manifest.model_dump(include=keys, exclude_none=True), "teacher": manifest.teacher}
    return _dataset(uri, manifest, name, profile, {"slots": ("float32", (-1, -1, *sizes))})


def log_training_data(
    mlflow: Any, run: Any, clips_uri: str, targets_uri: str | None, validation_uri: str | None = None
) -> None:
    """Records what a training learns from, and what it validates on; what the run has already is left alone.

    Args:
        run: as MLflow has it (`get_run`).

    Raises:
        storage.IncompleteError, ValueError: a folder is not there.
        As MLflow's client.
    """
    inputs = [(clips_dataset(clips_uri), TRAINING)]
    if targets_uri is not None:
        inputs.append((targets_dataset(targets_uri, clips_uri), TRAINING))
    if validation_uri is not None:
        inputs.append((clips_dataset(validation_uri), VALIDATION))
    log_inputs(mlflow, run, inputs)


def log_inputs(mlflow: Any, run: Any, inputs: list[tuple[Any, str]]) -> None:
    """Records data sets with their contexts as inputs of a run, but those that it has."""
    from mlflow.entities import DatasetInput, InputTag

    known = {(one["name"], one["digest"]) for one in inputs_of(run)}
    new = [
        DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
        for dataset, context in inputs
        if (dataset.name, dataset.digest) not in known
    ]
    if new:
        mlflow.log_inputs(run.info.run_id, new)


def inputs_of(run: Any) -> list[dict[str, str]]:
    """The data sets of a run as MLflow has them: `name`, `digest`, `context` and, where it says so, `uri`."""
    found = []
    for one in run.inputs.dataset_inputs if run.inputs else ():
        tags = {tag.key: tag.value for tag in one.tags}
        described = {"name": one.dataset.name, "digest": one.dataset.digest}
        described["context"] = tags.get("mlflow.data.context", "")
        found.append(described | _source(one.dataset.source))
    return found


def _source(text: str) -> dict[str, str]:
    try:
        source = json.loads(text)
    except ValueError:  # of another program
        return {}
    uri = source.get("uri") if isinstance(source, dict) else None
    return {"uri": uri} if isinstance(uri, str) else {}


def _name(uri: str, manifest: ClipManifest) -> str:
    return (manifest.dataset.name if manifest.dataset else "") or storage.name(uri)


def _dataset(
    uri: str,
    manifest: Manifest,
    name: str,
    profile: Mapping[str, Any],
    features: Mapping[str, tuple[str, tuple[int, ...]]],
) -> Any:
    import numpy as np
    from mlflow.entities import Dataset
    from mlflow.types import Schema, TensorSpec

    digest = manifest.fingerprint or storage.name(uri)
    specs = Schema([TensorSpec(np.dtype(dtype), shape, name) for name, (dtype, shape) in features.items()])
    return Dataset(
        name=name[:_MAX_NAME],
        digest=digest if len(digest) <= _MAX_DIGEST else storage.fingerprint(digest),
        # As MLflow's own sources of files, which `mlflow.data.get_source` opens.
        source_type=uri.partition("://")[0] if storage.is_remote(uri) else "local",
        source=json.dumps({"uri": uri}),
        schema=json.dumps({"mlflow_tensorspec": {"features": specs.to_json(), "targets": None}}),
        profile=json.dumps(profile),
    )
