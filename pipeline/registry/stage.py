"""Stages `register` and `pull`: versions of one registered model, and the champion among them.

A version holds safetensors, a JSON config, their exported form and the code that runs it (`pack`). The alias
`champion` moves only to a version whose score on the *same* evaluation is better.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from pipeline import storage, tracking
from pipeline.artifacts.manifests import MODEL_FOLDER, RunManifest
from pipeline.clips.library import artifacts_of, open_clips
from pipeline.config import Config
from pipeline.evaluate.records import Evaluation
from pipeline.evaluate.stage import score_subjects
from pipeline.evaluate.subjects import finished_student, run_subject
from pipeline.log import log
from pipeline.models.checkpoints import WEIGHTS_FILE
from pipeline.models.exported import ONNX_FILE
from pipeline.models.files import check_finite, read_state_dict
from pipeline.models.hub import CARD_FILE
from pipeline.registry.card import EXPORTED_TAG, describe_model, hub_card
from pipeline.registry.example import input_example
from pipeline.registry.lock import registry_lock
from pipeline.registry.pack import model_arguments
from pipeline.registry.recorded import Recorded, describe, record
from pipeline.storage import hub
from pipeline.tracking.client import ServerUnavailable, error_code, optional, slow_transfers
from pipeline.tracking.logged import store_files
from pipeline.tracking.versions import fetch_version, find_version

CHAMPION = "champion"
MODEL_ARTIFACT = "model"  # in the files of a run in MLflow
UPLOAD_TAG = "slotmatch.uploaded"  # when a run's model was sent there


def register(config: Config) -> dict[str, Any]:
    """Registers the student of a config with its scores, if its videos have masks; see `register_run`."""
    artifacts = artifacts_of(config)
    run_uri = finished_student(artifacts)
    evaluation = None
    if config.evaluate.split is not None:
        name = config.distill.name or "student"
        clips = open_clips(artifacts.evaluation_clips)
        evaluation = score_subjects(artifacts, clips, {name: run_subject(run_uri)})[name]
    return register_run(config, run_uri, evaluation)


def register_run(
    config: Config,
    run_uri: str,
    evaluation: Evaluation | None,
    *,
    contend: bool = True,
    more_tags: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Makes a finished student a version of the registered model; done once a run, however often called.

    Args:
        run_uri: the student's run folder.
        evaluation: its scores; None where there are no masks to score against.
        contend: whether it may become the champion; without, the alias stays where it is.
        more_tags: further tags of the version.

    Returns `model`, `version`, `champion` (whether the alias points to it now), and the reason.

    Raises:
        storage.IncompleteError: the run has not finished.
        ValueError: weights that are not finite.
        ServerUnavailable, AccessDenied: MLflow; the student is kept.
    """
    manifest = RunManifest.read(run_uri)
    try:
        return _register(config, run_uri, manifest, evaluation, contend, more_tags)
    except ServerUnavailable as error:
        raise ServerUnavailable(
            error.problem,
            f"the student is kept in {run_uri}: give the same command again once it is there, or register this "
            "student alone with python -m jobs.register CONFIG",
        ) from None


