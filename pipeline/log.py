"""What a job says: lines and progress on stderr, without secrets, and which error is behind one of Ray's.

Progress is a live line on a terminal, a line every few seconds elsewhere. Secrets are taken out of whatever a person
or a server gets to read: logs, errors, tags.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any
from urllib.parse import quote

SECONDS_BETWEEN_LINES = 5.0


def log(message: str) -> None:
    """Writes a line to stderr, without the secrets that an error's text may hold."""
    # Not `print`, which Ray Train takes over in its workers and says twice.
    sys.stderr.write(redact(message) + "\n")
    sys.stderr.flush()


class Progress:
    """Counts work done: `42/400 videos, 11.2 videos/s, 32 s left`.

    `total` may be None where it is not known. Use as a context manager; the last line says how long
    it took.
    """

    def __init__(self, label: str, total: int | None, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self._start = time.monotonic()
        self._skipped = 0
        self._last = self._start
        self._live = sys.stderr.isatty()

    def skip(self, count: int) -> None:
        """Counts work that was found done, and keeps it out of the rate."""
        self.done += count
        self._skipped += count

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        now = time.monotonic()
        if now - self._last >= (0.2 if self._live else SECONDS_BETWEEN_LINES):
            self._last = now
            self._print(note, end="" if self._live else "\n")

    def _rate(self) -> float:
        return (self.done - self._skipped) / max(time.monotonic() - self._start, 1e-6)

    def _print(self, note: str, end: str) -> None:
        rate = self._rate()
        text = f"{self.label}: {self.done}" + (f"/{self.total}" if self.total is not None else "")
        text += f" {self.unit}, {rate:.3g} {self.unit}/s"
        if self.total is not None and rate > 0:
            text += f", {(self.total - self.done) / rate:.0f} s left"
        text += f", {note}" if note else ""
        sys.stderr.write(("\r\x1b[2K" if self._live else "") + redact(text) + end)
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, exception_type: object, *_: object) -> None:
        if self._live:
            sys.stderr.write("\r\x1b[2K")
        word = "stopped" if exception_type else "done"
        seconds = time.monotonic() - self._start
        log(f"{self.label}: {word}, {self.done} {self.unit} in {seconds:.1f} s")


_SURROGATE = re.compile("[\ud800-\udfff]")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def is_storable(text: str) -> bool:
    """Whether Parquet, JSON and servers can hold a text: a file's name may have bytes in it that are no UTF-8."""
    return _SURROGATE.search(text) is None


def printable(text: str) -> str:
    """A text of one line that can be stored and shown; bytes that are no UTF-8 become `\\xe9`."""
    return _UNPRINTABLE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte that is no UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}"


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
    re.compile(r"(\bhf_)[A-Za-z0-9]{30,}"),  # a token of the Hugging Face Hub, from wherever it was read
    re.compile(r"(\bAuthorization['\"]?\s*[:=]\s*['\"]?)[^'\"\n]+", re.IGNORECASE),
)


def redact(text: str) -> str:
    """The text without the values of secret environment variables, passwords in URLs and signatures.

    What no server and no file in UTF-8 can hold is escaped (see `is_storable`).
    """
    text = _SURROGATE.sub(_escaped, text)
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


def root_cause(error: BaseException) -> BaseException:
    """The error behind those that Ray wraps around what its workers raise; Ray's own where there is none."""
    seen: set[int] = set()
    while _is_of_ray(error) and id(error) not in seen:
        seen.add(id(error))
        error = _wrapped(error) or error
    return error


def _is_of_ray(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] == "ray"


def _wrapped(error: BaseException) -> BaseException | None:
    """What one of Ray's errors is about, by the names that they have for it."""
    if failures := getattr(error, "worker_failures", None):
        return _telling(failures.values())
    for inner in (*(getattr(error, name, None) for name in _CAUSES), error.__cause__):
        # Ray Data says by one without words that an error is not the user's.
        if isinstance(inner, BaseException) and (str(inner) or not _is_of_ray(inner)):
            return inner
    return None


_CAUSES = ("cause", "controller_failure", "_base_exc")  # of tasks; of Ray Train's controller and its workers
_LOST_PEER = re.compile(r"gloo|nccl", re.IGNORECASE)


def _telling(failures: Iterable[BaseException]) -> BaseException:
    """The failure that ended the others: those that only miss their peers come last."""
    causes = [root_cause(failure) for failure in failures]
    return next((cause for cause in causes if not _LOST_PEER.search(str(cause))), causes[0])
