"""MLflow: plain client calls with an explicit URI. A run that has begun does not need the server."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.config import Config
from pipeline.progress import log

SECONDS_BETWEEN_TRIES = 30.0
RUN_TAG = "slotmatch.run"  # the run folder's URI: how a resumed job finds its MLflow run again


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def client(config: Config) -> Any:
    """An MlflowClient of the config's server or database, which is created if it is a new SQLite file."""
    return client_of(config.tracking_uri)


def client_of(tracking_uri: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # of 7, which take minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    import logging

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    if tracking_uri.startswith("file:") or "://" not in tracking_uri:
        raise ValueError(
            f"mlflow.tracking_uri: {tracking_uri!r} is a file store, which MLflow no longer serves; "
            "nearest: sqlite:///PATH/mlflow.db"
        )
    if not tracking_uri.startswith("sqlite:///"):
        return MlflowClient(tracking_uri)
    # Several processes that open a new SQLite database at once break it for good.
    database = Path(tracking_uri.removeprefix("sqlite:///"))
    with _file_lock(database.with_suffix(".lock")):
        made = MlflowClient(tracking_uri)
        if not database.exists():
            log(f"mlflow: creating {database}")
            made.search_experiments(max_results=1)
    return made


def experiment_id(config: Config) -> str:
    mlflow = client(config)
    found = mlflow.get_experiment_by_name(config.mlflow.experiment)
    if found is not None:
        return found.experiment_id
    location = None
    if config.tracking_uri.startswith("sqlite:///"):
        root = storage.absolute(config.storage.root)
        location = storage.join(root if storage.is_remote(root) else Path(root).as_uri(), "mlartifacts")
    return mlflow.create_experiment(config.mlflow.experiment, artifact_location=location)


def tag_filter(run_uri: str) -> str:
    """MLflow's filter for what belongs to a run folder."""
    quote = '"' if "'" in run_uri else "'"
    return f"tags.`{RUN_TAG}` = {quote}{run_uri}{quote}"


def start_run(config: Config, run_uri: str, name: str, tags: dict[str, str]) -> str:
    """The id of the MLflow run that belongs to a run folder: found again, or created.

    Parameters are the resolved config's values.
    """
    mlflow, experiment = client(config), experiment_id(config)
    found = mlflow.search_runs([experiment], filter_string=tag_filter(run_uri), max_results=1)
    if found:
        run_id = found[0].info.run_id
        mlflow.update_run(run_id, status="RUNNING")
        return run_id
    run = mlflow.create_run(experiment, run_name=name, tags={RUN_TAG: run_uri, **tags})
    from mlflow.entities import Param

    flat = {}
    for section, values in config.model_dump(mode="json").items():
        for key, value in values.items():
            if isinstance(value, dict):
                flat.update({f"{section}.{key}.{k}": v for k, v in value.items()})
            else:
                flat[f"{section}.{key}"] = value
    params = [Param(re.sub(r"[^\w\-. :/]", "_", k), str(v)[:500]) for k, v in flat.items()]
    for start in range(0, len(params), 100):
        mlflow.log_batch(run.info.run_id, params=params[start : start + 100])
    return run.info.run_id


def _send(client: Any, *, run_id: str | None, metrics: list[Any]) -> None:
    client.log_batch(run_id, metrics=metrics)


class RunLogger:
    """Metrics and pictures of one run. A server that is down does not stop or slow the training.

    Metrics that could not be sent are kept and sent with later ones; what fails is said once.
    """

    def __init__(self, config: Config, run_id: str | None) -> None:
        self.config, self.run_id = config, run_id
        self._client: Any = None
        self._pending: list[Any] = []
        self._next_try = 0.0

    def _call(self, what: str, operation: Callable[[Any], None], *, last: bool = False) -> bool:
        if self.run_id is None or (time.monotonic() < self._next_try and not last):
            return False
        try:
            self._client = self._client or client(self.config)
            operation(self._client)
        except Exception as error:  # whatever the server or the network does, training goes on
            if self._next_try == 0.0:
                reason = f"{type(error).__name__}: {str(error)[:200]}"
                log(f"mlflow: {what} could not be logged ({reason}); training goes on, metrics are kept")
            self._next_try = time.monotonic() + SECONDS_BETWEEN_TRIES
            return False
        self._next_try = 0.0
        return True

    def metrics(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        if self.run_id is not None:
            now = int(time.time() * 1000)
            self._pending += [Metric(k, float(v), now, step) for k, v in values.items()]
            self.flush()

    def flush(self, *, last: bool = False) -> None:
        while self._pending:
            part = self._pending[:1000]  # the most that one request may hold
            send = functools.partial(_send, run_id=self.run_id, metrics=part)
            if not self._call("metrics", send, last=last):
                if last:
                    log(
                        f"mlflow: {len(self._pending)} metrics were not sent; they are in the run's history.json"
                    )
                return
            self._pending = self._pending[len(part) :]

    def file(self, path: str | Path, folder: str | None = None) -> None:
        self._call("a file", lambda c: c.log_artifact(self.run_id, str(path), folder))

    def end(self, status: str) -> None:
        self._call("the end of the run", lambda c: c.set_terminated(self.run_id, status), last=True)
