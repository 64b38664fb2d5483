"""Requests to S3, each tried a bounded number of times, failing with an error that says what and who.

The client is botocore's, with its own retries off: ours also cover the body of an answer, so that they are
the only ones and don't multiply. Everything is set by the standard AWS environment variables;
`AWS_MAX_ATTEMPTS` changes how often a request is tried, `SLOTMATCH_S3_TIMEOUT` after how many seconds without
a byte it counts as failed.
"""

from __future__ import annotations

import functools
import logging
import os
import random
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from pipeline.log import is_storable, log, printable
from pipeline.storage.errors import AccessError, MissingBucketError, StorageError, UnavailableError

TRIES = 6
FIRST_WAIT, WAIT_FACTOR, LONGEST_WAIT = 0.2, 3.0, 20.0  # seconds: 0.2, 0.6, 1.8, 5.4, 16.2; then 20
CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 30.0  # seconds
# How often a node's credentials are asked for, where the machine has a role: by default once, within a second,
# which is too little when all workers of a node begin at once.
METADATA_TRIES, METADATA_TIMEOUT = 3, 2
_CONNECTIONS = 32
_T = TypeVar("_T")

_TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
_TRANSIENT_CODES = {
    "BandwidthLimitExceeded",
    "ConditionalRequestConflict",  # another is writing the same object
    "IncompleteBody",  # an upload was cut
    "InternalError",
    "OperationAborted",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "XAmzContentSHA256Mismatch",  # or arrived damaged
}
_REFUSED_STATUS = (401, 403)
_REFUSED_CODES = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired"}  # which come as a 400


class _Connection(NamedTuple):
    client: Any
    session: Any


def _connect() -> _Connection:
    # Whoever changes the environment, as with new credentials, gets a client of its own.
    return _connection(
        tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_"))), timeout()
    )


@functools.lru_cache(maxsize=4)
def _connection(environment: tuple[tuple[str, str], ...], read_timeout: float) -> _Connection:
    import botocore.session
    from botocore.config import Config

    # Ray's workers show what it says at INFO: where it has found its settings.
    logging.getLogger("botocore").setLevel(logging.WARNING)
    session = botocore.session.get_session()
    for variable, value in (
        ("metadata_service_num_attempts", METADATA_TRIES),
        ("metadata_service_timeout", METADATA_TIMEOUT),
    ):
        if f"AWS_{variable.upper()}" not in os.environ:
            session.set_config_variable(variable, value)
    config = Config(
        retries={"total_max_attempts": 1, "mode": "standard"},
        max_pool_connections=_CONNECTIONS,
        **settings(read_timeout),
    )
    return _Connection(session.create_client("s3", config=config), session)


# A child must not talk over the sockets of its parent.
os.register_at_fork(after_in_child=_connection.cache_clear)


def settings(read_timeout: float) -> dict[str, Any]:
    return {
        "connect_timeout": CONNECT_TIMEOUT,
        "read_timeout": read_timeout,
        # Servers other than AWS answer a ranged read with the whole object's checksum, which never matches.
        "response_checksum_validation": "when_required",
        "request_checksum_calculation": "when_required",
    }


def tries() -> int:
    """How often a request is tried at most.

    Raises:
        ValueError: `AWS_MAX_ATTEMPTS` is no whole number above 0.
    """
    text = os.environ.get("AWS_MAX_ATTEMPTS") or str(TRIES)
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"AWS_MAX_ATTEMPTS: {text!r} is not a whole number above 0")
    return int(text)


def timeout() -> float:
    """Seconds without a byte after which a request has failed.

    Raises:
        ValueError: `SLOTMATCH_S3_TIMEOUT` is no number above 0.
    """
    text = os.environ.get("SLOTMATCH_S3_TIMEOUT") or str(READ_TIMEOUT)
    if not re.fullmatch(r"\d+\.?\d*", text) or not float(text):
        raise ValueError(f"SLOTMATCH_S3_TIMEOUT: {text!r} is not a number of seconds above 0, such as 30")
    return float(text)


