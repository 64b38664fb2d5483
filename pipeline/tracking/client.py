"""A client of MLflow that waits for a server that is away, and says who is refused."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pipeline.log import log, redact

SECONDS_TO_WAIT = 120.0  # for a server that is away when a job begins or ends
SECONDS_BETWEEN_CALLS = 2.0  # meanwhile
TRIES_AGAINST_OTHERS = 5  # of a write while other clients write the same
ANSWER_WITHIN, TRANSFER_WITHIN = 20, 600  # seconds: a request, and one that sends or fetches a model
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_T = TypeVar("_T")

# What may be sent again though it may have arrived: reads, and writes that leave the same behind when done twice.
# Not so `create_run`, `create_logged_model` and `create_model_version`, which make something new each time,
# `log_outputs`, which fails when done twice, `log_metric`, which takes the time anew, and `delete_registered_model`, in
# between which and its repetition another job may have taken the name.
READS = frozenset(
    {
        "download_artifacts",
        "get_experiment_by_name",
        "get_logged_model",
        "get_metric_history",
        "get_model_version",
        "get_model_version_by_alias",
        "get_model_version_download_uri",
        "get_registered_model",
        "get_run",
        "list_artifacts",
        "search_experiments",
        "search_logged_models",
        "search_model_versions",
        "search_registered_models",
        "search_runs",
    }
)
IDEMPOTENT_WRITES = frozenset(
    {
        "create_experiment",  # by a name that is unique: done already, it says RESOURCE_ALREADY_EXISTS,
        "create_registered_model",  # for which the caller looks
        "delete_run",
        "finalize_logged_model",
        "log_artifact",
        "log_artifacts",
        "log_batch",  # values come with their step and time
        "log_inputs",  # those that a run has are known by name and digest
        "log_model_artifacts",
        "log_param",
        "rename_registered_model",  # to a name that nothing else gets
        "set_logged_model_tags",
        "set_model_version_tag",
        "set_registered_model_alias",
        "set_tag",
        "set_terminated",
        "update_model_version",
        "update_registered_model",
        "update_run",
    }
)


class ServerUnavailable(RuntimeError):
    """MLflow did not answer for as long as is waited for it."""

    def __init__(
        self,
        problem: str,
        way_out: str = "what was made is kept: give the same command again once it is there",
    ) -> None:
        super().__init__(problem, way_out)
        self.problem, self.way_out = problem, way_out

    def __str__(self) -> str:
        return f"{self.problem}; {self.way_out}"


class AccessDenied(RuntimeError):
    """MLflow refuses the user, or what the user wants to do."""


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def client_of(tracking_uri: str) -> Any:
    """An MlflowClient of a server or database, which is created if it is a new SQLite file.

    Its calls wait for a server that is away.

    Raises (as its calls do):
        ServerUnavailable: it does not answer for `SECONDS_TO_WAIT`.
        AccessDenied: a wrong user, password or permission.
    """
    return PatientClient(plain_client(tracking_uri), tracking_uri)


def plain_client(tracking_uri: str) -> Any:
    """MLflow's own client, which does not wait; errors of a URI that can't be are ValueErrors."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # We try again ourselves: MLflow repeats also what may have been done already, and takes minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault(_TIMEOUT, str(ANSWER_WITHIN))
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.pyfunc"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    if tracking_uri.startswith("file:") or "://" not in tracking_uri:
        raise ValueError(
            f"mlflow.tracking_uri: {tracking_uri!r} is a file store, which MLflow no longer serves; "
            "nearest: sqlite:///PATH/mlflow.db"
        )
    if not tracking_uri.startswith("sqlite:///"):
        return MlflowClient(tracking_uri)
    # Several processes that open a new SQLite database at once break it for good.
    database = Path(tracking_uri.removeprefix("sqlite:///"))
    with _file_lock(database.with_suffix(".lock")):
        made = MlflowClient(tracking_uri)
        if not database.exists():
            log(f"mlflow: creating {database}")
            made.search_experiments(max_results=1)
    return made


def all_pages(search: Callable[..., Any], *arguments: Any, **options: Any) -> Iterator[Any]:
    """Everything that a search of MLflow's finds, which comes a page at a time."""
    token = None
    while True:
        page = search(*arguments, max_results=1000, page_token=token, **options)
        yield from page
        token = page.token
        if not token:
            return


@contextlib.contextmanager
def optional(what: str, done: str = "recorded") -> Iterator[None]:
    """For records that nothing depends on: whatever goes wrong in the block is said, and the job goes on.

    Args:
        what, done: what the block does, with what.
    """
    try:
        yield
    except Exception as error:
        reason = (
            error.problem if isinstance(error, ServerUnavailable) else why_denied(error) or _first_line(error)
        )
        log(f"mlflow: {what} could not be {done} ({reason.removeprefix('mlflow: ')}); the job goes on")


@contextlib.contextmanager
def slow_transfers() -> Iterator[None]:
    """Has MLflow wait longer for answers in the block: a server that passes a file on answers when all is stored.

    `MLFLOW_HTTP_REQUEST_TIMEOUT`, where the user has set it, holds for these too. MLflow reads that variable at each
    request and takes no timeout as an argument of what transfers files, so the whole process has the longer one until
    the last of the blocks, nested or in other threads, has ended; other requests merely wait longer meanwhile.
    """
    _TRANSFERS.begin()
    try:
        yield
    finally:
        _TRANSFERS.end()


