"""How busy a machine is while it trains, in MLflow's own metrics."""

import time

import mlflow
import pytest
from services import free_port

from pipeline import tracking
from pipeline.config import ConfigError, resolve_config
from pipeline.tracking import system_metrics as watched
from pipeline.tracking.system_metrics import check_system_metrics, system_metrics


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    return resolve_config({}, [f"storage.root={tmp_path / 'root'}", "mlflow.system_metrics=true"])


def test_they_are_logged_on_request_and_go_on_where_they_stopped(config):
    pytest.importorskip("psutil")
    run_id = tracking.start_run(config, "runs/a", "a", {})
    client = mlflow.MlflowClient(config.tracking_uri)
    quiet = config.model_copy(update={"mlflow": config.mlflow.model_copy(update={"system_metrics": False})})
    with system_metrics(quiet, run_id), system_metrics(config, None):
        time.sleep(0.2)
    assert client.get_run(run_id).data.metrics == {}
    for _ in range(2):
        with system_metrics(config, run_id):
            time.sleep(0.3)
    steps = [m.step for m in client.get_metric_history(run_id, "system/system_memory_usage_percentage")]
    assert sorted(steps) == list(range(len(steps)))
    assert len(steps) >= 2


def test_a_server_that_is_away_does_not_stop_the_training(config, capfd):
    pytest.importorskip("psutil")
    away = config.mlflow.model_copy(update={"tracking_uri": f"http://127.0.0.1:{free_port()}"})
    with system_metrics(config.model_copy(update={"mlflow": away}), "some run"):
        time.sleep(0.3)
    said = capfd.readouterr().err
    assert said.count("system metrics could not be sent") == 1
    assert "system metrics were not sent, and are lost" in said


def test_without_psutil_the_way_out_is_named(config, monkeypatch):
    monkeypatch.setattr(watched, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"mlflow\.system_metrics: needs psutil.*pip install psutil"):
        check_system_metrics(config)