def split(uri: str) -> tuple[str, str]:
    """Bucket and key.

    Raises:
        ValueError: bytes that are no UTF-8, such as a word of the command line may have.
    """
    if not is_storable(uri):
        raise ValueError(
            f"storage '{printable(uri)}': it has bytes that are no UTF-8, which no name on S3 has"
        )
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def request(operation: str, uri: str, call: Callable[[Any], _T]) -> _T:
    """`call(client)`, which must be idempotent, tried again where that may help.

    Args:
        operation: what a message calls it: read, write, list, delete.

    Raises:
        FileNotFoundError: there is no such object, or MissingBucketError: no such bucket.
        AccessError: permission or credentials.
        UnavailableError: the last try failed as well.
        StorageError: the server takes no such request.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    most = tries()
    for number in range(1, most + 1):
        try:
            return call(_connect().client)
        except (BotoCoreError, ClientError, ResponseParserError, HTTPError, OSError) as error:
            if not _is_transient(error):
                failure = _permanent(error, operation, uri)
                if _is_about_credentials(error):
                    _connection.cache_clear()  # a client that found none never looks again
                raise failure from error
            if number == most:
                raise UnavailableError(
                    f"{uri}: {operation} failed {most} times at {endpoint()}, last with: {_reason(error)}"
                ) from error
            wait = min(LONGEST_WAIT, FIRST_WAIT * WAIT_FACTOR ** (number - 1)) * random.uniform(0.5, 1)
            if number > 1:  # one failure now and then is nothing to report
                log(
                    f"storage: {operation} {uri}: {_reason(error)}; try {number + 1} of {most} in {wait:.1f} s"
                )
            time.sleep(wait)
    raise AssertionError


def status(error: BaseException) -> int:
    return int(getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code(error: BaseException) -> str:
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))


def _is_transient(error: BaseException) -> bool:
    from botocore.exceptions import (
        ClientError,
        ConnectionError,
        HTTPClientError,
        IncompleteReadError,
    )
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError  # of the body of an answer, as from TLS

    if isinstance(error, ClientError):
        return status(error) in _TRANSIENT_STATUS or code(error) in _TRANSIENT_CODES
    network = (ConnectionError, HTTPClientError, IncompleteReadError, ResponseParserError, HTTPError, OSError)
    return isinstance(error, network)


def _reason(error: BaseException) -> str:
    """`503 SlowDown (Please reduce your request rate)`, or what the network said."""
    from botocore.exceptions import ClientError

    if not isinstance(error, ClientError):
        text = re.sub(r'( from| on| to the)? endpoint URL: "[^"]*"', "", str(error))  # which is said anyway
        return text.rstrip(".")
    message = error.response.get("Error", {}).get("Message", "")
    # The answer to a HEAD has its number for a code.
    words = [str(status(error)), code(error)] if code(error) != str(status(error)) else [code(error)]
    return " ".join(words) + (f" ({message})" if message else "")


def _permanent(error: BaseException, operation: str, uri: str) -> OSError:
    from botocore.exceptions import ClientError

    bucket, reason = split(uri)[0], _reason(error)
    if isinstance(error, ClientError):
        if code(error) == "NoSuchBucket":
            return MissingBucketError(
                f"{uri}: {operation} failed: there is no bucket {bucket!r} at {endpoint()}, as {_identity()}"
            )
        if status(error) == 404 or code(error) in ("NoSuchKey", "NoSuchUpload"):
            return FileNotFoundError(f"there is nothing at {uri}")
        if status(error) in _REFUSED_STATUS or code(error) in _REFUSED_CODES:
            return AccessError(f"{uri}: {operation} refused by {endpoint()} with {reason}, as {_identity()}")
    elif _is_about_credentials(error):
        return AccessError(f"{uri}: {operation} failed at {endpoint()}: {reason}; {_identity()}")
    return StorageError(f"{uri}: {operation} failed at {endpoint()}: {reason}, as {_identity()}")


def _is_about_credentials(error: BaseException) -> bool:
    from botocore import exceptions

    return isinstance(
        error,
        (
            exceptions.NoCredentialsError,
            exceptions.PartialCredentialsError,
            exceptions.CredentialRetrievalError,
            exceptions.ProfileNotFound,
            exceptions.SSOError,
        ),
    )


def endpoint() -> str:
    try:
        return str(_connect().client.meta.endpoint_url)
    except Exception:  # what is wrong with it is being reported
        return os.environ.get("AWS_ENDPOINT_URL") or "AWS"


def _identity() -> str:
    """Whom a request was made as: never more of a key than its last four characters."""
    from botocore.exceptions import BotoCoreError

    try:
        session = _connect().session
        credentials = session.get_credentials()
    except BotoCoreError as error:
        return f"no credentials: {error}"
    if credentials is None:
        return "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    sources = {
        "env": "AWS_ACCESS_KEY_ID",
        "shared-credentials-file": f"profile {session.profile or 'default'}",
        "config-file": f"profile {session.profile or 'default'}",
    }
    return (
        f"access key …{credentials.access_key[-4:]} ({sources.get(credentials.method, credentials.method)})"
    )
