"""Finding a data set's files, local or in S3, and telling their versions apart without reading them twice."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

from pipeline import storage
from pipeline.clips.sources.base import BadVideo
from pipeline.storage import FileInfo

# What a frame or a mask may be stored as: by Pillow's name of a format, the suffixes of its files.
PICTURE_FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "WEBP": (".webp",),
}
_SUFFIXES = tuple(suffix for suffixes in PICTURE_FORMATS.values() for suffix in suffixes)
_THREADS = 16  # they wait for disks and networks, and hashing releases the GIL
_A = TypeVar("_A")
_T = TypeVar("_T")


def natural_key(name: str) -> list[Any]:
    """Sorts frame10 behind frame9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")


class HashMemo:
    """What was found out about files that did not change since: the same size and time of change or ETag.

    Kept as one JSON file, so that a data set is read for its hashes once and not in every job.
    """

    def __init__(self, uri: str | None) -> None:
        self._uri = uri
        known = storage.read_json(uri) if uri is not None and storage.exists(uri) else {}
        self._known: dict[str, list[Any]] = known
        self._used: dict[str, list[Any]] = {}

    def hash(self, path: Path) -> str:
        """Raises OSError where the file can't be read."""
        status = path.stat()
        state = [status.st_size, status.st_mtime_ns]
        return self._remember(str(path), state, lambda: storage.hash_file(str(path)))

    def hash_or_error(self, path: Path, mark: Callable[[IO[bytes]], str] | None = None) -> str:
        """A file that can't be read is no reason to stop here: decoding it will say why.

        Args:
            mark: what tells apart files that are read otherwise than in earlier versions, "" for the others; it is
                added to the hash.
        """

        def look(name: str) -> str:
            with open(name, "rb") as file:
                return mark(file) if mark else ""

        try:
            found, note = self.hash(path), self.look(path, "mark", look) if mark else ""
        except OSError as error:
            return f"unreadable: {error.strerror}"
        return f"{found} {note}" if note else found

    def content(self, folder: str, file: FileInfo, mark: Callable[[IO[bytes]], str] | None = None) -> str:
        """A hash of a local file's bytes, with its `mark`; an object's ETag and size: it is not downloaded."""
        if storage.is_remote(folder):
            return f"{file.version} {file.size}"
        return self.hash_or_error(Path(folder) / file.name, mark)

    def look(self, path: Path, what: str, compute: Callable[[str], _T]) -> _T:
        """`compute(path)`, a plain value that follows from a local file's bytes, remembered as `what`."""
        status = path.stat()
        state = [status.st_size, status.st_mtime_ns]
        return self._remember(f"{path}#{what}", state, lambda: compute(str(path)))

    def walk(self, folder: str, file: FileInfo, compute: Callable[[str, int], _T], what: str = "parts") -> _T:
        """`compute(uri, size)`, plain values that follow from the file's bytes, remembered as `what`."""
        uri = storage.join(folder, file.name)
        return self._remember(f"{uri}#{what}", [file.size, file.version], lambda: compute(uri, file.size))

    def _remember(self, key: str, state: list[Any], compute: Callable[[], _T]) -> _T:
        found = self._known.get(key)
        value = found[2] if found and found[:2] == state else compute()
        self._used[key] = [*state, value]
        return value

    def save(self) -> None:
        if self._uri is not None and self._used != self._known:
            storage.write_json(self._uri, self._used)


def in_threads(work: Callable[[_A], _T], items: Iterable[_A]) -> list[_T]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(work, items))


def read_part(uri: str, start: int, size: int, name: str) -> bytes:
    """Part of a file; raises BadVideo, calling it `name`, where the file is missing or too short."""
    content = _read(lambda: storage.read_range(uri, start, start + size), name)
    if len(content) != size:
        raise BadVideo(f"{name} is truncated: {len(content)} of {size} bytes are there")
    return content


def read_whole(uri: str, name: str) -> bytes:
    """A small file; raises BadVideo, calling it `name`, where it can't be read."""
    return _read(lambda: storage.read_bytes(uri), name)


def _read(operation: Callable[[], bytes], name: str) -> bytes:
    try:
        return operation()
    # A network that fails for long, or a token that has expired, is no fault of the video: the job fails,
    # and goes on when run again.
    except storage.StorageError:
        raise
    except OSError as error:
        raise BadVideo(f"{name} can't be read ({error.strerror or error})") from error


_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_lines(uri: str) -> list[str]:
    """The lines of a list of names without blanks around them, as an editor on any system writes them.

    UTF-8 with or without a byte order mark, or UTF-16 with one; bytes that are no UTF-8 as in names of files. Unusual
    spaces stay, as names have them.
    """
    content = storage.read_bytes(uri)
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    text = content.decode(encoding, "surrogateescape")
    return [line.strip(" \t") for line in re.split(r"[\r\n\t]+", text) if line.strip(" \t")]


def check_complete(folder: str, present: Collection[int], total: int, name: Callable[[int], str]) -> None:
    """Raises FileNotFoundError where one of the files numbered from 0 to `total` (exclusive) is missing."""
    missing = (number for number in range(total) if number not in present)
    first = [name(number) for number in islice(missing, 3)]
    if first:
        count = total - sum(number < total for number in present)
        raise FileNotFoundError(
            f"{folder}: {count} of {total} files are missing ({', '.join(first)}{', …' if count > 3 else ''}); "
            "download them: an incomplete copy is not read, whatever clips.max_bad_fraction says"
        )
