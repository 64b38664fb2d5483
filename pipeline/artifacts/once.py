"""Making a folder once: it is found, or one job at a time fills it.

The lease is a note in the folder, which the job renews while it works. Where storage heeds conditions of writes (S3's
`If-None-Match` and `If-Match`, locks of a local file system) one job alone can have it; elsewhere two that come within
a moment may both work. So may a job that was silent for `ABANDONED_AFTER` seconds beside the one that took its place,
so publishing doesn't rely on it: whatever two jobs do at once, what they publish is whole and, but for the rounding of
GPUs, equal. The lease keeps them from doing work twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from pipeline import storage
from pipeline.config import ConfigError
from pipeline.log import log

# Of a published folder the files that it can't do without, by their paths in it.
Files = Callable[[str], Collection[str]]

LEASE_FILE = "lease.json"
INPUTS_FILE = "inputs.json"
RENEWED_EVERY = 5.0  # seconds
# Seconds without a renewal, on the waiter's own clock: a renewal is two requests, each of which may stall once for
# `SLOTMATCH_S3_TIMEOUT`.
ABANDONED_AFTER = 90.0
SECONDS_BETWEEN_LOOKS, SECONDS_BETWEEN_LINES = 1.0, 60.0  # of who waits


@contextlib.contextmanager
def once(
    uri: str, label: str, *, files: Files | None = None, inputs: Iterable[str | None] | None = None
) -> Iterator[bool]:
    """Says whether a folder has to be filled and published, which the block then does while other jobs wait.

    Args:
        files: what `missing_files` looks for; a published folder that lacks one of them is filled again.
        inputs: see `say_inputs`.
    """
    with all_once([uri], label, files=files, inputs=inputs) as left:
        yield bool(left)


@contextlib.contextmanager
def all_once(
    uris: Collection[str],
    label: str,
    *,
    files: Files | None = None,
    inputs: Iterable[str | None] | None = None,
) -> Iterator[list[str]]:
    """`once` for several folders that are filled together: those that have to be."""
    with contextlib.ExitStack() as leases:
        left = []
        for uri in sorted(set(uris)):  # in one order, so that two jobs can't wait for each other
            if not is_whole(uri, files):
                leases.enter_context(lease(uri, label))
                left.append(uri)
        left = [uri for uri in left if not is_whole(uri, files)]  # others may have filled them meanwhile
        for uri in left:
            if inputs is not None:
                say_inputs(uri, inputs)
            if missing := missing_files(uri, files):
                log(
                    f"{label}: {uri} was published, but {_listed(missing)} not there (any more); making it again"
                )
                # No reader shall take it for whole meanwhile.
                storage.delete(storage.join(uri, storage.MANIFEST))
        yield left


def say_inputs(uri: str, inputs: Iterable[str | None]) -> None:
    """Notes in a folder that is not published yet what it is made of, so that nobody prunes that meanwhile."""
    storage.write_json(storage.join(uri, INPUTS_FILE), sorted({one for one in inputs if one is not None}))


def is_whole(uri: str, files: Files | None) -> bool:
    """Whether a folder is published and has all its files."""
    try:
        return storage.is_complete(uri) and not _missing(uri, files)
    except storage.IncompleteError:  # another job has just begun to make it again
        return False


def missing_files(uri: str, files: Files | None) -> list[str]:
    """Names of a published folder's files that are not there; none of a folder that is not published."""
    try:
        return _missing(uri, files) if storage.is_complete(uri) else []
    except storage.IncompleteError:
        return []


def require_files(uri: str, files: Files, stage: str) -> None:
    """Makes sure that a published folder has all its files.

    Raises:
        ConfigError: it has lost some; the message names `stage`, which makes them again.
    """
    if missing := missing_files(uri, files):
        raise ConfigError(
            f"{uri} has lost {len(missing)} of its files ({missing[0]}, …); make them again: "
            f"python -m jobs.{stage} CONFIG"
        )


def _missing(uri: str, files: Files | None) -> list[str]:
    wanted = files(uri) if files else []
    there = {file.name for file in storage.list_files(uri)} if wanted else set()
    return [name for name in wanted if name not in there]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'is' if len(names) == 1 else 'are'}"


