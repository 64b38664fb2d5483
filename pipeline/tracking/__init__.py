"""MLflow: clients that wait for a server that is away, runs with metrics and data sets, logged models, versions."""

from pipeline.tracking.client import client_of
from pipeline.tracking.completion import complete_run
from pipeline.tracking.runs import (
    HISTORY_FILE,
    RUN_TAG,
    RunLogger,
    connect,
    experiment_id,
    start_run,
    tag_filter,
)

__all__ = [
    "HISTORY_FILE",
    "RUN_TAG",
    "RunLogger",
    "client_of",
    "complete_run",
    "connect",
    "experiment_id",
    "start_run",
    "tag_filter",
]
