"""S3 as an fsspec file system, for libraries that read and write by themselves, such as Ray Train and Tune."""

from __future__ import annotations

import shutil
from typing import Any

from fsspec import AbstractFileSystem

from pipeline.storage import s3
from pipeline.storage.client import split
from pipeline.storage.errors import MissingBucketError
from pipeline.storage.reading import RangeFile

_AHEAD = 8 << 20  # bytes that a read of fewer asks for


class S3Filesystem(AbstractFileSystem):
    """What Ray's files need, by the requests of `pipeline.storage.s3`: reading, writing, listing and deleting.

    So each request has their retries, bodies that are cut or stall included, and their errors. It holds no
    connection and no settings: a pickled one does as the environment of its process says. Paths are
    `bucket/key`; folders are where objects are, so making one does nothing. A copy goes
    through this machine; nothing is appended.
    """

    protocol = "s3"

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Raises FileNotFoundError, or MissingBucketError where that is why."""
        path = self._strip_protocol(path)
        uri = f"s3://{path}"
        if split(uri)[1]:
            try:
                return _entry(path, s3.size(uri))
            except MissingBucketError:
                raise
            except FileNotFoundError:
                pass  # but there may be objects below
        if s3.is_folder(uri):
            return _entry(path, -1)
        raise FileNotFoundError(f"there is nothing at {uri}")

    # fsspec's own take every failure for "no", and a checkpoint that can't be read now for none.
    def exists(self, path: str, **_: Any) -> bool:
        return self._type(path) is not None

    def isfile(self, path: str) -> bool:
        return self._type(path) == "file"

    def isdir(self, path: str) -> bool:
        return self._type(path) == "directory"

    def _type(self, path: str) -> str | None:
        try:
            return str(self.info(path)["type"])
        except FileNotFoundError:
            return None

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path)
        found = list(self._below(path, 1).values())
        if not found and (itself := self.info(path))["type"] == "file":
            found = [itself]
        return found if detail else [entry["name"] for entry in found]

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **_: Any
    ) -> Any:
        """All files below a folder, or the one of this name; fsspec's own leaves out what it fails to list."""
        path = self._strip_protocol(path)
        found = self._below(path, maxdepth)
        if not found and self.isfile(path):
            found = {path: self.info(path)}
        kept = {name: e for name, e in sorted(found.items()) if withdirs or e["type"] == "file"}
        return kept if detail else list(kept)

    def _below(self, path: str, maxdepth: int | None) -> dict[str, dict[str, Any]]:
        entries = {}
        for found in s3.objects(f"s3://{path}", deep=maxdepth != 1):
            parts = found.name.split("/")
            for depth in range(1, min(len(parts), maxdepth or len(parts)) + 1):
                name = "/".join([path, *parts[:depth]])
                entries[name] = _entry(name, found.bytes if depth == len(parts) else -1)
        return entries

    def rm(self, path: str | list[str], recursive: bool = False, maxdepth: int | None = None) -> None:
        """Removes files, and with `recursive` all below; names are taken literally, never as patterns."""
        for one in [path] if isinstance(path, str) else path:
            uri = f"s3://{self._strip_protocol(one)}"
            is_folder = self.info(one)["type"] == "directory"
            if recursive:
                s3.delete(uri)
            elif is_folder:
                raise IsADirectoryError(f"{uri} is a folder")
            else:
                self.rm_file(one)

    def rm_file(self, path: str) -> None:
        s3.delete_object(f"s3://{self._strip_protocol(path)}")

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        with self.open(path1) as source, self.open(path2, "wb") as target:
            shutil.copyfileobj(source, target, _AHEAD)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        uri = f"s3://{path}"
        if mode == "rb":
            return RangeFile(uri, 0, s3.size(uri), ahead=_AHEAD)
        if mode == "wb":
            return _Writer(uri)
        raise ValueError(f"{uri}: can't be opened in mode {mode!r}, only in rb and wb")


def _entry(path: str, size: int) -> dict[str, Any]:
    """As fsspec has it; of a folder where `size` is -1."""
    return {"name": path, "size": max(size, 0), "type": "directory" if size < 0 else "file"}


class _Writer(s3.Upload):
    """An upload that closing commits. Where its `with` block fails, or it is forgotten, nothing appears.

    Arrow closes, and so commits, also what it has failed to copy; Ray counts no such checkpoint.
    """

    def close(self) -> None:
        if self.closed:
            return
        try:
            self.commit()
        except BaseException:
            self.abort()
            raise
        finally:
            super().close()

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.close()
        else:
            self._forget()

    def __del__(self) -> None:
        if not self.closed:
            self._forget()

    def _forget(self) -> None:
        self.abort()
        super().close()
