"""The one place that touches a file system: a local path, `s3://bucket/prefix` or, to read models, `hf://user/repo`.

Everything is written whole or not at all: a local file appears by renaming, an object by completing
its upload. A folder is complete once its manifest is there, which is written last; readers refuse a
folder without one. S3 is configured by the standard AWS environment variables (`AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID`, …); `s3` tries what may pass again, and says what does not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import fsspec

from pipeline.storage import disk, hub, s3
from pipeline.storage.disk import FileInfo
from pipeline.storage.errors import (
    AccessError,
    HubError,
    IncompleteError,
    MissingBucketError,
    StorageError,
    UnavailableError,
)
from pipeline.storage.hub import on_hub
from pipeline.storage.reading import RangeFile, is_remote, on_s3, read_range
from pipeline.storage.s3_filesystem import S3Filesystem
from pipeline.storage.threads import blocks_ahead

__all__ = [
    "MANIFEST",
    "AccessError",
    "FileInfo",
    "HubError",
    "IncompleteError",
    "MissingBucketError",
    "RangeFile",
    "StorageError",
    "UnavailableError",
    "is_remote",
    "on_hub",
    "read_range",
]

MANIFEST = "manifest.json"
_BLOCK = 8 << 20  # bytes, of a file that is read from its beginning to its end


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
    return uri if is_remote(uri) else str(Path(os.path.expanduser(uri)).absolute())


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system that holds `uri`, and the path in it, for libraries that want one.

    Raises:
        ValueError: a scheme other than `s3://`.
    """
    if on_s3(uri):
        return S3Filesystem(), uri.removeprefix("s3://")
    return fsspec.filesystem("file"), absolute(uri)


def pinned(uri: str) -> str:
    """The same, but of what is on the Hub at its commit, so that it stays the same in all processes."""
    return hub.pinned(uri) if on_hub(uri) else uri


def nearest(uri: str) -> str:
    """What an error about a missing file adds: names that are there, where they are known."""
    return hub.nearest(uri) if on_hub(uri) else ""


def exists(uri: str) -> bool:
    if on_hub(uri):
        return hub.is_file(uri) or hub.is_folder(uri)
    if on_s3(uri):
        return s3.is_object(uri) or s3.is_folder(uri)
    return os.path.exists(absolute(uri))


def is_folder(uri: str) -> bool:
    if on_hub(uri):
        return hub.is_folder(uri)
    return s3.is_folder(uri) if on_s3(uri) else os.path.isdir(absolute(uri))


def size(uri: str) -> int:
    return s3.size(uri) if on_s3(uri) else os.path.getsize(absolute(uri))


def version(uri: str) -> str:
    """What changes when a file does: an object's ETag, a commit of the Hub, a local file's size and time of change.

    Raises:
        FileNotFoundError: no such file.
    """
    if on_hub(uri):
        return hub.version(uri)
    if on_s3(uri):
        return s3.version(uri)
    status = os.stat(absolute(uri))
    return f"{status.st_size} {status.st_mtime_ns}"


def age(uri: str) -> float:
    """Seconds since a file was last written, on the clock of what stores it.

    Raises:
        FileNotFoundError: no such file.
    """
    return s3.age(uri) if on_s3(uri) else time.time() - os.path.getmtime(absolute(uri))


def is_link(uri: str) -> bool:
    """Whether a local path leads to another place."""
    return not on_s3(uri) and os.path.islink(absolute(uri))


def list_names(uri: str) -> list[str]:
    """Sorted names in a folder; empty where there is none."""
    if on_s3(uri):
        names = {found.name for found in s3.objects(uri, deep=False)}
    else:
        try:
            names = set(os.listdir(absolute(uri)))
        except (FileNotFoundError, NotADirectoryError):
            return []
    return sorted(entry for entry in names if not entry.startswith(".tmp-"))


def list_files(uri: str) -> list[FileInfo]:
    """All files below a folder at whatever depth, sorted by name; empty where there is none.

    Nothing is opened: `version` is an object's ETag, or a local file's time of change.
    """
    if on_s3(uri):
        return sorted(FileInfo(*found) for found in s3.objects(uri, deep=True))
    return disk.list_files(absolute(uri))


def open_read(uri: str, *, size: int | None = None) -> IO[bytes]:
    """A seekable file. Of a remote one, each read is a request for just the bytes that are asked for.

    Args:
        size: its bytes, where they are known, which saves a request.
    """
    if not on_hub(uri) and on_s3(uri):
        return RangeFile(uri, 0, s3.size(uri) if size is None else size, ahead=0)  # type: ignore[return-value]
    return open(hub.path(uri) if on_hub(uri) else absolute(uri), "rb")


def read_blocks(uri: str) -> Iterator[bytes]:
    """A file from its beginning to its end, the next block on its way while one is used."""
    with open_read(uri) as file:
        yield from blocks_ahead(file, _BLOCK)


def read_bytes(uri: str) -> bytes:
    if on_hub(uri):
        return Path(hub.path(uri)).read_bytes()
    return s3.get(uri).data if on_s3(uri) else Path(absolute(uri)).read_bytes()


