"""Local files: written whole or not at all, and written where a condition holds."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple


class FileInfo(NamedTuple):
    """A file in a listing: its path below the folder, its bytes, what changes when they do, and when they did."""

    name: str
    size: int
    version: str
    changed: float = 0.0  # seconds since 1970, on the clock of what stores it


def list_files(folder: str) -> list[FileInfo]:
    """All files below a folder at whatever depth, sorted by name; empty where there is none."""
    return sorted(_list_files(folder))


def _list_files(folder: str) -> Iterator[FileInfo]:
    for directory, _, names in os.walk(folder, followlinks=True):
        for entry in names:
            path = os.path.join(directory, entry)
            # A link that leads nowhere is not there; whoever needs it says that it is missing.
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(path)
                relative = os.path.relpath(path, folder).replace(os.sep, "/")
                yield FileInfo(relative, status.st_size, str(status.st_mtime_ns), status.st_mtime)


@contextlib.contextmanager
def atomic_write(target: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name by renaming, only if the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def version(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def write_if(target: Path, content: bytes, expected: str | None) -> str | None:
    """`storage.write_if` of a small file."""
    if expected is None:
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _alone(target.parent):
            if expected is None:
                # Not by `atomic_write`: of several machines that share the folder one alone can make the file,
                # even where they can't lock. Who reads it half-written has a version that is never replaced.
                with open(target, "xb") as file:
                    file.write(content)
            elif version(target.read_bytes()) == expected:
                with atomic_write(target) as file:
                    file.write(content)
            else:
                return None
    except (FileExistsError, FileNotFoundError):
        return None
    return version(content)


def can_lock(folder: Path) -> bool:
    """Whether the folder's file system has locks; some that are shared by machines have none."""
    with _alone(folder) as locked:
        return locked


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Keeps other processes and threads that ask the same out of the block; False where that can't be had."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # which ends with the process at the latest
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(
                descriptor, fcntl.LOCK_UN
            )  # closing would not, where a child has been forked meanwhile
    finally:
        os.close(descriptor)
