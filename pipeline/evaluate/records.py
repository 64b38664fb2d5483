"""Evaluations as MLflow runs: written by `evaluate`, read again by the report.

One run is one model (or trivial baseline) under one protocol on one set of clips. It is found again by its
evaluation folder, so that evaluating twice records once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from pipeline import storage, tracking
from pipeline.artifacts.manifests import MODEL_FOLDER, Rules
from pipeline.config import Config
from pipeline.evaluate.scoring import MATCHED_SCORES, SCORES
from pipeline.log import log
from pipeline.models import CheckpointHints
from pipeline.tracking.client import all_pages, optional
from pipeline.tracking.datasets import EVALUATION, clips_dataset, log_inputs
from pipeline.tracking.logged import link_scores, logged_model

ROLE = "evaluation"
VIDEOS_FILE = "videos.parquet"  # in the evaluation folder, one row a video

# The ways to train, as in the tag `method`, and what tables call them.
METHODS = {
    "teacher": "Teacher",
    "no_kd": "Student (no KD)",
    "feature_kd": "Feature KD",
    "reconstruction_kd": "Reconstruction KD",
    "slotmatch_mse": "SlotMatch (MSE)",
    "slotmatch_hungarian": "SlotMatch (w/ matching)",
    "slotmatch_reconstruction_kd": "SlotMatch + Reconstruction KD",
    "slotmatch": "SlotMatch (ours)",
    "other": "Model",  # of which nobody knows how it was trained
    "baseline": "Trivial baseline",
}
# The systems that the paper compares with, as in the tag `system`, and what tables call them.
RIVALS = {
    "savi": "SAVi",
    "savi_boxes": "SAVi (conditional, boxes)",
    "steve": "STEVE",
    "solv": "SOLV",
    "diod": "DIOD (uses motion)",
}


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found of one model or baseline; scores are fractions of 1."""

    uri: str  # the evaluation folder
    scores: dict[str, float]
    protocol: Rules
    videos: int  # that have an object to score

    def per_video(self) -> dict[str, dict[str, Any]]:
        """By its id each video's scores (NaN where it has no object) and what they are means over, see `VideoScore`."""
        return {row["video_id"]: row for row in _video_rows(self.uri)}

    def summary(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "uri": self.uri,
            "scores": self.scores,
            "protocol": self.protocol.model_dump(mode="json", exclude={"warnings"}),
            "videos": self.videos,
            "warnings": list(self.protocol.warnings),
        }


@dataclass(frozen=True)
class Record:
    """One evaluation as MLflow has it; scores are fractions of 1."""

    uri: str  # the evaluation folder
    clips_uri: str  # what was scored on
    method: str  # a key of METHODS
    name: str  # what the run calls itself: "SlotMatch", "2x3 grid"
    dataset: str  # the data set's name: "MOVi-E"
    trained_on: str  # the same, of what the model was trained on; "" where that is not known
    teacher: str  # the kind of teacher: "SlotContrast"; "" where there is none
    system: str  # of models of another architecture than slot models its name, a key of RIVALS or "stosavi"; else ""
    beta: float | None
    seed: int | None
    steps: int | None
    precision: str  # of the training's products; "" where that is not known
    settings: str  # a fingerprint of all that decided the training but the seed; "" where that is not known
    model_uri: str | None  # None for a baseline
    hints: CheckpointHints  # for loading the model again; a folder needs none
    protocol: Rules
    scores: dict[str, float]
    videos: int
    run_id: str

    def per_video(self) -> list[dict[str, Any]]:
        """Rows with `video_id` and the scores (NaN where a video has no object), see `VideoScore`."""
        return _video_rows(self.uri)


def _video_rows(uri: str) -> list[dict[str, Any]]:
    with storage.open_read(storage.join(uri, VIDEOS_FILE)) as file:
        return pq.read_table(file).to_pylist()


def find_records(config: Config, clips_uri: str | None = None) -> list[Record]:
    """All evaluations of the config's MLflow experiment, the latest first.

    Empty where the experiment is not there yet.

    Args:
        clips_uri: only those on this clip set.
    """
    mlflow = tracking.connect(config)
    experiment = mlflow.get_experiment_by_name(config.mlflow.experiment)
    if experiment is None:
        return []
    records: list[Record] = []
    same_clips = f" and {tracking.tag_filter(clips_uri, 'clips_uri')}" if clips_uri is not None else ""
    finished = f"tags.role = '{ROLE}' and attributes.status = 'FINISHED'{same_clips}"
    for run in all_pages(mlflow.search_runs, [experiment.experiment_id], finished):
        try:
            records.append(_record(run))
        except (KeyError, TypeError, ValueError) as error:
            log(f"mlflow: run {run.info.run_id} is no whole evaluation and is left out ({error!r})")
    return records


