"""Versions of registered models: finding and fetching them."""

from __future__ import annotations

import contextlib
import functools
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.artifacts.once import is_whole
from pipeline.models import CheckpointHints, load_slot_model
from pipeline.models.build import exported_file
from pipeline.models.checkpoints import CONFIG_FILE, MODEL_FILES, WEIGHTS_FILE
from pipeline.models.exported import ONNX_FILE, load_exported
from pipeline.models.segmenter import Segmenter
from pipeline.tracking.client import client_of, patiently, slow_transfers
from pipeline.tracking.moved import check_source


def find_version(model_uri: str, tracking_uri: str) -> Any:
    """The version that a `models:/NAME@ALIAS` or `models:/NAME/N` URI names.

    Raises:
        ValueError: not such a URI, or no such model, version or alias; or its files were moved, see `check_source`.
    """
    from mlflow.exceptions import MlflowException

    name, alias, number = _parse(model_uri)
    database = Path(tracking_uri.removeprefix("sqlite:///"))
    if tracking_uri.startswith("sqlite:///") and not database.exists():
        raise ValueError(
            f"there is no registry at {tracking_uri}: give storage.root=… or mlflow.tracking_uri=… of your jobs"
        )
    client = client_of(tracking_uri)
    try:
        by_alias, by_number = client.get_model_version_by_alias, client.get_model_version
        found = by_alias(name, alias) if alias else by_number(name, number)
    except MlflowException as error:
        raise ValueError(f"{model_uri} is not in the registry at {tracking_uri}: {error.message}") from error
    check_source(found.source, tracking_uri)
    return found


@contextlib.contextmanager
def downloaded(model_uri: str, tracking_uri: str) -> Iterator[Path]:
    """A local folder that `load_slot_model` opens, of a registered model.

    Raises:
        ValueError: as `find_version`, or a model of another kind.
    """
    from mlflow.artifacts import download_artifacts

    found = find_version(model_uri, tracking_uri)
    source = client_of(tracking_uri).get_model_version_download_uri(found.name, found.version)
    with tempfile.TemporaryDirectory() as scratch:
        fetch = functools.partial(
            download_artifacts, artifact_uri=source, dst_path=scratch, tracking_uri=tracking_uri
        )
        with slow_transfers():
            folder = Path(patiently(tracking_uri, fetch))
        weights = sorted((folder / "artifacts").rglob(WEIGHTS_FILE))
        if not weights:
            raise ValueError(f"{model_uri} holds no {WEIGHTS_FILE}: it was not registered by this pipeline")
        yield weights[0].parent


def load_named(model: str, hints: CheckpointHints, tracking_uri: str) -> Segmenter:
    """A registered model, a model folder, a public file or an exported one, as a user names it; on the CPU.

    Raises:
        FileNotFoundError, HintError, ValueError: as `downloaded`, `load_slot_model` and `load_exported`.
    """
    with contextlib.ExitStack() as stack:
        if model.startswith("models:/"):
            return load_slot_model(stack.enter_context(downloaded(model, tracking_uri)))
        file = exported_file(model)
        path = stack.enter_context(storage.local_copy(file or model, MODEL_FILES))
        return load_exported(path) if file else load_slot_model(path, **hints.to_dict())


def _parse(model_uri: str) -> tuple[str, str | None, str | None]:
    """Name and either alias or number of a `models:/` URI."""
    match = re.fullmatch(r"models:/([^@/]+)(?:@([^@/]+)|/(\d+))", model_uri)
    if match is None:
        raise ValueError(f"model {model_uri!r} is not of the form models:/NAME@ALIAS or models:/NAME/VERSION")
    return match[1], match[2], match[3]


def fetch_model(model_uri: str, folder: str, tracking_uri: str) -> tuple[str, dict[str, str]]:
    """A registered model as a folder below `folder` that every worker can read, and its version's tags.

    A version that is there already is not fetched again; errors as in `downloaded`.
    """
    found = find_version(model_uri, tracking_uri)
    uri = storage.join(folder, f"{found.name}-{found.version}-{storage.fingerprint(found.source)}")
    if not is_whole(uri, lambda uri: MODEL_FILES):
        fetch_version(found, uri, tracking_uri)
    return uri, dict(found.tags)


def fetch_version(version: Any, folder: str, tracking_uri: str, *, replace: bool = False) -> None:
    """Writes a version's safetensors, config and exported form, and where they come from, into a folder."""
    with downloaded(f"models:/{version.name}/{version.version}", tracking_uri) as source:
        if replace:  # an earlier version's folder is unfinished until all of it is the new one's
            storage.delete(storage.join(folder, storage.MANIFEST))
        for file in (WEIGHTS_FILE, CONFIG_FILE, ONNX_FILE):
            place = storage.join(folder, file)
            if (source / file).exists():
                storage.upload_file(source / file, place)
            elif (
                replace
            ):  # versions of earlier releases have no exported form, and the one before may have had
                storage.delete(place)
    origin = {"name": version.name, "version": version.version, "tags": dict(version.tags)}
    storage.publish(folder, {"kind": "pulled", **origin})
