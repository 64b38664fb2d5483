"""What failed in a worker, behind whatever Ray wraps around it. Ray is imported, not started."""

import errno
import pickle
import threading

import pytest
import ray.exceptions
from ray.data.exceptions import RayDataUserCodeException, SystemException
from ray.exceptions import ActorDiedError, RayTaskError, TaskCancelledError, UserCodeException
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from jobs._main import _failure
from pipeline import storage
from pipeline.clips.stage import TooManyBadVideos
from pipeline.compute import _packed, _run_task, _unpacked
from pipeline.log import root_cause

FULL = OSError(errno.ENOSPC, "No space left on device")
LOST = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:7482")


def of_task(cause):
    """What a task's error is before it travels."""
    return RayTaskError(
        "ray::f", "Traceback (most recent call last):\nOSError", cause, "ray::f", 1, "127.0.0.1"
    )


def caused(error, cause):
    error.__cause__ = cause
    return error


WRAPPED = {
    "a task": of_task(FULL),
    "a task, as it is raised": of_task(FULL).as_instanceof_cause(),
    "a task in a task": of_task(of_task(FULL).as_instanceof_cause()),
    "Ray Data's user code": caused(UserCodeException("UDF failed to process a data block."), FULL),
    "Ray Data's user code in a task": of_task(caused(RayDataUserCodeException("UDF failed"), FULL)),
    "Ray Data, which says it was not the user": caused(
        of_task(FULL).as_instanceof_cause(), SystemException()
    ),
    "a Train worker": WorkerGroupError("words", {0: FULL}),
    "a Train worker, which lost no time": WorkerGroupError("words", {0: LOST, 1: of_task(FULL)}),
    "a Train worker with its traceback": WorkerGroupError(
        "words", {3: UserExceptionWithTraceback(FULL, "Trace")}
    ),
    "a Train controller": ControllerError(of_task(FULL)),
    "a Train worker in a Tune trial": of_task(WorkerGroupError("words", {0: of_task(FULL)})),
}


@pytest.mark.parametrize("error", WRAPPED.values(), ids=WRAPPED)
def test_the_inner_error_is_what_is_said(error, capsys):
    assert root_cause(error) is FULL
    said = {"status": "failed", "error": "[Errno 28] No space left on device"}
    assert _failure("shard", error) == said
    assert capsys.readouterr().err.splitlines()[-1] == "error: [Errno 28] No space left on device"


def test_an_error_that_travelled_is_found(capsys):
    travelled = ray.exceptions.RayError.from_bytes(of_task(FULL).to_bytes())
    found = root_cause(travelled.as_instanceof_cause())
    assert (type(found), str(found)) == (OSError, str(FULL))


@pytest.mark.parametrize(
    "error",
    [
        caused(ActorDiedError(), SystemException()),
        ActorDiedError(),
        TaskCancelledError(),
        WorkerGroupError("a node was lost", {}),
        caused(RuntimeError("in our words"), of_task(FULL)),
        FULL,
    ],
    ids=repr,
)
def test_an_error_with_nothing_behind_it_keeps_its_words(error):
    assert root_cause(error) is error


def test_all_workers_that_miss_each_other_are_said_to():
    assert root_cause(WorkerGroupError("words", {0: LOST, 1: RuntimeError("NCCL error")})) is LOST


def test_an_error_without_words_is_called_by_its_kind(capsys):
    assert _failure("shard", of_task(AssertionError()))["error"] == "AssertionError"


# --- how an error of a task comes back -------------------------------------------------------------------


class Awkward(Exception):
    """Pickles, and can't be made again, as many libraries' errors."""

    def __init__(self, code, reason):
        super().__init__(f"{code}: {reason}")


class Unpicklable(Exception):
    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


class Wordy(Exception):
    """Is made of its reason, not of its words."""

    def __init__(self, reason):
        super().__init__(f"it failed: {reason}")


def raises(row, error):
    raise error


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OSError, str(FULL)),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            PermissionError,
            "[Errno 13] Permission denied: '/x'",
        ),
        (
            storage.UnavailableError("s3://b/k: read failed 6 times"),
            storage.UnavailableError,
            "s3://b/k: read failed 6 times",
        ),
        (TooManyBadVideos("3 of 4"), TooManyBadVideos, "3 of 4"),
        (KeyError("name"), KeyError, "'name'"),
        (Awkward(3, "why"), RuntimeError, "Awkward: 3: why"),
        (Unpicklable("held"), RuntimeError, "Unpicklable: held"),
        (Wordy("why"), RuntimeError, "Wordy: it failed: why"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value)[:20],
)
def test_the_error_of_a_task_comes_back_whole(error, expected, words):
    answer = _run_task({"row": "{}"}, raises, (error,))
    back = _unpacked(answer["error"])
    assert (type(back), str(back)) == (expected, words)
    assert root_cause(back) is back
    assert "in raises\n" in back.__notes__[0], "where it was raised, for the traceback that is logged"


def test_a_task_that_ends_well():
    assert _run_task({"row": '{"a": 1}'}, lambda row, more: {**row, "b": more}, (2,)) == {
        "result": '{"a": 1, "b": 2}',
        "error": "",
    }
    assert pickle.loads(pickle.dumps(_unpacked(_packed(ValueError("x"))))).args == ("x",)