@contextlib.contextmanager
def atomic_write(uri: str) -> Iterator[IO[bytes]]:
    """A binary file that appears under its name only if the block ends without an error."""
    if on_s3(uri):
        upload = s3.Upload(uri)
        try:
            yield upload  # type: ignore[misc]
            upload.commit()
        except BaseException:
            upload.abort()
            raise
        return
    with disk.atomic_write(Path(absolute(uri))) as file:
        yield file


def write_bytes(uri: str, content: bytes) -> None:
    with atomic_write(uri) as file:
        file.write(content)


def write_json(uri: str, content: Any) -> None:
    write_bytes(uri, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def read_json(uri: str) -> Any:
    """Raises ValueError, naming the file, where it holds no JSON."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:  # bytes that are no text included
        raise ValueError(f"{uri}: not JSON ({error})") from error


class Content(NamedTuple):
    """A file's bytes, and the version that `write_if` asks for."""

    data: bytes
    version: str


def read_versioned(uri: str) -> Content:
    if on_s3(uri):
        return Content(*s3.get(uri))
    data = read_bytes(uri)
    return Content(data, disk.version(data))


def write_if(uri: str, content: bytes, version: str | None) -> str | None:
    """Writes a small file if the one that is there has still this version; with None, if there is none.

    Returns:
        The new version; None where the condition did not hold. On S3 it may be our own content that does not let it
        hold: written by a try whose answer was lost.

    Where `heeds_conditions` is False it may overwrite what others write at the same moment.
    """
    if on_s3(uri):
        return s3.put_if(uri, content, version)
    return disk.write_if(Path(absolute(uri)), content, version)


def heeds_conditions(uri: str, content: bytes) -> bool:
    """Whether a condition of `write_if` always counts, so that of several that write at once one alone does.

    Args:
        uri, content: a file that the caller has just written; a server that heeds no conditions writes it again.
    """
    if on_s3(uri):
        return s3.heeds_conditions(uri, content)
    return disk.can_lock(Path(absolute(uri)).parent)


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
    except MissingBucketError:
        raise
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
    with open(local, "rb") as source, atomic_write(uri) as target:
        shutil.copyfileobj(source, target, 1 << 20)


def upload_tree(local: str | Path, uri: str) -> None:
    """Copies all files below a local folder, several at a time: for many small ones. It publishes nothing."""
    files = list_files(str(local))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda f: upload_file(Path(local) / f.name, join(uri, f.name)), files))


@contextlib.contextmanager
def local_copy(uri: str, names: Collection[str] | None = None) -> Iterator[str]:
    """A local path with a file, or with all files or those named of a flat folder; a local `uri` is itself."""
    if on_hub(uri):
        yield hub.folder(uri, names) if hub.is_folder(uri) else hub.path(uri)
        return
    if not is_remote(uri):
        yield absolute(uri)
        return
    with tempfile.TemporaryDirectory() as folder:
        entries = list_names(uri)
        if entries:
            for entry in entries if names is None else set(entries) & set(names):
                _download(join(uri, entry), Path(folder) / _local_name(entry))
            yield folder
        else:
            target = Path(folder) / _local_name(name(uri))
            _download(uri, target)
            yield str(target)


def _local_name(entry: str) -> str:
    """The same, but where it is longer than the 255 bytes that file systems take, as a name on S3 may be."""
    if len(os.fsencode(entry)) <= 255:
        return entry
    suffix = os.path.splitext(entry)[1]
    return fingerprint(entry) + (suffix if len(os.fsencode(suffix)) <= 32 else "")


def _download(uri: str, target: Path) -> None:
    with open(target, "wb") as file:
        for block in read_blocks(uri):
            file.write(block)


def delete(uri: str) -> None:
    """Removes a file or a folder with all it holds; nothing there is no error."""
    if on_s3(uri):
        s3.delete(uri)
        return
    with contextlib.suppress(FileNotFoundError):
        if os.path.isdir(absolute(uri)):
            shutil.rmtree(absolute(uri))
        else:
            os.unlink(absolute(uri))


def empty_folder(uri: str, *, but: str) -> None:
    """Removes all that a folder holds except for one file directly in it; links, and not what they lead to."""
    if on_s3(uri):
        s3.delete_objects(uri, [found.name for found in s3.objects(uri, deep=True) if found.name != but])
        return
    top = absolute(uri)
    for folder, below, names in os.walk(top, topdown=False):
        for entry in names:
            path = os.path.join(folder, entry)
            if path != os.path.join(top, but):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
        for entry in below:
            path = os.path.join(folder, entry)
            if os.path.islink(path):
                os.unlink(path)
            else:
                remove_if_empty(path)


def remove_if_empty(uri: str) -> None:
    """Removes a local folder in which nothing is; in S3 there is none then."""
    if not on_s3(uri):
        with contextlib.suppress(OSError):  # somebody has begun to fill it
            os.rmdir(absolute(uri))


def fingerprint(content: Any) -> str:
    """16 hex digits that follow from JSON-like content alone."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def hash_file(uri: str) -> str:
    """A hash of a file's bytes, of which a few blocks are held in memory."""
    digest = hashlib.blake2b(digest_size=16)
    for block in read_blocks(uri):
        digest.update(block)
    return digest.hexdigest()
