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
# Letters of a value that is replaced: "true" and "1234" would be found in every other word. The key's id is
# no secret and may be a word, such as the bucket's name; those of AWS are hidden all the same.
_SHORTEST, _SHORTEST_KEY_ID = 6, 16

_SECRET_NAME = re.compile(
    r"(?:^|_)(?:PASSWORD|PASSWD|PASSPHRASE|TOKEN|SECRET|SECRET_KEY|ACCESS_KEY|ACCESS_KEY_ID|API_KEY|CREDENTIALS)$"
    r"|^PGPASSWORD$",
    re.IGNORECASE,
)
_PATTERNS = (
    # scheme://user:password@, but not scheme://host:port/…@…
    re.compile(r"(\w[\w+.-]*://[^\s/:@'\"]*:)(?!\d+[/,;)])[^\s'\"]+(?=@)"),
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
    values = {v for k, v in os.environ.items() if _SECRET_NAME.search(k) and len(v) >= _shortest(k)}
    return sorted(values | {quote(v, safe="") for v in values}, key=len, reverse=True)


def _shortest(variable: str) -> int:
    return _SHORTEST_KEY_ID if variable.upper().endswith("ACCESS_KEY_ID") else _SHORTEST


def redacted(values: Any) -> Any:
    """Plain values (as of JSON) with every text in them redacted, but for the keys of mappings."""
    if isinstance(values, str):
        return redact(values)
    if isinstance(values, Mapping):
        return {key: redacted(value) for key, value in values.items()}
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
