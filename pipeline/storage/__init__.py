"""The one place that touches a file system: a local path or `s3://bucket/prefix`.

Everything is written whole or not at all: a local file appears by renaming, an object by completing
its upload. A folder is complete once its manifest is there, which is written last; readers refuse a
folder without one. S3 is configured by the standard AWS environment variables (`AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID`, …).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import fsspec

MANIFEST = "manifest.json"
_ATTEMPTS = 4
_T = TypeVar("_T")


class IncompleteError(RuntimeError):
    """A folder that has no manifest: nothing was published there, or its job has not ended."""


def is_remote(uri: str) -> bool:
    return "://" in uri


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def name(uri: str) -> str:
    """The last part of a path: a folder's fingerprint, a shard's name."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


def timestamp() -> str:
    """The time now, in UTC, for manifests."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def absolute(uri: str) -> str:
    """A local path made absolute, so that it means the same in every process of this machine."""
    return uri if is_remote(uri) else str(Path(uri).expanduser().absolute())


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system that holds `uri`, and the path in it.

    Raises:
        ValueError: a scheme other than `s3://`.
    """
    scheme, separator, path = uri.partition("://")
    if not separator:
        return fsspec.filesystem("file"), absolute(uri)
    if scheme != "s3":
        raise ValueError(f"storage {uri!r}: only local paths and s3:// are supported")
    # Listings change under us whenever another job publishes, so none is cached. Servers other than
    # AWS answer a ranged read with the whole object's checksum, which would then never match.
    checksums = {
        "response_checksum_validation": "when_required",
        "request_checksum_calculation": "when_required",
    }
    return fsspec.filesystem("s3", use_listings_cache=False, config_kwargs=checksums), path


def retry(operation: Callable[[], _T], uri: str) -> _T:
    """Runs an idempotent operation; a remote one is tried again when the network fails.

    What another try can't mend (not found, no permission, no such bucket) is raised at once.
    """
    attempts = _ATTEMPTS if is_remote(uri) else 1
    for attempt in range(attempts):
        try:
            return operation()
        except (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError):
            raise
        except Exception as error:
            if not _is_transient(error) or attempt == attempts - 1:
                raise
            time.sleep(0.5 * 2**attempt)
    raise AssertionError


def _is_transient(error: Exception) -> bool:
    # s3fs lets botocore's errors of the network through, which are no OSErrors.
    return isinstance(error, OSError) or type(error).__module__.startswith("botocore")


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    return retry(lambda: bool(fs.exists(path)), uri)


def size(uri: str) -> int:
    fs, path = filesystem(uri)
    return retry(lambda: int(fs.size(path)), uri)


def list_names(uri: str) -> list[str]:
    """Sorted names in a folder; empty where there is none."""
    fs, path = filesystem(uri)
    try:
        entries = retry(lambda: fs.ls(path, detail=False), uri)
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = {name(str(entry)) for entry in entries}
    return sorted(entry for entry in names if not entry.startswith(".tmp-"))


class FileInfo(NamedTuple):
    """A file in a listing: its path below the folder, its bytes, and what changes when they do."""

    name: str
    size: int
    version: str


def list_files(uri: str) -> list[FileInfo]:
    """All files below a folder at whatever depth, sorted by name; empty where there is none.

    Nothing is opened: `version` is an object's ETag, or a local file's time of change.
    """
    return sorted(_list_objects(uri) if is_remote(uri) else _list_local(absolute(uri)))


def _list_objects(uri: str) -> Iterator[FileInfo]:
    fs, path = filesystem(uri)
    try:
        found = retry(lambda: fs.find(path, detail=True), uri)
    except FileNotFoundError:
        return
    prefix = path.rstrip("/") + "/"
    for key, info in found.items():
        if key.startswith(prefix):
            version = str(info.get("ETag") or info.get("LastModified")).strip('"')
            yield FileInfo(key.removeprefix(prefix), int(info["size"]), version)


def _list_local(folder: str) -> Iterator[FileInfo]:
    for directory, _, names in os.walk(folder, followlinks=True):
        for entry in names:
            path = os.path.join(directory, entry)
            # A link that leads nowhere is not there; whoever needs it says that it is missing.
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(path)
                relative = os.path.relpath(path, folder).replace(os.sep, "/")
                yield FileInfo(relative, status.st_size, str(status.st_mtime_ns))


