"""Secrets are taken out of whatever a person or a server gets to read: logs, errors, tags."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any
from urllib.parse import quote

HIDDEN = "***"
_SHORTEST = 6  # letters of a value that is replaced: "true" and "1234" would be found in every other word

_SECRET_NAME = re.compile(
    r"(?:^|_)(?:PASSWORD|PASSWD|PASSPHRASE|TOKEN|SECRET|SECRET_KEY|ACCESS_KEY|ACCESS_KEY_ID|API_KEY|CREDENTIALS)$"
    r"|^PGPASSWORD$",
    re.IGNORECASE,
)
_PATTERNS = (
    re.compile(r"(\w[\w+.-]*://[^\s/:@'\"]*:)[^\s/'\"]+(?=@)"),  # scheme://user:password@
    re.compile(r"((?:X-Amz-(?:Signature|Credential|Security-Token))=)[^\s&'\"]+", re.IGNORECASE),
    re.compile(r"([?&](?:password|passwd|token|secret|access_token|api_key)=)[^\s&'\"]+", re.IGNORECASE),
    re.compile(r"(\bAuthorization['\"]?\s*[:=]\s*['\"]?)[^'\"\n]+", re.IGNORECASE),
)


def redact(text: str) -> str:
    """The text without the values of secret environment variables, passwords in URLs and signatures."""
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return text


def _secrets() -> list[str]:
    """As they are and as they stand in URLs, the longest first: one may be part of another."""
    values = {v for k, v in os.environ.items() if len(v) >= _SHORTEST and _SECRET_NAME.search(k)}
    return sorted(values | {quote(v, safe="") for v in values}, key=len, reverse=True)


def redacted(values: Any) -> Any:
    """Plain values (as of JSON) with every text in them redacted."""
    if isinstance(values, str):
        return redact(values)
    if isinstance(values, Mapping):
        return {redacted(key): redacted(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [redacted(value) for value in values]
    return values


def has_password(uri: str) -> bool:
    """Whether a URI holds a secret; one that has only a user's name doesn't."""
    return any(pattern.search(uri) for pattern in _PATTERNS)


def traceback_text(error: BaseException) -> str:
    """A traceback as Python prints it, redacted."""
    return redact("".join(traceback.format_exception(error)))


def redact_output() -> None:
    """Has what other libraries log in this process, and errors that nobody catches, redacted as well."""
    if sys.excepthook is _uncaught:
        return  # done already
    sys.excepthook = _uncaught
    make = logging.getLogRecordFactory()

    def record(*arguments: Any, **options: Any) -> logging.LogRecord:
        made = make(*arguments, **options)
        try:
            made.msg, made.args = redact(made.getMessage()), None
        except (TypeError, ValueError):
            return made  # a message that doesn't fit its arguments, which logging reports
        if made.exc_info and made.exc_info[1] is not None:
            made.exc_text = traceback_text(made.exc_info[1]).rstrip()
        return made

    logging.setLogRecordFactory(record)


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(traceback_text(error))
