"""The whole line on a real S3 server, and on a real MLflow server."""

import os
import subprocess
import sys
import time
import urllib.request

import pytest

from pipeline import storage, tracking
from pipeline.models import load_slot_model
from pipeline.registry import pull
from pipeline.storage import join


def _free_port():
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("mlflow"), _free_port()
    uri = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ.copy(), start_new_session=True
        )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.25)
        else:
            pytest.fail(f"the MLflow server did not start: {(folder / 'log').read_text()[-2000:]}")
        yield uri
    finally:
        os.killpg(process.pid, 15)
        process.wait(20)


def test_the_whole_line_on_s3_with_an_mlflow_server(tiny, job, s3, mlflow_server, tmp_path):
    root = join(s3, "runs")
    config = tiny(f"storage.root={root}", f"mlflow.tracking_uri={mlflow_server}", "distill.workers=1")
    first = job("pipeline", config).finish()
    assert first["clips"].startswith(root)
    assert first["targets"].startswith(root)
    for name in storage.list_names(join(root, "students")):
        assert storage.is_complete(join(root, "students", name))
    assert storage.list_names(join(root, "ray")) == []
    version = tracking.client(config).get_model_version_by_alias("slotmatch", "champion")
    assert int(version.version) in first["versions"]
    pull("models:/slotmatch@champion", tmp_path / "champion", mlflow_server)
    load_slot_model(tmp_path / "champion")
    second = job("pipeline", config).finish()
    assert all(second["reused"].values())