@contextlib.contextmanager
def lease(folder: str, label: str) -> Iterator[None]:
    """Waits until no other job fills `folder`, and keeps others waiting during the block.

    Whoever has waited looks at the folder again: it may be complete by now. A job that was killed is not waited
    for if it ran on this machine, else for `ABANDONED_AFTER` seconds.
    """
    mine = _Lease(storage.join(folder, LEASE_FILE), label)
    mine.acquire()
    ended = threading.Event()
    renewal = threading.Thread(target=_renew, args=(mine, ended), name=f"lease {label}", daemon=True)
    renewal.start()
    try:
        yield
    finally:
        ended.set()
        renewal.join()
        # Left behind it costs the next job some seconds, so it must not hide what went wrong in the block.
        with contextlib.suppress(Exception):
            if mine.renew():  # so that nobody takes it for abandoned before it is deleted
                storage.delete(mine.uri)


def held_by(folder: str) -> str:
    """Who works in a folder, in words; empty where nobody does."""
    uri = storage.join(folder, LEASE_FILE)
    held, _ = _read(uri)
    try:
        if held is None or _is_dead(held) or storage.age(uri) > ABANDONED_AFTER:
            return ""
    except FileNotFoundError:  # given back just now
        return ""
    return f"{held.get('label')} (process {held.get('pid')} on {held.get('host')}, since {held.get('since')})"


class _Lease:
    """This job's note in a folder.

    Attributes:
        uri: of the note.
        label: what messages call the job.
    """

    def __init__(self, uri: str, label: str) -> None:
        self.uri, self.label = uri, label
        self._id = uuid.uuid4().hex
        self._since = storage.timestamp()
        self._beat = 0
        self._version: str | None = None  # of the note as we wrote it last
        self._heeded = False  # whether storage is known to heed conditions

    def acquire(self) -> None:
        """Waits for it."""
        seen: str | None = None
        seen_at = said_at = 0.0
        while True:
            held, version = _read(self.uri)
            now = time.monotonic()
            if version != seen:
                seen, seen_at = version, now
            # It is ours where the answer to our request was lost.
            if held is None or self._is(held) or _is_dead(held) or now - seen_at > ABANDONED_AFTER:
                if self._take(version):
                    return
            elif now - said_at > SECONDS_BETWEEN_LINES or not said_at:
                said_at = now
                log(
                    f"{self.label}: another job is at this already (process {held.get('pid')} on "
                    f"{held.get('host')}, since {held.get('since')}); waiting for its end"
                )
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def renew(self) -> bool:
        """Whether the lease is ours still, which others then see anew."""
        if not self._heeded and not self._is(_read(self.uri)[0]):
            return False
        if self._write(self._version):
            return True
        held, version = _read(self.uri)  # a renewal that failed may have been done all the same
        return self._is(held) and self._write(version)

    def _take(self, version: str | None) -> bool:
        """Whether it is ours now, where the note was at `version`."""
        if not self._write(version):
            return False
        self._heeded = storage.heeds_conditions(self.uri, self._content())
        if self._heeded:
            return True
        # Of two that write at once both read who came last; on a server that takes longer than this, both work.
        time.sleep(0.5 if storage.is_remote(self.uri) else 0.05)
        return self._is(_read(self.uri)[0])

    def _write(self, version: str | None) -> bool:
        self._beat += 1
        written = storage.write_if(self.uri, self._content(), version)
        self._version = written or self._version
        return written is not None

    def _is(self, held: dict[str, Any] | None) -> bool:
        return held is not None and held.get("id") == self._id

    def _content(self) -> bytes:
        note = {"id": self._id, "label": self.label, "host": socket.gethostname(), "pid": os.getpid()}
        return json.dumps({**note, "since": self._since, "beat": self._beat}).encode()


def _read(uri: str) -> tuple[dict[str, Any] | None, str | None]:
    """Who holds it, and the note's version; None where nobody does, or what is there is damaged."""
    try:
        data, version = storage.read_versioned(uri)
    except FileNotFoundError:
        return None, None
    try:
        held = json.loads(data)
    except ValueError:
        return None, version
    return held if isinstance(held, dict) else None, version


def _is_dead(held: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    if held.get("host") != socket.gethostname() or not isinstance(held.get("pid"), int):
        return False
    try:
        os.kill(held["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False  # another user's, alive
    return False


def _renew(mine: _Lease, ended: threading.Event) -> None:
    while not ended.wait(RENEWED_EVERY):
        try:
            if not mine.renew():
                log(f"{mine.label}: another job took this over, as this one was silent for long; both go on")
                return
        except Exception as error:  # the work matters more
            log(f"{mine.label}: the lease could not be renewed ({type(error).__name__}: {error})")