def _register(
    config: Config,
    run_uri: str,
    manifest: RunManifest,
    evaluation: Evaluation | None,
    contend: bool,
    more_tags: Mapping[str, str],
) -> dict[str, Any]:
    client = tracking.connect(config)
    name = config.mlflow.model_name
    _create_model(client, name)
    tags = {
        tracking.RUN_TAG: run_uri,
        **{k: v for k, v in manifest.tags.items() if "." not in k},
        "run_fingerprint": manifest.fingerprint,
        "config": json.dumps(config.model_dump(mode="json", include={"student", "targets", "distill"})),
        **more_tags,
    }
    if evaluation is not None:
        protocol = evaluation.protocol.fingerprint
        tags |= {"evaluation": protocol, "evaluation_uri": evaluation.uri}
        for key, value in evaluation.scores.items():
            # The latest score to look at, and one for each evaluation to compare by.
            tags |= {f"score.{key}": f"{value:.6f}", f"score.{protocol}.{key}": f"{value:.6f}"}
    known, source = _version_of_run(client, name, run_uri), None
    run_id = known.run_id if known else _mlflow_run(config, run_uri, manifest)
    recorded = record(config, client, run_id, manifest, evaluation, known.tags if known else {})
    tags |= recorded.tags
    if known is None:  # uploads keep nobody else waiting
        source, forms = _upload(client, run_uri, recorded)
        tags |= forms
    champion, reason = False, "it does not contend for the alias"
    with registry_lock(client, name) as client:
        known = _version_of_run(client, name, run_uri)
        if known is None:
            made_of = {"run_id": run_id, "model_id": recorded.model.model_id if recorded.model else None}
            known = client.create_model_version(name, source, tags=tags, **made_of)
            log(f"register: {name} version {known.version}")
        else:
            log(f"register: this run is {name} version {known.version} already")
            _set_tags(client, known, tags)
        version = str(known.version)
        if contend:
            champion, reason = _contend(client, name, version, tags, config.evaluate.score)
        describe(client, name, version, recorded, CHAMPION)
    if contend:
        log(f"register: {reason}")
    return {
        "uri": f"models:/{name}/{version}",
        "model": name,
        "version": int(version),
        "champion": champion,
        "reason": reason,
    }


def set_champion(config: Config, version: int, rivals: Collection[int]) -> tuple[bool, str]:
    """Makes a version the champion if it scores better than the standing one, as `register` does.

    Where the standing one is among `rivals` (of which `version` was chosen by more than its own score), the
    version takes its place whatever their scores. Returns whether `version` holds the alias, and why.
    """
    name = config.mlflow.model_name
    with registry_lock(tracking.connect(config), name) as client:
        holder = client.get_registered_model(name).aliases.get(CHAMPION)
        if holder is not None and int(holder) != version and int(holder) in rivals:
            client.set_registered_model_alias(name, CHAMPION, str(version))
            reason = f"version {version} is the new champion: chosen among versions that {holder} is one of"
            champion = True
        else:
            tags = dict(client.get_model_version(name, str(version)).tags)
            champion, reason = _contend(client, name, str(version), tags, config.evaluate.score)
        with optional("the model card"):
            describe_model(client, name, CHAMPION)
        return champion, reason


def _create_model(client: Any, name: str) -> None:
    try:
        client.create_registered_model(name)
    except Exception as error:
        if error_code(error) != "RESOURCE_ALREADY_EXISTS":
            raise


def _version_of_run(client: Any, name: str, run_uri: str) -> Any | None:
    found = client.search_model_versions(f"name = '{name}' and {tracking.tag_filter(run_uri)}")
    return min(found, key=lambda version: int(version.version), default=None)


def _set_tags(client: Any, version: Any, tags: Mapping[str, str]) -> None:
    known = client.get_model_version(version.name, version.version).tags
    for key, value in tags.items():
        if known.get(key) != value:
            client.set_model_version_tag(version.name, version.version, key, value)


def _upload(client: Any, run_uri: str, recorded: Recorded) -> tuple[str, dict[str, str]]:
    """Sends what a version consists of to MLflow.

    Returns where it is, with the logged model or else with the run, and the version's tags that say in which form.
    """
    with tempfile.TemporaryDirectory() as scratch, slow_transfers():
        config_file = Path(scratch) / "config.yaml"
        config_file.write_bytes(storage.read_bytes(storage.join(run_uri, "config.yaml")))
        client.log_artifact(recorded.run_id, str(config_file))
        packed = Path(scratch) / "packed"
        _pack(storage.join(run_uri, MODEL_FOLDER), packed)
        forms = {EXPORTED_TAG: ONNX_FILE} if list(packed.rglob(ONNX_FILE)) else {}
        client.set_tag(recorded.run_id, UPLOAD_TAG, storage.timestamp())
        if recorded.model is not None:
            return store_files(client, recorded.model, packed), forms
        client.log_artifacts(recorded.run_id, str(packed), MODEL_ARTIFACT)
    return f"{client.get_run(recorded.run_id).info.artifact_uri}/{MODEL_ARTIFACT}", forms


