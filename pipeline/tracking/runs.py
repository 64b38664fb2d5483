"""MLflow: plain client calls with an explicit URI.

A server that is away is waited for when a job begins and when it ends. In between, training goes on without it: the
metrics it missed are sent when it is back, at the latest when the same command is given again.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.config import Config
from pipeline.log import log, redact
from pipeline.tracking.client import (
    client_of,
    error_code,
    in_words,
    plain_client,
    why_denied,
)
from pipeline.tracking.moved import ARTIFACTS, check_not_moved

SECONDS_BETWEEN_TRIES = 30.0  # of sending metrics while the server is away
HISTORY_FILE = "history.json"  # in a finished run's folder: the metrics of each logged step
RUN_TAG = "slotmatch.run"  # the run folder's URI: how a resumed job finds its MLflow run again


def connect(config: Config) -> Any:
    """An MlflowClient of the config's server or database; see `client_of` and `check_not_moved`."""
    check_not_moved(config)
    return client_of(config.tracking_uri)


def experiment_id(config: Config) -> str:
    mlflow = connect(config)
    found = mlflow.get_experiment_by_name(config.mlflow.experiment)
    if found is not None:
        return found.experiment_id
    location = None
    if config.tracking_uri.startswith("sqlite:///"):
        root = storage.absolute(config.storage.root)
        location = storage.join(root if storage.is_remote(root) else Path(root).as_uri(), ARTIFACTS)
    try:
        return mlflow.create_experiment(config.mlflow.experiment, artifact_location=location)
    except Exception as error:
        if error_code(error) != "RESOURCE_ALREADY_EXISTS":
            raise
        return mlflow.get_experiment_by_name(config.mlflow.experiment).experiment_id  # another job was faster


def tag_filter(uri: str, tag: str = RUN_TAG) -> str:
    """MLflow's filter for what belongs to a run folder, or has another folder's URI as a tag."""
    quote = '"' if "'" in uri else "'"
    return f"tags.`{tag}` = {quote}{uri}{quote}"


def start_run(config: Config, run_uri: str, name: str, tags: dict[str, str]) -> str:
    """The id of the MLflow run that belongs to a run folder: found again, or created.

    Parameters are the resolved config's values; a run that was found gets those that it lacks. Errors as in
    `client_of`.
    """
    mlflow, experiment = connect(config), experiment_id(config)
    found = mlflow.search_runs([experiment], filter_string=tag_filter(run_uri), max_results=1)
    if found:
        run = found[0]
        mlflow.update_run(run.info.run_id, status="RUNNING")
    else:
        run = mlflow.create_run(experiment, run_name=name, tags={RUN_TAG: run_uri, **tags})
    params = [param for param in _params(config) if param.key not in run.data.params]
    for start in range(0, len(params), 100):
        mlflow.log_batch(run.info.run_id, params=params[start : start + 100])
    return run.info.run_id


def _params(config: Config) -> list[Any]:
    from mlflow.entities import Param

    flat = {}
    for section, values in config.model_dump(mode="json").items():
        for key, value in values.items():
            if isinstance(value, dict):
                flat.update({f"{section}.{key}.{k}": v for k, v in value.items()})
            else:
                flat[f"{section}.{key}"] = value
    return [Param(re.sub(r"[^\w\-. :/]", "_", k), redact(str(v))[:500]) for k, v in flat.items()]


def _send(client: Any, *, run_id: str | None, metrics: list[Any]) -> None:
    client.log_batch(run_id, metrics=metrics)


class RunLogger:
    """Metrics and pictures of one run. A server that is down does not stop or slow the training.

    Metrics that could not be sent are kept and sent with later ones; what fails is said once. Those that are left
    at the end of a run are sent by `complete_run`.
    """

    what, left = "metrics", "which the run's end will try again"

    def __init__(self, config: Config, run_id: str | None) -> None:
        self.config, self.run_id = config, run_id
        self._client: Any = None
        self._pending: list[Any] = []
        self._next_try = 0.0

    def _call(self, what: str, operation: Callable[[Any], None], *, last: bool = False) -> bool:
        if self.run_id is None or (time.monotonic() < self._next_try and not last):
            return False
        try:
            self._client = self._client or plain_client(self.config.tracking_uri)
            operation(self._client)
        except Exception as error:  # whatever the server or the network does, training goes on
            if self._next_try == 0.0:
                uri, reason = self.config.tracking_uri, why_denied(error) or in_words(error)
                log(
                    f"mlflow: {what} could not be sent to {uri} ({reason}); training goes on, metrics are kept"
                )
            self._next_try = time.monotonic() + SECONDS_BETWEEN_TRIES
            return False
        if self._next_try:
            log(f"mlflow: {self.config.tracking_uri} is back, sending what it missed")
        self._next_try = 0.0
        return True

    def metrics(self, values: dict[str, float], step: int) -> None:
        if self.run_id is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._pending += [Metric(k, float(v), now, step) for k, v in values.items()]
        self.flush()

    def flush(self, *, last: bool = False) -> None:
        while self._pending:
            part = self._pending[:1000]  # the most that one request may hold
            send = functools.partial(_send, run_id=self.run_id, metrics=part)
            if not self._call(self.what, send, last=last):
                if last:
                    log(f"mlflow: {len(self._pending)} {self.what} were not sent, {self.left}")
                return
            self._pending = self._pending[len(part) :]

    def tag(self, key: str, value: str) -> None:
        self._call("a tag", lambda c: c.set_tag(self.run_id, key, value))

    def file(self, path: str | Path, folder: str | None = None) -> None:
        self._call("a file", lambda c: c.log_artifact(self.run_id, str(path), folder))

    def end(self, status: str) -> None:
        self._call("the end of the run", lambda c: c.set_terminated(self.run_id, status), last=True)

    def end_with(self, error: BaseException) -> None:
        """As failed, or as killed by what ends a process that is in order: Ctrl-C, and Ray Tune, which exits it."""
        self.end("FAILED" if isinstance(error, Exception) else "KILLED")


def git_revision() -> str:
    """`SLOTMATCH_REVISION` where it is set (a submitted job has no .git), else this checkout's commit or "unknown"."""
    import os
    import subprocess
    from pathlib import Path

    if os.environ.get("SLOTMATCH_REVISION"):
        return os.environ["SLOTMATCH_REVISION"]

    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() if result.returncode == 0 else "unknown"
