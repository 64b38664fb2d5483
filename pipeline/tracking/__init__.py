"""MLflow: clients that wait for a server that is away, runs and their metrics, and registered versions."""

from pipeline.tracking.client import client_of
from pipeline.tracking.runs import (
    HISTORY_FILE,
    RUN_TAG,
    RunLogger,
    complete_run,
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
