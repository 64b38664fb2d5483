"""Stage `shard`: videos -> a published clip set, on Ray Data.

The task that decodes a video also writes its shard; only names and counts travel through Ray. Shards
are written whole, so a job that was killed goes on with those that are missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pipeline import storage
from pipeline.artifacts.counted import clip_settings
from pipeline.artifacts.identity import Artifact
from pipeline.artifacts.manifests import BadVideoEntry, ClipManifest, DatasetEntry, ShardEntry
from pipeline.artifacts.once import once
from pipeline.clips.flow import flow_library
from pipeline.clips.library import ClipLibrary, artifacts_of, check_disjoint, clip_files
from pipeline.clips.sources import VideoRef
from pipeline.clips.table import INDEX_FILE, SHARD_FOLDER, SOURCES_FILE
from pipeline.clips.write import ShardReport, read_report, shard_task, write_rows
from pipeline.compute import map_tasks
from pipeline.config import Config
from pipeline.log import Progress, log, printable


class TooManyBadVideos(RuntimeError):
    """More videos were set aside than `clips.max_bad_fraction` allows."""


def shard(config: Config, library: ClipLibrary | None = None) -> dict[str, Any]:
    """Shards the training split, and the evaluation split where there is one.

    Args:
        library: what has looked the videos up before.

    Returns what the job's summary holds, see `shard_split`; that of the evaluation split is in `evaluation`.

    Raises:
        ConfigError: a video is in both.
        FileNotFoundError, TooManyBadVideos: as `shard_split`.
    """
    library = library or ClipLibrary()
    check_disjoint(artifacts_of(config, library=library))
    summary = shard_split(config, config.dataset.split, library)
    if config.evaluate.split not in (None, config.dataset.split):
        assert config.evaluate.split is not None
        summary["evaluation"] = shard_split(config, config.evaluate.split, library)
    return summary


def shard_split(config: Config, split: str, library: ClipLibrary | None = None) -> dict[str, Any]:
    """Makes the clip set of one split, or finds it made.

    Args:
        library: what has looked the videos up before.

    Returns what the job's summary holds: `uri`, counts of videos, clips and frames, the bad videos
    with their reasons, and how many shards were computed and reused.

    Raises:
        ConfigError: `clips.motion` asks for flow, and OpenCV is not installed.
        FileNotFoundError: no videos.
        TooManyBadVideos: more than `clips.max_bad_fraction` of them were set aside.
    """
    library = library or ClipLibrary()
    flow = flow_library(config.clips_of(split).motion)
    videos = library.videos(config, split)
    clips = artifacts_of(config, library=library).clips_of(split)
    label = f"shard {split or 'videos'}"
    work = _Sharding(config, split, videos, clips, label)
    generated = [videos[0].path] if config.dataset.kind == "synthetic" else []
    with once(clips.uri, label, files=clip_files, inputs=generated) as needed:
        if needed:
            work.fill()
    if not needed:
        log(f"{label}: all clips found, reusing {clips.uri}")
    manifest = ClipManifest.read(clips.uri)
    if manifest.flow not in (None, flow):
        log(
            f"{label}: their flow was computed by {manifest.flow}; {flow}, which is installed, may find other segments"
        )
    keys = {"fingerprint", "videos", "clips", "frames", "annotated_videos", "bad"}
    return {
        "uri": clips.uri,
        **manifest.model_dump(mode="json", include=keys),
        "computed_shards": work.computed,
        "reused_shards": len(manifest.shards) - work.computed,
    }


class _Sharding:
    """Fills one clip set."""

    def __init__(
        self, config: Config, split: str, videos: Sequence[VideoRef], clips: Artifact, label: str
    ) -> None:
        self.config, self.split, self.videos, self.uri, self.label = config, split, videos, clips.uri, label
        self.computed = 0

    def fill(self) -> None:
        """Makes the shards that are missing and publishes the set."""
        reports = self._make_shards()
        bad = [entry for report in reports for entry in report.bad]
        self._check_bad(bad)
        entries = [entry for report in reports for entry in report.videos]
        write_rows(storage.join(self.uri, INDEX_FILE), [asdict(e) for e in entries])
        write_rows(
            storage.join(self.uri, SOURCES_FILE),
            [{"video_id": v.video_id, "path": printable(v.path), "content": v.content} for v in self.videos],
        )
        storage.write_bytes(storage.join(self.uri, "config.yaml"), self.config.to_yaml().encode())
        dataset = self.config.dataset
        ClipManifest(
            fingerprint=storage.name(self.uri),
            created=storage.timestamp(),
            split=self.split,
            dataset=DatasetEntry(kind=dataset.kind, name=dataset.title, path=dataset.path, split=self.split),
            settings=clip_settings(self.config, self.split),
            sources=storage.fingerprint([(v.video_id, v.content) for v in self.videos]),
            flow=flow_library(self.config.clips_of(self.split).motion),
            videos=len(entries),
            clips=sum(e.clips for e in entries),
            frames=sum(e.frames for e in entries),
            annotated_videos=sum(e.annotated for e in entries),
            shards=tuple(ShardEntry(name=r.name, rows=r.rows, bytes=r.bytes) for r in reports),
            bad=tuple(bad),
        ).publish(self.uri)

    def _make_shards(self) -> list[ShardReport]:
        """The reports of all shards in their order, those that were there already among them."""
        step = self.config.clips.videos_per_shard
        groups = {
            f"shard-{number:05d}.parquet": self.videos[start : start + step]
            for number, start in enumerate(range(0, len(self.videos), step))
        }
        folder = storage.join(self.uri, SHARD_FOLDER)
        there = [name for name in storage.list_names(folder) if name in groups]
        reports = {name: read_report(storage.join(folder, name)) for name in there}
        if reports:
            log(f"{self.label}: {len(reports)} of {len(groups)} shards are there already")
        rows = [{"name": n, "videos": [list(v) for v in g]} for n, g in groups.items() if n not in reports]
        with Progress(self.label, len(self.videos), "videos") as progress:
            progress.skip(sum(len(groups[name]) for name in reports))
            settings = self.config.clips_of(self.split)
            for result in map_tasks(self.config, shard_task, rows, arguments=(folder, settings)):
                report = ShardReport.from_dict(result)
                reports[report.name] = report
                progress.advance(len(report.videos) + len(report.bad))
        self.computed = len(rows)
        return [reports[name] for name in groups]

    def _check_bad(self, bad: Sequence[BadVideoEntry]) -> None:
        for entry in bad:
            log(f"{self.label}: set aside {entry.video}: {entry.reason}")
        most, count = self.config.clips.max_bad_fraction, len(self.videos)
        if len(bad) > most * count or len(bad) == count:
            raise TooManyBadVideos(
                f"{len(bad)} of {count} videos can't be used, more than clips.max_bad_fraction = {most}: "
                + "; ".join(f"{e.video} ({e.reason})" for e in bad[:10])
                + (f"; and {len(bad) - 10} more" if len(bad) > 10 else "")
            )
