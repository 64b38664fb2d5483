"""A sweep in MLflow: one parent run, and its students' runs as nested children."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline import storage, tracking
from pipeline.config import Config
from pipeline.log import log
from pipeline.sweep.ended import Ended
from pipeline.sweep.settings import Trial
from pipeline.tracking.client import in_words, plain_client, why_denied

PARENT_TAG = "mlflow.parentRunId"  # by which MLflow's own pages nest runs
SWEEP_TAG = "sweep"


def child_tags(parent: str, sweep_uri: str) -> dict[str, str]:
    return {PARENT_TAG: parent, SWEEP_TAG: storage.name(sweep_uri)}


@contextlib.contextmanager
def parent_run(config: Config, sweep_uri: str) -> Iterator[str]:
    """The id of the sweep's run, found again or new; ended with the block, with all that it left running."""
    name = f"sweep-{storage.name(sweep_uri)[:8]}"
    tags = {"role": "sweep", SWEEP_TAG: storage.name(sweep_uri)}
    parent = tracking.start_run(config, sweep_uri, name, tags)
    logger = tracking.RunLogger(config, parent)
    try:
        _end_left_running(config, sweep_uri, parent)  # by a driver that was killed
        yield parent
        _end_left_running(config, sweep_uri, parent)  # by trials that were
    except BaseException as error:
        with contextlib.suppress(Exception):  # what ended the sweep is to be said, and soon
            _end_left_running(config, sweep_uri, parent, within=5.0)
        logger.end_with(error)
        raise
    logger.end("FINISHED")


def _end_left_running(config: Config, sweep_uri: str, parent: str, *, within: float = math.inf) -> None:
    client = tracking.connect(config).within(within)
    experiment = client.get_run(parent).info.experiment_id
    of_this = f"tags.{SWEEP_TAG} = '{storage.name(sweep_uri)}' and attributes.status = 'RUNNING'"
    for run in client.search_runs([experiment], of_this, max_results=1000):
        if run.info.run_id != parent:
            client.set_terminated(run.info.run_id, "KILLED")


def end_child(config: Config, run_uri: str, status: str) -> str | None:
    """Ends the MLflow run of a run folder; returns its id, None where there is none.

    A server that is away is not waited for, as other trials are running: what stays open is closed at the sweep's end.
    """
    try:
        client = plain_client(config.tracking_uri)
        experiment = client.get_experiment_by_name(config.mlflow.experiment)
        found = client.search_runs([experiment.experiment_id], tracking.tag_filter(run_uri), max_results=1)
        if not found:
            return None
        client.set_terminated(found[0].info.run_id, status)
        return found[0].info.run_id
    except Exception as error:  # whatever the server or the network does, the sweep goes on
        log(
            f"mlflow: the end of {storage.name(run_uri)} could not be sent ({why_denied(error) or in_words(error)})"
        )
        return None


def nest_runs(
    config: Config, parent: str, sweep_uri: str, trials: Sequence[Trial], ended: dict[str, Ended]
) -> None:
    """Nests every trial's run below the parent, also those of students that were there before the sweep.

    A run that was stopped is closed once more, as its process may have been killed before it could. One that finished
    while the server was away gets what it missed.
    """
    from mlflow.exceptions import MlflowException

    client = tracking.connect(config)
    for trial in trials:
        run_id = ended[trial.key].mlflow_run
        if run_id is None:
            continue
        with contextlib.suppress(MlflowException):  # a run that another server has
            known = client.get_run(run_id).data.tags
            tags = {**child_tags(parent, sweep_uri), "setting": trial.setting.name}
            for key, value in tags.items():
                if known.get(key) != value:
                    client.set_tag(run_id, key, value)
            if ended[trial.key].status == "finished":
                tracking.complete_run(trial.config, trial.run_uri, run_id)
            if ended[trial.key].status == "stopped":
                client.set_terminated(run_id, "KILLED")


def log_results(
    config: Config,
    parent: str,
    files: Sequence[tuple[str, bytes]],
    metrics: dict[str, float],
    params: dict[str, Any],
) -> None:
    """The table, the plot, and the best setting with its means, in the parent run."""
    import tempfile
    from pathlib import Path

    from mlflow.entities import Metric

    client = tracking.connect(config)
    known = client.get_run(parent).data.params
    for key, value in params.items():
        if key not in known:
            client.log_param(parent, key, str(value)[:500])
    now = int(time.time() * 1000)
    client.log_batch(parent, metrics=[Metric(key, number, now, 0) for key, number in metrics.items()])
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in files:
            path = Path(scratch) / name
            path.write_bytes(content)
            client.log_artifact(parent, str(path))
