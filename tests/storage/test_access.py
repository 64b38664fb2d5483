"""Credentials of a machine's role, errors of TLS, and settings that can't be, for storage on S3."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import urllib3

from pipeline import storage
from pipeline.storage import client as s3_client


class MetadataServer(BaseHTTPRequestHandler):
    """What a machine in a cloud asks for its role's credentials; `busy` answers say 503."""

    busy = 0
    role = "/latest/meta-data/iam/security-credentials/"

    def do_PUT(self):
        self.answer("token")

    def do_GET(self):
        credentials = {
            "AccessKeyId": "testkey",
            "SecretAccessKey": "testsecret",
            "Token": "",
            "Code": "Success",
        }
        credentials["Expiration"] = "2100-01-01T00:00:00Z"
        self.answer("worker" if self.path == self.role else json.dumps(credentials))

    def answer(self, text):
        kind = type(self)
        kind.busy -= kind.busy > 0
        self.send_response(503 if kind.busy else 200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata(s3, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), MetadataServer)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    MetadataServer.busy = 0
    yield MetadataServer
    server.shutdown()
    server.server_close()


def test_a_busy_metadata_service_is_asked_again(metadata):
    metadata.busy = 2
    storage.write_bytes("s3://bucket/role", b"x")
    assert storage.read_bytes("s3://bucket/role") == b"x"


def test_credentials_that_were_not_to_be_had_are_looked_for_anew(metadata):
    metadata.busy = 1000
    with pytest.raises(storage.AccessError, match="no credentials"):
        storage.exists("s3://bucket/role")
    metadata.busy = 0
    storage.write_bytes("s3://bucket/role", b"x")


def test_a_tls_error_in_the_body_of_an_answer_is_tried_again(monkeypatch):
    monkeypatch.setattr(s3_client, "FIRST_WAIT", 0.0)
    answers = iter([urllib3.exceptions.SSLError("decryption failed or bad record mac"), b"whole"])

    def call(client):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert s3_client.request("read", "s3://bucket/x", call) == b"whole"


@pytest.mark.parametrize("name", ["AWS_MAX_ATTEMPTS", "SLOTMATCH_S3_TIMEOUT"])
@pytest.mark.parametrize("value", ["0", "six", "-1", "30s"])
def test_a_setting_that_cannot_be_is_named(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"{name}: '{value}' is not a"):
        storage.exists("s3://bucket/x")
