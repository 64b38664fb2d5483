"""A real MLflow server that can be killed and started again; a second S3 server, which is strict."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class MLflowServer:
    """`mlflow server` on loopback, with its database and files in a folder; always at the same address."""

    def __init__(self, folder, *arguments, **environment):
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        self._command += ["--port", str(self.port), "--workers", "1", *arguments]
        self._command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
        self._command += ["--artifacts-destination", str(folder / "files")]
        # Runners of jobs that nobody gives it take more to start than the server itself.
        self._environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **environment}
        self._process = None

    def start(self):
        """Returns once it answers; nothing where it runs already."""
        if self._process is not None:
            return
        with open(self.folder / "log", "ab") as log:
            pipes = {"stdout": log, "stderr": log, "cwd": self.folder, "start_new_session": True}
            environment = {**os.environ, **self._environment}
            self._process = subprocess.Popen(self._command, env=environment, **pipes)
        end = time.monotonic() + 400
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"mlflow server: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.1)

    def _answers(self):
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=5)
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True

    def kill(self):
        """SIGKILL of the server with all its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(20)
            self._process = None


class MotoServer:
    """moto's S3 in a thread of this process, with an empty `bucket`: use as a context manager.

    Unlike rclone's it heeds conditions of writes, and refuses an upload whose parts, but for the last, have fewer than
    `least` bytes.
    """

    def __init__(self, least):
        from moto import settings
        from moto.s3 import models
        from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        settings.S3_UPLOAD_PART_MIN_SIZE = models.S3_UPLOAD_PART_MIN_SIZE = least
        app, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

        def one_at_a_time(environ, start_response):
            # It looks whether a condition holds and writes then, which is one step on a real server.
            with lock:
                return [b"".join(app(environ, start_response))]

        class Silent(MotoRequestHandler):
            def log(self, *_):
                pass

        self._server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True, request_handler=Silent)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/bucket", method="PUT"))
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