def record_evaluations(
    config: Config,
    clips_uri: str,
    tags: Mapping[str, Mapping[str, str]],
    results: Mapping[str, Evaluation],
) -> None:
    """Makes each of the named evaluations an MLflow run, or brings the tags of the run it has up to date.

    A server that is down loses nothing: evaluating again finds the scores and records them.
    """
    try:
        for name, result in results.items():
            _record_one(config, name, result, {"clips_uri": clips_uri, **tags[name]})
    except Exception as error:  # whatever the server or the network does, the scores are there
        reason = (
            str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {str(error)[:200]}"
        )
        log(f"mlflow: the scores could not be recorded ({reason}); evaluate again once the server is there")


def _record_one(config: Config, name: str, result: Evaluation, tags: dict[str, str]) -> None:
    mlflow, experiment = tracking.connect(config), tracking.experiment_id(config)
    run_id = _evaluation_run(config, mlflow, experiment, name, result, tags)
    with optional(f"the data set and the logged model of evaluate {name}"):
        link_evaluation(
            mlflow, mlflow.get_run(run_id), tags["clips_uri"], tags.get("model_uri"), result.scores
        )


def _evaluation_run(
    config: Config, mlflow: Any, experiment: str, name: str, result: Evaluation, tags: dict[str, str]
) -> str:
    """The id of an evaluation's run, which has its scores and tags."""
    from mlflow.entities import Metric

    tags = {
        tracking.RUN_TAG: result.uri,
        "role": ROLE,
        "name": name,
        "dataset": config.dataset.title,
        "protocol": result.protocol.model_dump_json(),
        "videos": str(result.videos),
        **tags,
    }
    found = mlflow.search_runs([experiment], tracking.tag_filter(result.uri), max_results=1)
    if found and (found[0].info.status != "FINISHED" or not set(result.scores) <= set(found[0].data.metrics)):
        mlflow.delete_run(found[0].info.run_id)  # its job ended half-way
        found = []
    if found:
        known = found[0].data.tags
        if tags["method"] == "other" != known.get("method"):
            return str(found[0].info.run_id)  # the same weights, of which more was known then
        for key, value in tags.items():
            if known.get(key) != value:
                mlflow.set_tag(found[0].info.run_id, key, value)
        return str(found[0].info.run_id)
    run_id = mlflow.create_run(experiment, run_name=f"evaluate {name}", tags=tags).info.run_id
    now = int(time.time() * 1000)
    mlflow.log_batch(run_id, metrics=[Metric(k, v, now, 0) for k, v in result.scores.items()])
    mlflow.set_terminated(run_id, "FINISHED")
    return str(run_id)


def link_evaluation(
    mlflow: Any, run: Any, clips_uri: str, model_uri: str | None, scores: Mapping[str, float]
) -> None:
    """Records what an evaluation was made on as an input of its run, and its scores as those of the logged model.

    Args:
        run: of the evaluation, as MLflow has it (`get_run`).
        model_uri: what was scored; None for a baseline. Of a model that was not trained here there is no record.

    Raises:
        storage.IncompleteError, ValueError: the clip set is not there.
        As MLflow's client.
    """
    dataset = clips_dataset(clips_uri)
    log_inputs(mlflow, run, [(dataset, EVALUATION)])
    trained_in = _training_run(model_uri) if model_uri else None
    if trained_in is None:
        return
    found = mlflow.search_runs([run.info.experiment_id], tracking.tag_filter(trained_in), max_results=1)
    if found:
        link_scores(mlflow, logged_model(mlflow, found[0]), run, dataset, scores)


def _training_run(model_uri: str) -> str | None:
    """The run folder that a model comes from: its own, or that of the version that was pulled."""
    folder, name = model_uri.rstrip("/"), f"/{MODEL_FOLDER}"
    place = folder.removesuffix(name)
    try:
        manifest = storage.read_manifest(place)
    except (storage.IncompleteError, OSError, ValueError):
        return None
    return place if folder.endswith(name) else manifest.get("tags", {}).get(tracking.RUN_TAG)


def _record(run: Any) -> Record:
    tags, metrics = run.data.tags, run.data.metrics
    matched = [key for key in MATCHED_SCORES if key in metrics]  # those of some protocols

    def number(key: str, kind: type) -> Any:
        return kind(tags[key]) if tags.get(key) else None

    return Record(
        uri=tags[tracking.RUN_TAG],
        clips_uri=tags["clips_uri"],
        method=tags["method"],
        name=tags["name"],
        dataset=tags["dataset"],
        trained_on=tags.get("trained_on", ""),
        teacher=tags.get("teacher", ""),
        system=tags.get("system", ""),
        beta=number("beta", float),
        seed=number("seed", int),
        steps=number("steps", int),
        precision=tags.get("precision", ""),
        settings=tags.get("settings", ""),
        model_uri=tags.get("model_uri") or None,
        hints=CheckpointHints.from_dict(json.loads(tags.get("hints", "{}"))),
        protocol=Rules.model_validate_json(tags["protocol"]),
        scores={key: metrics[key] for key in (*SCORES, *matched, "slots_in_use")},
        videos=int(tags["videos"]),
        run_id=run.info.run_id,
    )
