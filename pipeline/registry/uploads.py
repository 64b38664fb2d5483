"""Models that were sent to MLflow and belong to no registered version: found, and deleted through MLflow."""

from __future__ import annotations

import posixpath
import time
from calendar import timegm
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline import tracking
from pipeline.config import Config
from pipeline.registry.lock import registry_lock
from pipeline.registry.needed import Known
from pipeline.registry.stage import MODEL_ARTIFACT, UPLOAD_TAG
from pipeline.registry.stock import Spared
from pipeline.tracking.client import optional, patiently
from pipeline.tracking.logged import EXTERNAL_TAG, VERSIONS_TAG, find_model


@dataclass(frozen=True)
class Upload:
    """A run's packed model in MLflow: among the run's files, or those of its logged model."""

    run_id: str
    model_id: str | None  # of the logged model
    uri: str
    tracking_uri: str
    size: int  # bytes
    changed: float  # seconds since 1970


def find_uploads(config: Config, known: Known, root: str) -> Iterator[Upload]:
    """Those of students below `root` that no version has: it was deleted, was never made, or is to go."""
    registered = {version.run_id for version in known.versions}
    sources = {version.source for version in known.versions}  # somebody's own version may name no run
    for run in known.runs:
        tags = run.data.tags
        own = tags.get(tracking.RUN_TAG, "").startswith(f"{root.rstrip('/')}/")
        if not own or tags.get("role") != "student" or run.info.run_id in registered:
            continue
        for uri, model_id in _places(config, run):
            if sources & {uri, f"{uri}/", f"models:/{model_id}"}:
                continue
            files = patiently(config.tracking_uri, partial(_sizes, uri, config))
            if files:
                yield Upload(run.info.run_id, model_id, uri, config.tracking_uri, sum(files), _changed(run))


def _places(config: Config, run: Any) -> Iterator[tuple[str, str | None]]:
    """Where a run's model may be, with the id of the logged model whose place it is."""
    yield f"{run.info.artifact_uri}/{MODEL_ARTIFACT}", None
    with optional("a logged model"):
        model = find_model(tracking.connect(config), run)
        if model is not None:
            yield str(model.artifact_location), model.model_id


def _sizes(uri: str, config: Config) -> list[int]:
    """Of the files in a folder of MLflow's."""
    repository = _repository(posixpath.dirname(uri), config.tracking_uri)
    found, folders = [], [posixpath.basename(uri)]
    while folders:
        for entry in repository.list_artifacts(folders.pop()):
            if entry.is_dir:
                folders.append(entry.path)
            else:
                found.append(entry.file_size or 0)
    return found


def _repository(artifact_uri: str, tracking_uri: str) -> Any:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(artifact_uri, tracking_uri=tracking_uri)


def _changed(run: Any) -> float:
    """When the upload began; of one by an earlier version, which did not say it, the end of the training."""
    times = [(run.info.end_time or run.info.start_time or 0) / 1000]
    if UPLOAD_TAG in run.data.tags:
        times.append(timegm(time.strptime(run.data.tags[UPLOAD_TAG], "%Y-%m-%dT%H:%M:%SZ")))
    return max(times)


def delete_upload(client: Any, upload: Upload) -> None:
    """Raises Spared where a version has the run by now, or is about to have it."""
    run = client.get_run(upload.run_id)
    if client.search_model_versions(f"run_id = '{upload.run_id}'") or _changed(run) > upload.changed:
        raise Spared("it is being registered")
    repository = _repository(posixpath.dirname(upload.uri), upload.tracking_uri)
    repository.delete_artifacts(posixpath.basename(upload.uri))
    if upload.model_id is not None:  # its record stays, as of the model in the run's folder
        client.set_logged_model_tags(upload.model_id, {EXTERNAL_TAG: "true", VERSIONS_TAG: "[]"})


def delete_version(client: Any, version: Any) -> None:
    """Raises Spared where an alias names the version by now. Its files go with those that no version has."""
    with registry_lock(client, version.name) as held:
        aliases = held.get_registered_model(version.name).aliases
        if str(version.version) in {str(number) for number in aliases.values()}:
            raise Spared("an alias names it now")
        held.delete_model_version(version.name, str(version.version))
