"""MLflow that goes away, refuses, or is asked by several at once: real servers, really killed."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from clip_sets import random_clips
from mlflow import MlflowClient
from services import MLflowServer
from students import make_finished_run

from pipeline import storage, tracking
from pipeline.clips.library import artifacts_of
from pipeline.distill.stage import distill
from pipeline.registry.stage import register_run
from pipeline.tracking import client as mlflow_client
from pipeline.tracking.client import AccessDenied, ServerUnavailable

# Servers start many times, on machines that may be busy.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RACER = Path(__file__).with_name("register_at_once.py")


@pytest.fixture
def no_kd(tiny, tmp_path, mlflow_server):
    """A config whose student needs neither Ray nor a teacher, and what is made of its clips."""
    clips = random_clips(tmp_path / "root" / "clips" / "c", {f"v{i}": 9 for i in range(4)})
    settings = ["distill.method=no_kd", "distill.steps=24", "distill.checkpoint_every=12"]
    config = tiny(*settings, f"mlflow.tracking_uri={mlflow_server.uri}")
    return config, artifacts_of(config, clips.uri)


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(n, action)`: the training itself does it when it logs that step."""
    actions = {}
    log_metrics = tracking.RunLogger.metrics

    def metrics(logger, values, step):
        actions.pop(step, lambda: None)()
        log_metrics(logger, values, step)

    monkeypatch.setattr(tracking.RunLogger, "metrics", metrics)
    return actions.__setitem__


def assert_all_metrics_arrived(config, summary):
    """Every metric of history.json is in MLflow, once a step."""
    client = tracking.connect(config)
    history = storage.read_json(summary["history"])
    assert [row["step"] for row in history] == list(range(1, 25))
    for name in set(history[0]) - {"step"}:
        logged = client.get_metric_history(summary["mlflow_run"], name)
        assert Counter(m.step for m in logged) == Counter(range(1, 25)), name
        assert {m.step: m.value for m in logged} == {row["step"]: pytest.approx(row[name]) for row in history}
    assert client.get_run(summary["mlflow_run"]).info.status == "FINISHED"


@pytest.mark.fault("MLflow killed, back later", "distill", "training goes on, no metric is lost")
def test_a_server_that_comes_back_gets_what_it_missed(no_kd, mlflow_server, at_step, monkeypatch, capfd):
    config, artifacts = no_kd
    monkeypatch.setattr("pipeline.tracking.runs.SECONDS_BETWEEN_TRIES", 0.1)
    at_step(6, mlflow_server.kill)
    at_step(16, mlflow_server.start)
    summary = distill(config, artifacts)
    said = capfd.readouterr().err
    assert said.count("training goes on") == 1
    assert "is back" in said
    assert_all_metrics_arrived(config, summary)


@pytest.mark.fault("MLflow killed for good", "distill", "the run is published; run again, it is logged")
def test_a_server_that_stays_away_gets_it_from_the_same_command(
    no_kd, mlflow_server, at_step, monkeypatch, capfd
):
    config, artifacts = no_kd
    monkeypatch.setattr(mlflow_client, "SECONDS_TO_WAIT", 0.5)
    at_step(6, mlflow_server.kill)
    summary = distill(config, artifacts)
    assert storage.is_complete(summary["uri"])
    said = capfd.readouterr().err
    assert f"published in {summary['uri']}" in said
    assert "history.json; the same command sends them" in said
    assert distill(config, artifacts)["reused"], "without the server too"
    mlflow_server.start()
    assert distill(config, artifacts)["reused"]
    assert_all_metrics_arrived(config, summary)


