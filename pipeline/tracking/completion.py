"""The end of a training run in MLflow: the metrics that it missed, and a record of the model."""

from __future__ import annotations

import time
from typing import Any

from pipeline import storage
from pipeline.config import Config
from pipeline.log import log
from pipeline.tracking.client import (
    PatientClient,
    ServerUnavailable,
    error_code,
    in_words,
    optional,
    plain_client,
    why_denied,
)
from pipeline.tracking.logged import logged_model
from pipeline.tracking.runs import HISTORY_FILE


def complete_run(config: Config, run_uri: str, run_id: str, *, wait: bool = True) -> None:
    """Ends the MLflow run of a finished run folder, after sending the metrics that had not reached the server.

    Its model becomes a logged model of the run.

    A run that has ended so is left alone, and so is one that this server does not know. An error is only said: the
    folder is whole without MLflow.

    Args:
        wait: for a server that is away.
    """
    try:
        plain = plain_client(config.tracking_uri)
        mlflow = PatientClient(plain, config.tracking_uri) if wait else plain
        if mlflow.get_run(run_id).info.status == "FINISHED":
            return
        history_uri = storage.join(run_uri, HISTORY_FILE)
        missing = _missing(mlflow, run_id, storage.read_json(history_uri))
        for start in range(0, len(missing), 1000):
            mlflow.log_batch(run_id, metrics=missing[start : start + 1000])
        with optional("the logged model of this run"):
            logged_model(mlflow, mlflow.get_run(run_id))
        mlflow.set_terminated(run_id, "FINISHED")
        if missing:
            log(f"mlflow: sent {len(missing)} metrics of {storage.name(run_uri)} that it had missed")
    except Exception as error:  # whatever the server or the network does, the run is done
        if error_code(error) == "RESOURCE_DOES_NOT_EXIST":
            return
        reason = (
            error.problem if isinstance(error, ServerUnavailable) else why_denied(error) or in_words(error)
        )
        log(
            f"mlflow: the end of this run could not be sent to {config.tracking_uri} ({reason}); the run is published "
            f"in {run_uri}, with all its metrics in {HISTORY_FILE}; the same command sends them once the server is back"
        )


def _missing(mlflow: Any, run_id: str, history: list[dict[str, float]]) -> list[Any]:
    """The metrics of a history that the MLflow run does not have."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    names = {name for row in history for name in row} - {"step"}
    known = {name: {m.step for m in mlflow.get_metric_history(run_id, name)} for name in sorted(names)}
    return [
        Metric(name, float(value), now, int(row["step"]))
        for row in history
        for name, value in row.items()
        if name != "step" and row["step"] not in known[name]
    ]