def read_range(uri: str, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` (exclusive) of a file, fewer where it ends before; nothing else is read."""
    if start >= stop:
        return b""
    fs, path = filesystem(uri)
    return retry(lambda: fs.cat_file(path, start=start, end=stop), uri)


def open_read(uri: str) -> IO[bytes]:
    fs, path = filesystem(uri)
    return retry(lambda: fs.open(path, "rb"), uri)


def read_bytes(uri: str) -> bytes:
    fs, path = filesystem(uri)
    return retry(lambda: fs.cat_file(path), uri)


@contextlib.contextmanager
def atomic_write(uri: str) -> Iterator[IO[bytes]]:
    """A binary file that appears under its name only if the block ends without an error."""
    fs, path = filesystem(uri)
    if is_remote(uri):
        file = fs.open(path, "wb")
        try:
            yield file
        except BaseException:
            file.discard()
            file.closed = True  # else the garbage collector closes, and so uploads, it after all
            raise
        file.close()
        return
    target = Path(path)
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


def write_bytes(uri: str, content: bytes) -> None:
    def operation() -> None:
        with atomic_write(uri) as file:
            file.write(content)

    retry(operation, uri)


def write_json(uri: str, content: Any) -> None:
    write_bytes(uri, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def read_json(uri: str) -> Any:
    """Raises ValueError, naming the file, where it holds no JSON."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:  # bytes that are no text included
        raise ValueError(f"{uri}: not JSON ({error})") from error


def publish(folder: str, manifest: dict[str, Any]) -> None:
    """Makes a folder complete by writing its manifest."""
    write_json(join(folder, MANIFEST), manifest)


def read_manifest(folder: str, *, kind: str | None = None) -> dict[str, Any]:
    """A complete folder's manifest.

    Raises:
        IncompleteError: the folder is missing or unfinished.
        ValueError: the manifest is damaged, or of something else than `kind`.
    """
    try:
        manifest = read_json(join(folder, MANIFEST))
    except FileNotFoundError:
        raise IncompleteError(
            f"{folder} has no {MANIFEST}: it does not exist or its job has not finished; run the job again"
        ) from None
    if not isinstance(manifest, dict) or not manifest:
        raise ValueError(
            f"{join(folder, MANIFEST)}: damaged, it holds no manifest; delete the folder and run again"
        )
    if kind is not None and manifest.get("kind") != kind:
        raise ValueError(f"{folder} holds {manifest.get('kind', 'something else')}, not {kind}")
    return manifest


def is_complete(folder: str) -> bool:
    return exists(join(folder, MANIFEST))


def upload_folder(local: str | Path, uri: str) -> None:
    """Copies the files of a flat local folder, the manifest (if any) last."""
    files = sorted(Path(local).iterdir(), key=lambda p: (p.name == MANIFEST, p.name))
    for file in files:
        upload_file(file, join(uri, file.name))


def upload_file(local: str | Path, uri: str) -> None:
    """Publishes a local file as `uri`, whole or not at all."""

    def operation() -> None:
        with open(local, "rb") as source, atomic_write(uri) as target:
            shutil.copyfileobj(source, target, 1 << 20)

    retry(operation, uri)


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[str]:
    """A local path with the content of a file or a flat folder; a local `uri` is itself."""
    if not is_remote(uri):
        yield absolute(uri)
        return
    fs, path = filesystem(uri)
    with tempfile.TemporaryDirectory() as folder:
        if retry(lambda: bool(fs.isfile(path)), uri):
            target = str(Path(folder) / name(path))
            retry(lambda: fs.get_file(path, target), uri)
        else:
            target = folder
            names = list_names(uri)
            if not names:
                raise FileNotFoundError(f"nothing at {uri}")
            for entry in names:
                retry(functools.partial(fs.get_file, f"{path}/{entry}", str(Path(folder) / entry)), uri)
        yield target


def delete(uri: str) -> None:
    """Removes a file or a folder with all it holds; nothing there is no error."""
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        retry(lambda: fs.rm(path, recursive=True), uri)


def fingerprint(content: Any) -> str:
    """16 hex digits that follow from JSON-like content alone."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def hash_file(uri: str) -> str:
    """A hash of a file's bytes, of which nothing but one block is held in memory."""
    digest = hashlib.blake2b(digest_size=16)
    with open_read(uri) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