@pytest.mark.fault("MLflow is down", "a job's start", "waits, then names the server")
def test_a_job_waits_for_the_server_and_then_names_it(no_kd, mlflow_server, monkeypatch, capfd):
    config, _ = no_kd
    mlflow_server.kill()
    monkeypatch.setattr(mlflow_client, "SECONDS_TO_WAIT", 0.5)
    with pytest.raises(ServerUnavailable, match="same command again") as refused:
        tracking.start_run(config, "somewhere", "name", {})
    assert mlflow_server.uri in str(refused.value)
    monkeypatch.setattr(mlflow_client, "SECONDS_TO_WAIT", 240)
    monkeypatch.setattr(mlflow_client, "SECONDS_BETWEEN_CALLS", 0.1)
    starting = threading.Timer(1, mlflow_server.start)
    starting.start()
    run_id = tracking.start_run(config, "somewhere", "name", {})
    starting.join()
    assert tracking.start_run(config, "somewhere", "name", {}) == run_id
    said = capfd.readouterr().err
    assert f"{mlflow_server.uri} does not answer (Connection refused); waiting for it" in said
    assert f"{mlflow_server.uri} is back" in said


@pytest.mark.fault("MLflow is down", "register", "the student is kept, registered later")
def test_a_student_is_registered_once_the_server_is_there(no_kd, mlflow_server, monkeypatch, tmp_path):
    config, _ = no_kd
    uri = make_finished_run(config, str(tmp_path / "root" / "students" / "late"))
    mlflow_server.kill()
    monkeypatch.setattr(mlflow_client, "SECONDS_TO_WAIT", 0.5)
    with pytest.raises(ServerUnavailable, match=r"python -m jobs\.register") as refused:
        register_run(config, uri, None)
    assert f"the student is kept in {uri}" in str(refused.value)
    mlflow_server.start()
    name = "registered late"
    config = config.model_copy(update={"mlflow": config.mlflow.model_copy(update={"model_name": name})})
    assert [register_run(config, uri, None)["version"] for _ in range(2)] == [1, 1]
    assert len(tracking.connect(config).search_model_versions(f"name = '{name}'")) == 1


@pytest.mark.fault(
    "MLflow killed while a model is stored", "register", "registered later, nothing is there twice"
)
def test_a_server_killed_while_it_stores_a_model(no_kd, mlflow_server, monkeypatch, tmp_path):
    config, artifacts = no_kd
    config = config.model_copy(update={"mlflow": config.mlflow.model_copy(update={"model_name": "cut off"})})
    made_of = {"clips_uri": artifacts.clips.uri}
    uri = make_finished_run(config, str(tmp_path / "root" / "students" / "cut"), **made_of)
    monkeypatch.setattr(mlflow_client, "SECONDS_TO_WAIT", 0.5)
    with monkeypatch.context() as cut:
        finalize = MlflowClient.finalize_logged_model

        def killed(client, *arguments):
            finalize(client, *arguments)
            mlflow_server.kill()

        cut.setattr(MlflowClient, "finalize_logged_model", killed)
        with pytest.raises(ServerUnavailable, match=r"python -m jobs\.register"):
            register_run(config, uri, None)
    mlflow_server.start()
    monkeypatch.setattr(mlflow_client, "SECONDS_TO_WAIT", 120)
    assert [register_run(config, uri, None)["version"] for _ in range(2)] == [1, 1]
    client = MlflowClient(mlflow_server.uri)
    version = client.get_model_version("cut off", "1")
    run = client.get_run(version.run_id)
    assert [one.dataset.digest for one in run.inputs.dataset_inputs] == ["c"]
    (output,) = run.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert [one["version"] for one in json.loads(model.tags["mlflow.modelVersions"])] in ([1], ["1"])
    assert version.source == model.artifact_location
    assert "Load it" in version.description
    stored = list((mlflow_server.folder / "files").rglob("model.safetensors"))
    assert len([path for path in stored if model.model_id in str(path)]) == 1
    same = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{version.run_id}'")
    assert len(same) == 1


