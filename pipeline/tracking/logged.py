"""Logged models, MLflow 3's records of models: one for each training run, its scores linked to what they were made on.

A run's model lies in its folder, so its record begins as one of an external model. Where it is registered, its files
as MLflow loads them are stored in the record's own place, and nowhere else in MLflow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.artifacts.manifests import MODEL_FOLDER
from pipeline.tracking.client import optional
from pipeline.tracking.runs import RUN_TAG

EXTERNAL_TAG = "mlflow.model.isExternal"  # "true": MLflow has none of its files
VERSIONS_TAG = "mlflow.modelVersions"  # how MLflow's pages find a model's registered versions
_SECTIONS = {"student": ("student", "distill", "targets"), "teacher": ("teacher", "targets")}
_TRAINED = (
    "method",
    "beta",
    "seed",
    "steps",
    "trained_on",
)  # of the run's tags; its parameters are config keys
_TAGS = ("role", "clips", "targets", "settings", "git_revision")


def find_model(mlflow: Any, run: Any) -> Any | None:
    """The logged model of a training run; None where there is none. Of several, made at once, the first."""
    found = mlflow.search_logged_models(
        [run.info.experiment_id], filter_string=f"source_run_id = '{run.info.run_id}'"
    )
    ours = [model for model in found if RUN_TAG in model.tags]
    return min(ours, key=lambda model: (model.creation_timestamp, model.model_id), default=None)


def logged_model(mlflow: Any, run: Any) -> Any:
    """The same, which is created where there is none: ready, an output of the run, with what it was trained with.

    Args:
        run: a training run of this pipeline, as MLflow has it (`get_run`).
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    model = find_model(mlflow, run)
    if model is None:
        made = _create(mlflow, run)
        model = find_model(mlflow, run) or made
        if model.model_id != made.model_id:  # another job was faster
            mlflow.delete_logged_model(made.model_id)
    if model.status != LoggedModelStatus.READY:
        model = mlflow.finalize_logged_model(model.model_id, "READY")
    outputs = {output.model_id for output in (run.outputs.model_outputs if run.outputs else ())}
    if model.model_id not in outputs:
        step = int(run.data.tags.get("steps", 0))
        with optional("the logged model as an output of its run"):
            mlflow.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step)])
    return model


def _create(mlflow: Any, run: Any) -> Any:
    tags, name = run.data.tags, run.info.run_name or run.info.run_id
    sections = _SECTIONS.get(tags.get("role", ""), ())
    params = {key: value for key, value in run.data.params.items() if key.partition(".")[0] in sections}
    params |= {key: tags[key] for key in _TRAINED if key in tags}
    if "teacher" in tags:
        params["teacher"] = tags["teacher"]
    place = {"model_uri": storage.join(tags[RUN_TAG], MODEL_FOLDER)}
    return mlflow.create_logged_model(
        run.info.experiment_id,
        name=re.sub(r"[/:.%\"'\s]+", "-", name),  # none of these may be in it
        source_run_id=run.info.run_id,
        model_type=tags.get("role"),
        params=params,
        tags={
            RUN_TAG: tags[RUN_TAG],
            **{key: tags[key] for key in _TAGS if key in tags},
            **place,
            EXTERNAL_TAG: "true",
        },
    )


def store_files(mlflow: Any, model: Any, folder: Path) -> str:
    """Stores what a version consists of as a logged model's files; returns where they are.

    Within `slow_transfers`.
    """
    from mlflow.models import Model

    described = Model.load(str(folder))
    # Where the example is found: not the place itself, from which it may move.
    described.model_id, described.artifact_path = model.model_id, f"models:/{model.model_id}"
    described.run_id = model.source_run_id
    described.save(str(folder / "MLmodel"))
    mlflow.log_model_artifacts(model.model_id, str(folder))
    mlflow.set_logged_model_tags(model.model_id, {EXTERNAL_TAG: "false"})
    mlflow.finalize_logged_model(model.model_id, "READY")
    return str(model.artifact_location)


def link_version(mlflow: Any, model: Any, name: str, version: str) -> None:
    """Has a logged model name a registered version of it; a server has done so itself where it was told the model."""
    known = json.loads(mlflow.get_logged_model(model.model_id).tags.get(VERSIONS_TAG, "[]"))
    if not any(one.get("name") == name and str(one.get("version")) == version for one in known):
        known.append({"name": name, "version": version})
        mlflow.set_logged_model_tags(model.model_id, {VERSIONS_TAG: json.dumps(known)})


def link_scores(mlflow: Any, model: Any, run: Any, dataset: Any, scores: Mapping[str, float]) -> None:
    """Makes the scores of an evaluation run those of a logged model on a data set, once.

    The run has the same metrics: they are sent with their times, so that it gets none twice.
    """
    from mlflow.entities import LoggedModelInput, Metric

    used = {one.model_id for one in (run.inputs.model_inputs if run.inputs else ())}
    if model.model_id not in used:
        mlflow.log_inputs(run.info.run_id, models=[LoggedModelInput(model.model_id)])
    linked = {metric.key for metric in model.metrics or () if metric.run_id == run.info.run_id}
    metrics = []
    for key, value in scores.items():
        if key not in linked:
            times = [metric.timestamp for metric in mlflow.get_metric_history(run.info.run_id, key)]
            what = {"dataset_name": dataset.name, "dataset_digest": dataset.digest}
            place = {"timestamp": max(times, default=run.info.start_time), "step": 0}
            metrics.append(Metric(key, value, **place, model_id=model.model_id, **what))
    if metrics:
        mlflow.log_batch(run.info.run_id, metrics=metrics)
