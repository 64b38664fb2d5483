"""Which calls to MLflow are sent again, and how long they may take; test_mlflow_faults has real servers."""

import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from requests.exceptions import ConnectionError, ReadTimeout

from pipeline.registry import lock
from pipeline.tracking import client
from pipeline.tracking.client import (
    IDEMPOTENT_WRITES,
    READS,
    PatientClient,
    ServerUnavailable,
    client_of,
    slow_transfers,
)

NEVER_TWICE = ("create_run", "create_model_version", "log_metric", "delete_registered_model", "some_new_call")
TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(client, "SECONDS_BETWEEN_CALLS", 0)


class Plain:
    """A client whose calls fail as given, one error a call, and then succeed."""

    def __init__(self, *errors):
        self.errors, self.calls = list(errors), []

    def __getattr__(self, name):
        def call(*_, **__):
            self.calls.append(name)
            if self.errors:
                raise self.errors.pop(0)
            return "answer"

        return call


def test_the_calls_that_are_sent_again_are_mlflows():
    assert [name for name in READS | IDEMPOTENT_WRITES if not hasattr(MlflowClient, name)] == []


@pytest.mark.parametrize("name", sorted(READS | IDEMPOTENT_WRITES))
def test_a_lost_answer_is_asked_for_again_where_that_is_harmless(name):
    plain = Plain(ReadTimeout("Read timed out"), ReadTimeout("Read timed out"))
    assert getattr(PatientClient(plain, "http://server"), name)() == "answer"
    assert plain.calls == [name] * 3


@pytest.mark.parametrize("name", NEVER_TWICE)
def test_all_else_is_sent_once_unless_it_never_arrived(name):
    plain = Plain(ConnectionError("NewConnectionError: refused"), ReadTimeout("Read timed out"))
    with pytest.raises(ServerUnavailable, match="timed out"):
        getattr(PatientClient(plain, "http://server"), name)()
    assert plain.calls == [name] * 2


def test_a_registry_lock_is_not_deleted_twice():
    """The first deletion arrives, its answer does not, and another job takes the lock."""

    class Registry:
        holder = None

        def create_registered_model(self, name, description):
            self.holder = description

        def get_registered_model(self, name):
            if self.holder is None:
                raise MlflowException("gone", error_code=5)  # RESOURCE_DOES_NOT_EXIST
            return type("Model", (), {"description": self.holder})

        def delete_registered_model(self, name):
            assert self.holder != other
            self.holder = other
            raise ReadTimeout("Read timed out")

    registry, other = Registry(), f"{lock._NOTE}another job"
    with lock.registry_lock(PatientClient(registry, "http://server"), "model"):
        assert registry.holder != other
    assert registry.holder == other


# --- transfers ------------------------------------------------------------------------------------------------


def test_the_longer_timeout_holds_until_the_last_transfer_ends(monkeypatch):
    monkeypatch.setenv(TIMEOUT, str(client.ANSWER_WITHIN))
    in_block, may_end = threading.Event(), threading.Event()

    def transfer():
        with slow_transfers():
            in_block.set()
            may_end.wait(20)

    other = threading.Thread(target=transfer)
    with slow_transfers():
        other.start()
        assert in_block.wait(20)
        with slow_transfers():
            pass
        assert os.environ[TIMEOUT] == str(client.TRANSFER_WITHIN)
    assert os.environ[TIMEOUT] == str(client.TRANSFER_WITHIN), "the other thread still sends"
    may_end.set()
    other.join()
    assert os.environ[TIMEOUT] == str(client.ANSWER_WITHIN)


@pytest.mark.parametrize("own", ["77", str(client.TRANSFER_WITHIN)])
def test_a_timeout_that_the_user_has_set_holds_for_transfers_too(monkeypatch, own):
    monkeypatch.setenv(TIMEOUT, own)
    with slow_transfers(), slow_transfers():
        assert os.environ[TIMEOUT] == own
    assert os.environ[TIMEOUT] == own


@pytest.mark.parametrize(
    "said",
    [
        "(sqlite3.IntegrityError) UNIQUE constraint failed: tags.key, tags.run_uuid",
        'duplicate key value violates unique constraint "tag_pk"',
        "(1062, \"Duplicate entry 'a-b' for key 'tags.PRIMARY'\")",
    ],
)
def test_what_another_client_writes_at_the_same_moment_is_written_again(said):
    raced = MlflowException(said, error_code=BAD_REQUEST)
    plain = Plain(raced, raced)
    assert PatientClient(plain, "http://server").set_tag("run", "key", "value") == "answer"
    assert plain.calls == ["set_tag"] * 3
    with pytest.raises(MlflowException, match=re.escape(said)):
        PatientClient(Plain(raced), "http://server").create_run("0")
    for_ever = Plain(*[raced] * 100)
    with pytest.raises(MlflowException, match=re.escape(said)):
        PatientClient(for_ever, "http://server").set_tag("run", "key", "value")
    assert len(for_ever.calls) < 10


def test_clients_that_set_the_same_tags_at_once_all_succeed(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    mlflow = client_of(uri)
    run_id = mlflow.create_run("0").info.run_id
    together = threading.Barrier(4)

    def tag_it(_):
        own = client_of(uri)
        for i in range(8):
            together.wait(30)
            own.set_tag(run_id, f"tag {i}", "value")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(tag_it, range(4)))
    assert {f"tag {i}" for i in range(8)} <= set(mlflow.get_run(run_id).data.tags)