class _Transfers:
    """How many blocks of `slow_transfers` are open: the first sets the timeout, the last sets it back."""

    def __init__(self) -> None:
        self._lock, self._open, self._set_by_us = threading.Lock(), 0, False

    def begin(self) -> None:
        with self._lock:
            if self._open == 0:
                self._set_by_us = os.environ.get(_TIMEOUT) in (None, str(ANSWER_WITHIN))
                if self._set_by_us:
                    os.environ[_TIMEOUT] = str(TRANSFER_WITHIN)
            self._open += 1

    def end(self) -> None:
        with self._lock:
            self._open -= 1
            if self._open == 0 and self._set_by_us:
                os.environ[_TIMEOUT] = str(ANSWER_WITHIN)


_TRANSFERS = _Transfers()


class PatientClient:
    """An MlflowClient whose calls wait for a server that is away, see `patiently`.

    `READS` and `IDEMPOTENT_WRITES` are sent again where only the answer may be lost; all else is sent again only where
    it never arrived.
    """

    def __init__(self, plain: Any, uri: str, deadline: float = math.inf) -> None:
        self._plain, self._uri, self._deadline = plain, uri, deadline

    def within(self, seconds: float) -> PatientClient:
        """The same client, whose calls fail as if the server were away once that time is over."""
        return PatientClient(self._plain, self._uri, time.monotonic() + seconds)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            operation = functools.partial(getattr(self._plain, name), *arguments, **options)
            repeat = name in READS or name in IDEMPOTENT_WRITES
            return patiently(self._uri, operation, repeat=repeat, deadline=self._deadline)

        return call


def patiently(
    uri: str, operation: Callable[[], _T], *, repeat: bool = True, deadline: float = math.inf
) -> _T:
    """The result of an operation that needs the server of `uri`, tried again while that is away.

    Tried again, too, is what another client did at the same moment, if both leave the same behind.

    Args:
        repeat: whether to try again what may have arrived, its answer being lost.
        deadline: on `time.monotonic`, after which nothing is tried.

    Raises:
        ServerUnavailable: it does not answer for `SECONDS_TO_WAIT`.
        AccessDenied: a wrong user, password or permission.
    """
    shown, started, waiting, raced = redact(uri), time.monotonic(), False, 0
    while True:
        if time.monotonic() > deadline:
            raise ServerUnavailable(f"mlflow: {shown} answers too slowly")
        try:
            result = operation()
        except Exception as error:
            reason = why_denied(error)
            if reason:
                user = os.environ.get("MLFLOW_TRACKING_USERNAME")
                raise AccessDenied(
                    f"mlflow: {shown} refuses {f'the user {user!r}' if user else 'users without a name'} ({reason}); "
                    "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or ask for the permission"
                ) from None
            if repeat and _is_raced(error) and raced < TRIES_AGAINST_OTHERS:
                raced += 1
                continue
            if not _is_away(error):
                raise
            reason, waited = in_words(error), time.monotonic() - started
            if waited >= SECONDS_TO_WAIT or not (repeat or _never_arrived(error)):
                raise ServerUnavailable(
                    f"mlflow: {shown} does not answer ({reason}), waited {waited:.0f} s for it"
                ) from None
            if not waiting:
                log(
                    f"mlflow: {shown} does not answer ({reason}); waiting for it, {SECONDS_TO_WAIT:g} s at most"
                )
            waiting = True
        else:
            if waiting:
                log(f"mlflow: {shown} is back")
            return result
        time.sleep(min(SECONDS_BETWEEN_CALLS, SECONDS_TO_WAIT))


def error_code(error: Exception) -> str:
    """MLflow's code of an error (`RESOURCE_DOES_NOT_EXIST`); empty where it has none."""
    return str(getattr(error, "error_code", ""))


def _status(error: Exception) -> int | None:
    """The HTTP status that stands behind an error; None where no request was answered."""
    from mlflow.exceptions import MlflowException, RestException

    answered = getattr(getattr(error, "response", None), "status_code", None)
    if answered is not None:
        return int(answered)
    # MLflow calls everything that went wrong on the way INTERNAL_ERROR, which is 500.
    if isinstance(error, RestException) or error_code(error) not in ("", "INTERNAL_ERROR"):
        return int(error.get_http_status_code()) if isinstance(error, MlflowException) else None
    code = re.search(r"error code (\d{3})|too many (\d{3}) error responses", str(error))
    return int(code[1] or code[2]) if code else None


def why_denied(error: Exception) -> str:
    """Why the user is refused, where that is what an error says; else empty."""
    if _status(error) not in (401, 403):
        return ""
    return "wrong user or password" if _status(error) == 401 else "no permission"


def _is_away(error: Exception) -> bool:
    from requests.exceptions import RequestException

    status = _status(error)
    if error_code(error) == "TEMPORARILY_UNAVAILABLE" and "sqlite3" in str(error):
        return "locked" in str(error)  # nothing else passes by itself
    if status is not None:
        return status in (408, 429, 502, 503, 504)
    return isinstance(error, RequestException) or "API request to" in str(error)


def _is_raced(error: Exception) -> bool:
    """Whether another client made the same row between MLflow's look for it and its own: the next look finds it."""
    said = "UNIQUE constraint failed|duplicate key value|Duplicate entry"  # SQLite, PostgreSQL, MySQL
    return error_code(error) != "RESOURCE_ALREADY_EXISTS" and re.search(said, str(error)) is not None


def _never_arrived(error: Exception) -> bool:
    return re.search("NewConnectionError|ConnectTimeout|NameResolutionError|locked", str(error)) is not None


def in_words(error: Exception) -> str:
    """What went wrong on the way to a server, in a few words."""
    known = re.search(r"\[Errno -?\d+\] ([^'\")]+)|(timed out)|(Connection aborted)", str(error))
    if known:
        return next(filter(None, known.groups())).strip()
    status = _status(error)
    return f"HTTP {status}" if status else _first_line(error)


def _first_line(error: Exception) -> str:
    return redact(next(iter(str(error).splitlines()), type(error).__name__)[:200])
