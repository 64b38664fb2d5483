"""Writing the clip table: one Parquet shard of whole videos' clips."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.artifacts.manifests import BadVideoEntry
from pipeline.clips.flow import with_column
from pipeline.clips.schema import SHARD_KEY, clip_schema, encode_flow, encode_frame, encode_masks
from pipeline.clips.sources import read_video
from pipeline.clips.sources.base import BadVideo, Frame, VideoRef
from pipeline.clips.table import VideoEntry
from pipeline.config import Clips
from pipeline.log import printable

STORED_FLOW = "backward"  # which is what SAVi's authors have it reconstruct


@dataclass(frozen=True)
class ShardReport:
    """What a shard holds; in its metadata as well, but for its bytes."""

    name: str
    videos: list[VideoEntry]
    bad: list[BadVideoEntry]
    rows: int
    bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bad": [entry.model_dump() for entry in self.bad]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ShardReport:
        videos = [VideoEntry(**entry) for entry in values["videos"]]
        return cls(**{**values, "videos": videos, "bad": [BadVideoEntry(**entry) for entry in values["bad"]]})


def shard_task(row: dict[str, Any], folder: str, settings: Clips) -> dict[str, Any]:
    """Makes one shard of `videos` under its `name`, unless it is there; returns its report."""
    uri = storage.join(folder, row["name"])
    videos = [VideoRef(*video) for video in row["videos"]]
    report = read_report(uri) if storage.exists(uri) else write_shard(videos, uri, settings)
    return report.to_dict()


def write_shard(videos: list[VideoRef], uri: str, settings: Clips) -> ShardReport:
    """Decodes videos and writes their clips as one Parquet file.

    Returns the file's report, which is in its metadata as well: the videos (rows of the index), the
    bad ones with reasons, rows and bytes. At most a row group is held in memory: each video's clips
    go to a temporary file first, and into the shard once the video has been read to its end.
    """
    schema = clip_schema(settings.codec, motion=settings.motion != "none", flow=settings.flow != "none")
    good: list[VideoEntry] = []
    bad: list[BadVideoEntry] = []
    rows = 0
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / "shard.parquet"
        writer = pq.ParquetWriter(
            local,
            schema,
            compression="none",
            use_dictionary=["video_id"],
            write_statistics=["video_id"],  # the smallest and largest picture would be most of the footer
            write_page_checksum=True,
        )
        for video in videos:
            spool = Path(scratch) / "video.arrow"
            try:
                entry = _spool_video(video, spool, schema, settings)
            except BadVideo as error:
                said = [printable(text) for text in (video.name, video.path, str(error))]
                bad.append(BadVideoEntry(video=said[0], path=said[1], reason=said[2]))
                continue
            with pa.OSFile(str(spool)) as file:
                for batch in pa.ipc.open_stream(file):
                    writer.write_batch(batch, row_group_size=len(batch))
            good.append(VideoEntry(shard=storage.name(uri), first_row=rows, **entry))
            rows += entry["clips"]
        report = ShardReport(storage.name(uri), good, bad, rows)
        told = {key: value for key, value in report.to_dict().items() if key != "bytes"}
        writer.add_key_value_metadata({SHARD_KEY: json.dumps(told)})
        writer.close()
        storage.upload_file(local, uri)
        return replace(report, bytes=local.stat().st_size)


def read_report(uri: str) -> ShardReport:
    """The report of a shard that is there; raises ValueError where it is damaged."""
    try:
        metadata = pq.ParquetFile(storage.open_read(uri)).metadata.metadata
    except pa.ArrowInvalid as error:
        raise ValueError(f"{uri}: the shard is damaged ({error}); delete it and run again") from error
    return ShardReport.from_dict({**json.loads(metadata[SHARD_KEY]), "bytes": storage.size(uri)})


def _spool_video(video: VideoRef, path: Path, schema: pa.Schema, settings: Clips) -> dict[str, Any]:
    """Writes one video's clips as record batches of about a row group; returns its counts."""
    limit = settings.row_group_mb * 2**20
    frames = read_video(
        video,
        short_side=settings.short_side,
        fps=settings.fps,
        max_seconds=settings.max_seconds,
        square=settings.pixel_aspect == "square",
        flow=_directions(settings),
    )
    frames = with_column(frames, settings.motion)
    rows: list[dict[str, Any]] = []
    pending = clips = full = total = 0
    shape: tuple[int, ...] | None = None
    annotated = False
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as sink:
        for group in _group(frames, settings.clip_frames):
            shape = group[0].pixels.shape[:2]  # of all frames: readers raise where it changes
            encoded = [encode_frame(f.pixels, settings.codec, settings.quality) for f in group]
            annotated = group[0].masks is not None
            rows.append(
                {
                    "video_id": video.video_id,
                    "clip_index": clips,
                    "start_frame": total,
                    "full": len(group) == settings.clip_frames,
                    "height": shape[0],
                    "width": shape[1],
                    "timestamps": [f.seconds for f in group],
                    "frames": encoded,
                    "masks": [encode_masks(f.masks or {}) for f in group] if annotated else None,
                }
            )
            if settings.motion != "none":
                rows[-1]["motion"] = [encode_masks(f.motion or {}) for f in group]
            if settings.flow != "none":
                rows[-1]["flow"] = [encode_flow((f.flow or {})[STORED_FLOW]) for f in group]
            clips, full, total = clips + 1, full + rows[-1]["full"], total + len(group)
            pending += sum(map(len, encoded))
            if pending >= limit:
                sink.write_batch(_batch(rows, schema))
                rows, pending = [], 0
        if rows:
            sink.write_batch(_batch(rows, schema))
    if shape is None:
        raise BadVideo("has no frames")
    return {
        "video_id": video.video_id,
        "clips": clips,
        "full_clips": full,
        "frames": total,
        "height": shape[0],
        "width": shape[1],
        "annotated": annotated,
    }


def _directions(settings: Clips) -> list[str]:
    """Which of a data set's own flow is needed."""
    needed = {"forward": settings.motion == "dataset", STORED_FLOW: settings.flow == "dataset"}
    return [direction for direction, is_needed in needed.items() if is_needed]


def _batch(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(rows, schema)


def _group(frames: Iterator[Frame], length: int) -> Iterator[list[Frame]]:
    group: list[Frame] = []
    for frame in frames:
        group.append(frame)
        if len(group) == length:
            yield group
            group = []
    if group:
        yield group


def write_rows(uri: str, rows: list[dict[str, Any]]) -> None:
    with storage.atomic_write(uri) as file:
        pq.write_table(pa.Table.from_pylist(rows), file)
