"""The machine while it trains, as MLflow's own system metrics, where `mlflow.system_metrics` asks for them.

MLflow's monitors measure, and one of our loggers sends: theirs stops for good once a server is away.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from pipeline.config import Config, ConfigError
from pipeline.tracking.client import optional, plain_client
from pipeline.tracking.runs import RunLogger

_PREFIX = "system/"  # which MLflow's pages have a tab for


class _SystemLogger(RunLogger):
    what, left = "system metrics", "and are lost"


def check_system_metrics(config: Config) -> None:
    """Raises ConfigError where system metrics are asked for and can't be measured."""
    if config.mlflow.system_metrics and find_spec("psutil") is None:
        raise ConfigError("mlflow.system_metrics: needs psutil, which is not installed: pip install psutil")


@contextlib.contextmanager
def system_metrics(config: Config, run_id: str | None) -> Iterator[None]:
    """Sends how busy this machine is to an MLflow run while the block runs; nothing of it stops the training.

    They come every 10 seconds, or as `MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL` and
    `MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING` say.

    Args:
        run_id: None for nothing, as on all workers but the first.
    """
    if run_id is None or not config.mlflow.system_metrics:
        yield
        return
    ended = threading.Event()
    watching = threading.Thread(target=_watch, args=(config, run_id, ended), daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()


def _watch(config: Config, run_id: str, ended: threading.Event) -> None:
    with optional("system metrics"):
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(run_id, tracking_uri=config.tracking_uri)
        logger, step = _SystemLogger(config, run_id), _next_step(config, run_id)
        while not ended.is_set():
            for _ in range(monitor.samples_before_logging):
                ended.wait(monitor.sampling_interval)
                monitor.collect_metrics()
            logger.metrics({f"{_PREFIX}{key}": value for key, value in _aggregated(monitor).items()}, step)
            step += 1
        logger.flush(last=True)


def _aggregated(monitor: Any) -> dict[str, float]:
    values = dict(monitor.aggregate_metrics())
    for one in monitor.monitors:
        one.clear_metrics()
    return values


def _next_step(config: Config, run_id: str) -> int:
    """Where a run that goes on had got to; 0 where the server can't say."""
    try:
        history = plain_client(config.tracking_uri).get_metric_history(
            run_id, f"{_PREFIX}cpu_utilization_percentage"
        )
    except Exception:
        return 0
    return max((metric.step + 1 for metric in history), default=0)
