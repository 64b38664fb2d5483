"""Reading parts of files, local or remote."""

from __future__ import annotations

import io
import os

from pipeline.storage import s3
from pipeline.storage.errors import StorageError


def is_remote(uri: str) -> bool:
    return "://" in uri


def on_s3(uri: str) -> bool:
    """Raises ValueError for other places than S3 and local paths."""
    if not is_remote(uri):
        return False
    if not uri.startswith("s3://"):
        raise ValueError(
            f"storage {uri!r}: only local paths and s3:// are supported (and hf:// to read models)"
        )
    return True


def read_range(uri: str, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` (exclusive) of a file, fewer where it ends before; nothing else is read."""
    return _read_range(uri, start, stop).data


def _read_range(uri: str, start: int, stop: int) -> s3.Content:
    if start >= stop:
        return s3.Content(b"", "")
    if on_s3(uri):
        return s3.get(uri, start, stop)
    with open(os.path.expanduser(uri), "rb") as file:
        file.seek(start)
        return s3.Content(file.read(stop - start), "")


class RangeFile(io.RawIOBase):
    """Part of a file as a seekable file that reads `ahead` bytes at a time and keeps no more.

    With `ahead=0` each read is one request for just these bytes.

    Attributes:
        failure: what storage said when a read failed, for libraries that lose it.
    """

    def __init__(self, uri: str, start: int, size: int, *, ahead: int = 4096) -> None:
        self._uri, self._start, self._size, self._ahead = uri, start, size, ahead
        self._position = 0
        self._window, self._window_start = b"", 0
        self._version = ""
        self.failure: StorageError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._position)
        size = left if size is None or size < 0 else min(size, left)
        begin = self._position - self._window_start
        if size and (begin < 0 or begin + size > len(self._window)):
            self._fetch(self._position, min(self._size, self._position + max(size, self._ahead)))
            begin = 0
        content = self._window[begin : begin + size] if size else b""
        if not self._ahead:
            self._window = b""
        self._position += len(content)
        return content

    def _fetch(self, start: int, stop: int) -> None:
        try:
            content = _read_range(self._uri, self._start + start, self._start + stop)
            if self._version and content.version != self._version:
                raise StorageError(f"{self._uri}: it was replaced while it was being read; run the job again")
        except StorageError as error:
            self.failure = error
            raise
        self._window, self._window_start, self._version = content.data, start, content.version
