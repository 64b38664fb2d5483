"""Reading a published clip set: its videos, and clips by shard and row."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.clips.schema import CODEC_KEY, Clip, decode_frame, decode_masks

INDEX_FILE = "index.parquet"
SOURCES_FILE = "sources.parquet"  # the videos that it was made of, those set aside included
SHARD_FOLDER = "data"
_CACHED_ROW_GROUPS = 8


@dataclass(frozen=True)
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


class ShardReader:
    """Random access to the rows of Parquet files, which keeps the last few row groups in memory."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._files: dict[str, pq.ParquetFile] = {}
        self._groups: OrderedDict[tuple[str, int, tuple[str, ...] | None], pa.Table] = OrderedDict()

    def file(self, shard: str) -> pq.ParquetFile:
        """Raises ValueError, naming the file, where it is missing, truncated or not Parquet."""
        if shard not in self._files:
            uri = storage.join(self.folder, shard)
            try:
                self._files[shard] = pq.ParquetFile(storage.open_read(uri), page_checksum_verification=True)
            except FileNotFoundError as error:
                raise ValueError(f"{uri}: the shard is missing though its folder is published") from error
            except pa.ArrowInvalid as error:
                raise ValueError(f"{uri}: the shard is damaged ({error})") from error
        return self._files[shard]

    def _read_group(self, shard: str, group: int, columns: list[str] | None) -> pa.Table:
        try:
            return self.file(shard).read_row_group(group, columns=columns, use_threads=False)
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(
                f"{storage.join(self.folder, shard)}: row group {group} is damaged ({error})"
            ) from error

    def row(self, shard: str, row: int, columns: list[str] | None = None) -> pa.Table:
        """One row as a table of length 1."""
        file = self.file(shard)
        group, start = 0, 0
        while start + file.metadata.row_group(group).num_rows <= row:
            start += file.metadata.row_group(group).num_rows
            group += 1
        key = (shard, group, tuple(columns) if columns else None)
        if key not in self._groups:
            self._groups[key] = self._read_group(shard, group, columns)
            if len(self._groups) > _CACHED_ROW_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key].slice(row - start, 1)

    def rows(self, shard: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """All rows of a shard in order, each as a table of length 1; one row group in memory."""
        file = self.file(shard)
        for group in range(file.metadata.num_row_groups):
            table = self._read_group(shard, group, columns)
            for row in range(len(table)):
                yield table.slice(row, 1)


class ClipSet:
    """A published folder of clips.

    Raises:
        storage.IncompleteError: nothing was published at `uri`.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.manifest: dict[str, Any] = storage.read_manifest(uri, kind="clips")
        self.fingerprint: str = self.manifest["fingerprint"]
        self.clip_frames: int = self.manifest["settings"]["clip_frames"]
        self.shards: list[str] = [shard["name"] for shard in self.manifest["shards"]]
        self.reader = ShardReader(storage.join(uri, SHARD_FOLDER))
        self._videos: list[VideoEntry] | None = None

    @property
    def videos(self) -> list[VideoEntry]:
        if self._videos is None:
            with storage.open_read(storage.join(self.uri, INDEX_FILE)) as file:
                self._videos = [VideoEntry(**row) for row in pq.read_table(file).to_pylist()]
        return self._videos

    def read_clip(self, shard: str, row: int, *, masks: bool = False) -> Clip:
        return to_clip(self.reader.row(shard, row, _columns(masks)), masks=masks)

    def iter_shard(self, shard: str, *, masks: bool = False) -> Iterator[Clip]:
        for row in self.reader.rows(shard, _columns(masks)):
            yield to_clip(row, masks=masks)

    def iter_video(self, video: VideoEntry, *, masks: bool = False) -> Iterator[Clip]:
        """A video's clips in order, the shorter tail included."""
        for row in range(video.first_row, video.first_row + video.clips):
            yield self.read_clip(video.shard, row, masks=masks)


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