@pytest.mark.fault("wrong MLflow password", "a job's start", "fails at once, without saying it")
def test_a_wrong_password_fails_at_once(tiny, tmp_path, monkeypatch):
    pytest.importorskip("flask_wtf", reason="MLflow's logins are not installed (pip install 'mlflow[auth]')")
    settings = tmp_path / "auth.ini"
    settings.write_text(
        "[mlflow]\ndefault_permission = NO_PERMISSIONS\nadmin_username = admin\nadmin_password = adminpassword123\n"
        f"database_uri = sqlite:///{tmp_path / 'auth.db'}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    environment = {"MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_FLASK_SERVER_SECRET_KEY": "k" * 32}
    server = MLflowServer(tmp_path, "--app-name", "basic-auth", **environment)
    server.start()
    try:
        config = tiny(f"mlflow.tracking_uri={server.uri}")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-wrong-password")
        with pytest.raises(AccessDenied, match="wrong user or password") as refused:
            tracking.start_run(config, "somewhere", "name", {})
        assert server.uri in str(refused.value)
        assert "'admin'" in str(refused.value)
        assert "a-wrong-password" not in str(refused.value)

        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "adminpassword123")
        tracking.start_run(config, "somewhere", "name", {})
        from mlflow.server import get_app_client

        get_app_client("basic-auth", tracking_uri=server.uri).create_user("guest", "guestpassword123")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "guest")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "guestpassword123")
        with pytest.raises(AccessDenied, match=r"'guest' \(no permission\)"):
            tracking.start_run(config, "somewhere", "name", {})
    finally:
        server.kill()


@pytest.mark.fault(
    "four jobs register at once, a fifth was killed while it did",
    "register",
    "a version a run, the best is champion",
)
@pytest.mark.parametrize("kind", ["server", "sqlite"])
def test_registering_at_once_loses_nothing(tiny, tmp_path, mlflow_server, kind):
    uri = mlflow_server.uri if kind == "server" else f"sqlite:///{tmp_path / 'mlflow.db'}"
    names = [f"mlflow.model_name=raced {kind}", f"mlflow.tracking_uri={uri}"]
    config = tiny(*names)
    folder = tmp_path / "root" / "students"
    shared = make_finished_run(config, str(folder / "shared"))
    runs = [make_finished_run(config, str(folder / f"run{i}")) for i in range(4)]
    lucky = [make_finished_run(config, str(folder / f"lucky{i}")) for i in range(4)]
    (tmp_path / "config.yaml").write_text(config.to_yaml())

    def start(*arguments):
        command = [sys.executable, RACER, tmp_path / "config.yaml", tmp_path / "go", *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, **pipes)

    dead = start("hold") if kind == "server" else None
    racers = [start("race", shared, runs[i], lucky[i], f"0.{i + 1}") for i in range(4)]
    try:
        if dead:
            assert dead.stdout.readline().strip() == "holds it", dead.stderr.read()
        for racer in racers:
            assert racer.stdout.readline().strip() == "ready", racer.stderr.read()
        if dead:
            dead.kill()
        (tmp_path / "go").touch()
        ended = [racer.communicate(timeout=600) for racer in racers]
    finally:
        for process in (dead, *racers):
            if process:
                process.kill()
    assert [racer.returncode for racer in racers] == [0] * 4, "\n\n".join(e[-1500:] for _, e in ended)
    assert dead is None or any("taking its place" in errors for _, errors in ended)

    client = tracking.connect(config)
    versions = client.search_model_versions(f"name = 'raced {kind}'")
    made_of = Counter(version.tags[tracking.RUN_TAG] for version in versions)
    assert made_of == Counter([shared, *runs])
    best = client.get_model_version_by_alias(f"raced {kind}", "champion")
    assert best.tags[tracking.RUN_TAG] == runs[3]
    # Each process was a sweep as well, whose best student was not its choice.
    swept = client.search_model_versions(f"name = 'raced {kind} swept'")
    assert Counter(version.tags[tracking.RUN_TAG] for version in swept) == Counter([*runs, *lucky])
    best = client.get_model_version_by_alias(f"raced {kind} swept", "champion")
    assert best.tags[tracking.RUN_TAG] == runs[3]
    locks = [model.name for model in client.search_registered_models() if model.name.endswith(".lock")]
    assert locks == []
