"""Reading a published clip set: its videos, and clips by shard and row."""

from __future__ import annotations

import contextlib
import sys
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.artifacts.manifests import ClipManifest
from pipeline.clips.schema import CODEC_KEY, Clip, decode_flow, decode_frame, decode_masks
from pipeline.clips.views import View, boxes_in_view
from pipeline.storage.threads import ahead, made_ahead

INDEX_FILE = "index.parquet"
SOURCES_FILE = "sources.parquet"  # the videos that it was made of, those set aside included
SHARD_FOLDER = "data"
_CACHED_ROW_GROUPS = 8
_DECODERS = 2  # threads: one decodes a clip with its masks more slowly than a GPU segments it
# Of all that a reader remembers, as stored; in memory they are about eleven times as large.
_FOOTER_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)  # a training worker holds one for each video
class VideoEntry:
    """Where a video's clips are: rows `first_row … first_row + clips - 1` of a shard."""

    video_id: str
    shard: str
    first_row: int
    clips: int
    full_clips: int
    frames: int
    height: int
    width: int
    annotated: bool


class _Footer(NamedTuple):
    """What is remembered of a Parquet file: where its row groups are, and the rows up to each one's end."""

    metadata: pq.FileMetaData
    bytes: int
    ends: list[int]


class ShardReader:
    """Random access to the rows of Parquet files.

    Keeps the last few row groups and footers, but no file open: a training worker visits thousands of shards.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._footers: OrderedDict[str, _Footer] = OrderedDict()
        self._footer_bytes = 0
        self._groups: OrderedDict[tuple[str, int, tuple[str, ...] | None], pa.Table] = OrderedDict()

    def file(self, shard: str) -> pq.ParquetFile:
        """Opens it, for one thread; ValueError, naming the file, where it is missing, truncated or not Parquet."""
        uri = storage.join(self.folder, shard)
        known = self._footers.get(shard)
        try:
            size = known.bytes if known else storage.size(uri)
            file = pq.ParquetFile(
                storage.open_read(uri, size=size),
                metadata=known.metadata if known else None,
                page_checksum_verification=True,
                pre_buffer=storage.is_remote(uri),  # a row group is one request, not one for each column
            )
        except storage.StorageError:
            raise
        except FileNotFoundError as error:
            raise ValueError(
                f"{uri}: the shard is missing though its folder is published; run the stage that made it again"
            ) from error
        except pa.ArrowInvalid as error:
            raise ValueError(f"{uri}: the shard is damaged ({error})") from error
        if known is None:
            rows = (file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups))
            self._footers[shard] = _Footer(file.metadata, size, list(accumulate(rows)))
            self._footer_bytes += file.metadata.serialized_size
            while self._footer_bytes > _FOOTER_BYTES and len(self._footers) > 1:
                _, forgotten = self._footers.popitem(last=False)
                self._footer_bytes -= forgotten.metadata.serialized_size
        self._footers.move_to_end(shard)
        return file

    def _ends(self, shard: str) -> list[int]:
        if shard not in self._footers:
            self.file(shard).close(force=True)
        return self._footers[shard].ends

    def _read_group(
        self, file: pq.ParquetFile, shard: str, group: int, columns: list[str] | None
    ) -> pa.Table:
        try:
            return file.read_row_group(group, columns=columns, use_threads=False)
        except storage.StorageError:
            raise
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(
                f"{storage.join(self.folder, shard)}: row group {group} is damaged ({error})"
            ) from error

    def row(self, shard: str, row: int, columns: list[str] | None = None) -> pa.Table:
        """One row as a table of length 1."""
        ends = self._ends(shard)
        group = bisect_right(ends, row)
        start = ends[group - 1] if group else 0
        key = (shard, group, tuple(columns) if columns else None)
        if key not in self._groups:
            with _closed_after(self.file(shard)) as file:
                self._groups[key] = self._read_group(file, shard, group, columns)
            if len(self._groups) > _CACHED_ROW_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key].slice(row - start, 1)

    def rows(self, shard: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """All rows of a shard in order, each as a table of length 1.

        The next row group is read while one is used, so there are two in memory.
        """
        with _closed_after(self.file(shard)) as file:
            groups = range(file.metadata.num_row_groups)
            for table in ahead(self._read_group(file, shard, group, columns) for group in groups):
                for row in range(len(table)):
                    yield table.slice(row, 1)


@contextlib.contextmanager
def _closed_after(file: pq.ParquetFile) -> Iterator[pq.ParquetFile]:
    try:
        yield file
    finally:
        file.close(force=True)  # what it was opened from, too


class ClipSet:
    """A published folder of clips.

    Raises:
        storage.IncompleteError: nothing was published at `uri`.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.manifest = ClipManifest.read(uri)
        self.fingerprint = self.manifest.fingerprint
        self.clip_frames = self.manifest.clip_frames
        self.has_motion, self.has_flow = (
            self.manifest.settings.get(key, "none") != "none" for key in ("motion", "flow")
        )
        self.shards = self.manifest.shard_names
        self.reader = ShardReader(storage.join(uri, SHARD_FOLDER))
        # A reader is one thread's: this one is of that which reads ahead for `iter_videos`.
        self._ahead_reader = ShardReader(self.reader.folder)
        self._videos: list[VideoEntry] | None = None

    @property
    def videos(self) -> list[VideoEntry]:
        if self._videos is None:
            with storage.open_read(storage.join(self.uri, INDEX_FILE)) as file:
                self._videos = _entries(pq.read_table(file))
        return self._videos

    def read_clip(self, shard: str, row: int, *, masks: bool = False) -> Clip:
        return to_clip(self.reader.row(shard, row, _columns(masks)), masks=masks)

    def read_motion(self, shard: str, row: int) -> np.ndarray:
        """A clip's motion segments, `(T, H, W)` uint8, numbered from 1 in each frame; 0 where nothing moves.

        Raises:
            ValueError: the clips have none.
        """
        if not self.has_motion:
            raise ValueError(
                f"{self.uri}: these clips have no motion segments; make some that do: clips.motion=flow (or masks, or "
                "files of your own)"
            )
        values = self.reader.row(shard, row, ["height", "width", "motion"]).to_pylist()[0]
        size = values["height"], values["width"]
        segments = np.zeros((len(values["motion"]), *size), np.uint8)
        for frame, objects in zip(segments, values["motion"], strict=True):
            for number, mask in enumerate(decode_masks(objects, *size).values(), 1):
                frame[mask] = number
        return segments

    def read_flow(self, shard: str, row: int) -> np.ndarray:
        """A clip's optical flow to the frame before each, `(T, H, W, 2)` float32, pixels down and to the right.

        Raises:
            ValueError: the clips have none.
        """
        if not self.has_flow:
            raise ValueError(
                f"{self.uri}: these clips have no optical flow; make some that do: clips.flow=dataset (of MOVi)"
            )
        values = self.reader.row(shard, row, ["height", "width", "flow"]).to_pylist()[0]
        return np.stack([decode_flow(flow, values["height"], values["width"]) for flow in values["flow"]])

    def read_boxes(self, shard: str, row: int, view: View, count: int, first: int = 0) -> np.ndarray:
        """Boxes `(count, 4)` float32 as `boxes_in_view`, of a clip's first frame from `first` on that shows an object.

        Without so many objects the others are zeros; what is too many is left out.

        Raises:
            ValueError: the clip has no masks.
        """
        values = self.reader.row(shard, row, ["video_id", "height", "width", "masks"]).to_pylist()[0]
        if values["masks"] is None:
            raise ValueError(
                f"{self.uri}: {values['video_id']} has no masks, of which boxes are made "
                "(teacher.savi.conditioning=boxes); nearest valid: teacher.savi.conditioning=none"
            )
        boxes = np.zeros((count, 4), np.float32)
        for objects in values["masks"][first:]:
            found = boxes_in_view(decode_masks(objects, values["height"], values["width"]), view)[:count]
            if len(found):
                boxes[: len(found)] = found
                break
        return boxes

    def iter_shard(self, shard: str, *, masks: bool = False) -> Iterator[Clip]:
        for row in self.reader.rows(shard, _columns(masks)):
            yield to_clip(row, masks=masks)

    def iter_video(self, video: VideoEntry, *, masks: bool = False) -> Iterator[Clip]:
        """A video's clips in order, the shorter tail included."""
        for row in range(video.first_row, video.first_row + video.clips):
            yield self.read_clip(video.shard, row, masks=masks)

    def iter_videos(
        self, videos: Iterable[VideoEntry], *, masks: bool = False
    ) -> Generator[Clip, None, None]:
        """Clips of videos in turn, as `iter_video`; read and decoded in threads while those before are used."""
        rows = (
            self._ahead_reader.row(video.shard, row, _columns(masks))
            for video in videos
            for row in range(video.first_row, video.first_row + video.clips)
        )
        return made_ahead(partial(to_clip, masks=masks), ahead(rows), _DECODERS)


def _entries(index: pa.Table) -> list[VideoEntry]:
    names = [field.name for field in fields(VideoEntry)]
    entries: list[VideoEntry] = []
    # Some at a time: as Python values, a million videos are many times their entries.
    for batch in index.select(names).to_batches(max_chunksize=10_000):
        for video_id, shard, *rest in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            entries.append(VideoEntry(video_id, sys.intern(shard), *rest))  # one name for all of its videos
    return entries


def _columns(masks: bool) -> list[str]:
    return ["video_id", "clip_index", "full", "height", "width", "frames"] + (["masks"] if masks else [])


def to_clip(row: pa.Table, *, masks: bool) -> Clip:
    """A one-row table of the clip schema, decoded."""
    codec = row.schema.metadata[CODEC_KEY].decode()
    values = row.to_pylist()[0]
    height, width = values["height"], values["width"]
    annotation = values.get("masks") if masks else None
    return Clip(
        video_id=values["video_id"],
        clip_index=values["clip_index"],
        full=values["full"],
        frames=np.stack([decode_frame(f, codec, height, width) for f in values["frames"]]),
        masks=[decode_masks(m, height, width) for m in annotation] if annotation is not None else None,
    )
