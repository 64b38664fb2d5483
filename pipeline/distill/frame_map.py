"""Decoded frames of a clip set in one file on this node's own disk, shared by all its workers and runs.

Copying a clip takes a tenth of the time of decoding it. So whoever decodes one writes its pixels down, and
whoever wants it next, in a later epoch or another trial of a sweep, copies them. Nobody waits for a pass over all
clips, and none is decoded that no run asks for. Frames are kept as they are stored in the clips, not cropped or
resized: a model resizes in floating point, so that uint8 of its own size would be other numbers, and every view,
student and teacher shares one file.

A clip has a fixed place in the file, where its pixels follow a mark: a checksum of them and of whose they are. That
alone says what is there. A hole, a clip that another process is writing, and one that a crash or a damage has left in
parts look alike, and the clip is decoded and written again; who writes the same clip at once writes the same bytes.
Places that nobody has written are holes in a sparse file, and take no room.

It is read and written with `pread` and `pwrite` rather than mapped into memory: as fast, without Python's lock, and
a file that is cut or a disk that is full is an error there, where a mapped page would end the process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import zlib
from pathlib import Path

import numpy as np
import PIL
from PIL import features

from pipeline import storage
from pipeline.clips.table import ClipSet, VideoEntry
from pipeline.config.sections import Storage
from pipeline.log import log

FOLDER_VARIABLE = "SLOTMATCH_CACHE"
DEFAULT_FOLDER = "~/.cache/slotmatch"
SUFFIX = ".frames"
# Of the disk. Kubernetes evicts pods of a node that has less.
KEEP_FREE = 0.15
_MARK_BYTES = 8
_BLOCK = 4096  # bytes; places begin at one, so that a hole ends where a place does


def open_frame_map(settings: Storage, clips: ClipSet) -> FrameMap | None:
    """The map of a clip set on this node; None where it is not wanted, or can't be had, which is said."""
    if not settings.cache_gb:
        return None
    folder = Path(settings.cache or os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER).expanduser()
    try:
        return FrameMap(folder, clips, limit=int(settings.cache_gb * 1e9))
    except OSError as error:
        log(f"{folder}: decoded frames can't be kept here ({error}); clips are decoded each time")
        return None


class FrameMap:
    """The full clips of a clip set, as far as somebody has decoded them. Threads may share it.

    Raises:
        OSError: the folder can't be made or written, or has no locks.
    """

    def __init__(self, folder: Path, clips: ClipSet, *, limit: int) -> None:
        """
        Args:
            limit: bytes of all maps in the folder. To stay below, those are deleted that no process has open, the
                one that was opened or written least recently first; then nothing more is written.
        """
        self.folder, self.limit, self.clip_frames = folder, limit, clips.clip_frames
        largest = max((v.height * v.width for v in clips.videos if v.full_clips), default=0)
        self._place_bytes = -(-(_MARK_BYTES + 3 * self.clip_frames * largest) // _BLOCK) * _BLOCK
        self._first_place, places = {}, 0
        for shard in clips.manifest.shards:
            self._first_place[shard.name] = places
            places += shard.rows
        self._full = False
        self._saying = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{_key(clips)}{SUFFIX}"
        self._file = _open_shared(self.path)

    def close(self) -> None:
        os.close(self._file)

    def read(self, video: VideoEntry, clip_index: int) -> np.ndarray | None:
        """A clip's frames `(T, H, W, 3)` uint8; None where they are not there, or damaged."""
        frames = np.empty((self.clip_frames, video.height, video.width, 3), np.uint8)
        mark = bytearray(_MARK_BYTES)
        try:
            count = os.preadv(self._file, [mark, frames.data], self._offset(video, clip_index))
        except OSError:  # a block that the disk can't read
            return None
        there = count == _MARK_BYTES + frames.nbytes and any(mark)
        return frames if there and mark == _mark(frames, video, clip_index) else None

    def write(self, video: VideoEntry, clip_index: int, frames: np.ndarray) -> None:
        """Keeps a clip's frames `(T, H, W, 3)` uint8 where there is room; where not, says so once."""
        if self._full:
            return
        try:
            self._make_room()
            parts: list[bytes | memoryview] = [
                _mark(frames, video, clip_index),
                np.ascontiguousarray(frames).data,
            ]
            if os.pwritev(self._file, parts, self._offset(video, clip_index)) < _MARK_BYTES + frames.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with self._saying:
                if not self._full:
                    log(
                        f"{self.path}: no more decoded frames are kept ({error.strerror}); the rest is decoded"
                    )
                self._full = True

    def _offset(self, video: VideoEntry, clip_index: int) -> int:
        return (self._first_place[video.shard] + video.first_row + clip_index) * self._place_bytes

    def _make_room(self) -> None:
        """Deletes maps that nobody uses until one more clip fits.

        Raises:
            OSError: it does not.
        """
        while True:
            disk = os.statvfs(self.folder)
            if disk.f_bavail < KEEP_FREE * disk.f_blocks:
                reason = f"less than {KEEP_FREE:.0%} of the disk is free"
            elif _used(self.folder) + self._place_bytes > self.limit:
                reason = f"storage.cache_gb={self.limit / 1e9:g} is reached"
            else:
                return
            if not _delete_oldest(self.folder):
                raise OSError(errno.ENOSPC, reason)


def _key(clips: ClipSet) -> str:
    """What decides the pixels: the clips, and which library decodes them."""
    decoder = [PIL.__version__, features.version("jpg")]
    return storage.fingerprint([storage.absolute(clips.uri), clips.fingerprint, decoder])


def _mark(frames: np.ndarray, video: VideoEntry, clip_index: int) -> bytes:
    """Never zeros, which holes are made of."""
    whose = zlib.crc32(f"{video.video_id} {clip_index}".encode())
    return (1 << 32 | zlib.crc32(np.ascontiguousarray(frames).data, whose)).to_bytes(_MARK_BYTES, "little")


def _open_shared(path: Path) -> int:
    """A descriptor of the file, new or not, with a lock that says, for as long as it is open, that it is used."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
            if os.fstat(file).st_nlink:  # not deleted between the two lines above
                os.utime(file)
                return file
        except OSError:
            os.close(file)
            raise
        os.close(file)


def _used(folder: Path) -> int:
    """Bytes on the disk, holes left out."""
    used = 0
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            used += path.stat().st_blocks * 512
    return used


def _delete_oldest(folder: Path) -> bool:
    """Whether there was a map that no process has open."""
    ages = []
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            ages.append((path.stat().st_mtime_ns, path))
    return any(_deleted_unused(path) for _, path in sorted(ages))


def _deleted_unused(path: Path) -> bool:
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True
