"""Progress of long work on stderr: a live line on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time

from pipeline.redact import redact

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