def _pack(model_uri: str, folder: Path) -> None:
    """Writes a model as MLflow stores it: weights, config, exported form, signature, and the code that runs them."""
    from mlflow.models import ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import Schema, TensorSpec

    pixels = np.dtype(np.uint8)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(pixels, (-1, -1, -1, 3))]),
        outputs=Schema([TensorSpec(pixels, (-1, -1, -1))]),
    )
    with (
        storage.local_copy(model_uri) as model,
        tempfile.TemporaryDirectory() as scratch,
        warnings.catch_warnings(),
    ):
        check_finite(read_state_dict(Path(model) / WEIGHTS_FILE), storage.join(model_uri, WEIGHTS_FILE))
        arguments = model_arguments(Path(model), model_uri, Path(scratch))
        save_model(path=str(folder), signature=signature, input_example=input_example(), **arguments)


def _mlflow_run(config: Config, run_uri: str, manifest: RunManifest) -> str:
    """The run that trained the student; a new one where this server does not know it."""
    try:
        return tracking.connect(config).get_run(manifest.mlflow_run).info.run_id
    except Exception as error:
        if error_code(error) != "RESOURCE_DOES_NOT_EXIST":
            raise
    run_id = tracking.start_run(config, run_uri, manifest.fingerprint, manifest.tags)
    tracking.complete_run(config, run_uri, run_id)
    return run_id


def _contend(client: Any, name: str, version: str, tags: dict[str, str], score: str) -> tuple[bool, str]:
    """Moves the champion's alias to `version` if it has earned it; returns whether it holds it, and why."""
    key = f"score.{tags.get('evaluation')}.{score}"
    mine = float(tags[key]) if key in tags else None
    shown = f"{score} {100 * mine:.2f}" if mine is not None else "no score"

    def crown(reason: str) -> tuple[bool, str]:
        client.set_registered_model_alias(name, CHAMPION, version)
        return True, reason

    aliases = client.get_registered_model(name).aliases
    if CHAMPION not in aliases:
        return crown(f"version {version} is the first champion ({shown})")
    holder = str(aliases[CHAMPION])
    if holder == version:
        return True, f"version {version} is the champion ({shown})"
    theirs = client.get_model_version(name, holder).tags
    if mine is None:
        return False, f"version {holder} stays champion: version {version} has no {score} to compare"
    if f"score.{score}" not in theirs:
        return crown(f"version {version} is the new champion: {shown}, while version {holder} has no score")
    if key not in theirs:
        return False, (
            f"version {holder} stays champion: it was scored on another evaluation ({theirs.get('evaluation')}, "
            f"this one is {tags['evaluation']}); register it again with this one first"
        )
    best = float(theirs[key])
    if not mine > best:
        return (
            False,
            f"version {holder} stays champion: {score} {100 * best:.2f}, not less than {100 * mine:.2f}",
        )
    return crown(f"version {version} is the new champion: {score} {100 * mine:.2f}, before {100 * best:.2f}")


def pull(model_uri: str, folder: str | Path, tracking_uri: str) -> dict[str, Any]:
    """Writes a registered model's safetensors, config and origin into a local or remote folder.

    An earlier version there is replaced. `hf://USER/REPO` gets them in one commit, with the version's model card as
    its `README.md`; a repository that is new is private. Errors as in `downloaded`; of the Hub as in
    `OnHub.push_to_hub`.
    """
    version = find_version(model_uri, tracking_uri)
    if str(folder).startswith(hub.SCHEME):
        return {
            "uri": _onto_hub(version, str(folder).removeprefix(hub.SCHEME), tracking_uri),
            "model": model_uri,
        }
    target = storage.absolute(str(folder))
    fetch_version(version, target, tracking_uri, replace=True)
    return {"uri": target, "model": model_uri}


def _onto_hub(version: Any, repository: str, tracking_uri: str) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        fetch_version(version, scratch, tracking_uri)
        (Path(scratch) / storage.MANIFEST).unlink()  # it says that a folder is whole, as a commit always is
        text = hub_card(repository, version.description or "")
        (Path(scratch) / CARD_FILE).write_text(text, encoding="utf-8")
        name = f"models:/{version.name}/{version.version}"
        return hub.push(scratch, repository, private=True, branch=None, message=f"{name} of the registry")
