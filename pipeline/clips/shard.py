"""Stage `shard`: videos -> a published clip set, on Ray Data.

The task that decodes a video also writes its shard; only names and counts travel through Ray. Shards
are written whole, so a job that was killed goes on with those that are missing.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.clips.schema import SHARD_KEY, clip_schema, encode_frame, encode_masks
from pipeline.clips.sources import BadVideo, Frame, VideoRef, list_videos, read_video
from pipeline.clips.sources.synthetic import SyntheticSettings, write_dataset
from pipeline.clips.sources.videos import list_videos as list_local
from pipeline.clips.table import INDEX_FILE, SHARD_FOLDER, SOURCES_FILE, VideoEntry
from pipeline.config import Clips, Config, parse_split
from pipeline.lease import lease
from pipeline.progress import Progress, log
from pipeline.ray_session import ray_session

FORMAT = 1  # of the clip table; a change makes new clip sets


class TooManyBadVideos(RuntimeError):
    """More videos were set aside than `clips.max_bad_fraction` allows."""


def find_videos(config: Config, split: str) -> list[VideoRef]:
    """The videos of a split, which may be a slice; errors as in `sources.list_videos`.

    Where a whole folder of videos is trained on, its sub-folder for evaluation is not.
    """
    dataset = config.dataset
    contents: dict[str, str] = {}
    if dataset.kind == "synthetic":
        folder = _generate(config, split)
        contents = storage.read_manifest(folder).get("contents", {})
        dataset = dataset.model_copy(update={"kind": "videos", "path": folder})
        split = split[len(parse_split(split)[0]) :]  # the slice alone
    held_out = parse_split(config.evaluate.split or "")[0] or None
    memo_folder = storage.join(storage.absolute(config.storage.root), "sources")
    videos = list_videos(dataset, split, held_out=held_out, memo_folder=memo_folder)
    return [v._replace(content=contents.get(v.video_id, v.content)) for v in videos]


def _generate(config: Config, split: str) -> str:
    settings = config.dataset.synthetic
    kind = parse_split(split)[0] or "train"
    counts = {
        "train": settings.videos,
        "validation": settings.validation_videos,
        "test": settings.test_videos,
    }
    synthetic = SyntheticSettings(
        videos=counts[kind],
        frames=settings.frames,
        size=settings.size,
        seed=len(counts) * settings.seed + list(counts).index(kind),  # no split shares a video with another
    )
    name = storage.fingerprint({**asdict(synthetic), "format": FORMAT, "av": av.__version__})
    folder = storage.absolute(storage.join(config.storage.root, "generated", name))
    if storage.is_complete(folder):
        return folder
    manifest: dict[str, Any] = {"kind": "generated", "settings": asdict(synthetic)}
    label = f"generate {split or 'videos'}"
    if not storage.is_remote(folder):
        _write_videos(synthetic, folder, label)
    else:
        with tempfile.TemporaryDirectory() as local:
            _write_videos(synthetic, local, label)
            # Hashes of what was made, so that clips have the same fingerprint wherever they are stored.
            manifest["contents"] = {v.video_id: v.content for v in list_local(local, config.dataset.masks)}
            storage.upload_tree(local, folder)
    storage.publish(folder, manifest)
    return folder


def _write_videos(settings: SyntheticSettings, folder: str, label: str) -> None:
    with Progress(label, settings.videos, "videos") as progress:
        write_dataset(
            settings, folder, on_progress=lambda done, total: progress.advance(done - progress.done)
        )


def clip_set_uri(config: Config, videos: list[VideoRef]) -> str:
    """The folder that a clip set of these videos has or will have."""
    return storage.join(storage.absolute(config.storage.root), "clips", _fingerprint(config.clips, videos))


def _fingerprint(settings: Clips, videos: list[VideoRef]) -> str:
    return storage.fingerprint(
        {
            "format": FORMAT,
            "settings": _content_settings(settings),
            "decoder": {
                "av": av.__version__,
                **{k: v for k, v in av.library_versions.items() if "codec" in k},
            },
            "sources": [(v.video_id, v.content) for v in videos],
        }
    )


def _content_settings(settings: Clips) -> dict[str, Any]:
    """The settings that decide what a clip set holds, so not how many bad videos are tolerated."""
    return settings.model_dump(exclude={"max_bad_fraction"})


def find_clips(config: Config, split: str) -> str:
    """The URI of the clip set that `shard` makes of a split, whether it is published yet or not."""
    return clip_set_uri(config, find_videos(config, split))


def shard(config: Config, split: str) -> dict[str, Any]:
    """Makes the clip set of one split, or finds it made.

    Returns what the job's summary holds: `uri`, counts of videos, clips and frames, the bad videos
    with their reasons, and how many shards were computed and reused.

    Raises:
        FileNotFoundError: no videos.
        TooManyBadVideos: more than `clips.max_bad_fraction` of them were set aside.
    """
    videos = find_videos(config, split)
    uri = clip_set_uri(config, videos)
    label = f"shard {split or 'videos'}"
    computed = 0
    if not storage.is_complete(uri):
        with lease(uri, label):
            if not storage.is_complete(uri):
                computed = _fill(config, split, videos, uri, label)
    if not computed:
        log(f"{label}: all clips found, reusing {uri}")
    return _summary(uri, storage.read_manifest(uri), computed=computed)


def _fill(config: Config, split: str, videos: list[VideoRef], uri: str, label: str) -> int:
    """Makes the shards that are missing and publishes the set; returns how many it made."""
    settings = config.clips
    step = settings.videos_per_shard
    groups = [videos[i : i + step] for i in range(0, len(videos), step)]
    names = [f"shard-{i:05d}.parquet" for i in range(len(groups))]
    folder = storage.join(uri, SHARD_FOLDER)
    reports: dict[str, dict[str, Any]] = {}
    for name in storage.list_names(folder):
        if name in names:
            reports[name] = _read_report(storage.join(folder, name))
    missing = [(n, g) for n, g in zip(names, groups, strict=True) if n not in reports]
    if reports:
        log(f"{label}: {len(reports)} of {len(names)} shards are there already")
    with Progress(label, len(videos), "videos") as progress:
        progress.skip(sum(len(g) for n, g in zip(names, groups, strict=True) if n in reports))
        for report in _run(config, missing, folder):
            reports[report["name"]] = report
            progress.advance(len(report["videos"]) + len(report["bad"]))
    ordered = [reports[name] for name in names]
    bad = [entry for report in ordered for entry in report["bad"]]
    for entry in bad:
        log(f"{label}: set aside {entry['video']}: {entry['reason']}")
    if len(bad) > settings.max_bad_fraction * len(videos) or len(bad) == len(videos):
        raise TooManyBadVideos(
            f"{len(bad)} of {len(videos)} videos can't be used, more than clips.max_bad_fraction = "
            f"{settings.max_bad_fraction}: "
            + "; ".join(f"{e['video']} ({e['reason']})" for e in bad[:10])
            + (f"; and {len(bad) - 10} more" if len(bad) > 10 else "")
        )
    entries = [VideoEntry(**entry) for report in ordered for entry in report["videos"]]
    _write_rows(storage.join(uri, INDEX_FILE), [asdict(e) for e in entries])
    _write_rows(
        storage.join(uri, SOURCES_FILE),
        [{"video_id": v.video_id, "path": v.path, "content": v.content} for v in videos],
    )
    storage.write_bytes(storage.join(uri, "config.yaml"), config.to_yaml().encode())
    manifest = {
        "kind": "clips",
        "fingerprint": storage.name(uri),
        "split": split,
        "dataset": {
            "kind": config.dataset.kind,
            "name": config.dataset.title,
            "path": config.dataset.path,
            "split": split,
        },
        "created": storage.timestamp(),
        "settings": _content_settings(settings),
        "sources": storage.fingerprint([(v.video_id, v.content) for v in videos]),
        "videos": len(entries),
        "clips": sum(e.clips for e in entries),
        "frames": sum(e.frames for e in entries),
        "annotated_videos": sum(e.annotated for e in entries),
        "shards": [{"name": r["name"], "rows": r["rows"], "bytes": r["bytes"]} for r in ordered],
        "bad": bad,
    }
    storage.publish(uri, manifest)
    return len(missing)


def _summary(uri: str, manifest: dict[str, Any], *, computed: int) -> dict[str, Any]:
    keys = ("fingerprint", "videos", "clips", "frames", "annotated_videos", "bad")
    reused = len(manifest["shards"]) - computed
    return {
        "uri": uri,
        **{k: manifest[k] for k in keys},
        "computed_shards": computed,
        "reused_shards": reused,
    }


def _run(config: Config, missing: list[tuple[str, list[VideoRef]]], folder: str) -> Iterator[dict[str, Any]]:
    if not missing:
        return
    rows = [{"work": json.dumps([name, [list(v) for v in group]])} for name, group in missing]
    options = {"folder": folder, "settings": config.clips}
    with ray_session(config):
        import ray

        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        task: Any = _shard_task
        for row in dataset.map(task, fn_kwargs=options, num_cpus=1).iter_rows():
            yield json.loads(row["report"])


def _shard_task(row: dict[str, str], folder: str, settings: Clips) -> dict[str, str]:
    name, group = json.loads(row["work"])
    uri = storage.join(folder, name)
    # Ray runs a task again whose answer was lost with its node, though its shard may be there.
    done = storage.exists(uri)
    report = _read_report(uri) if done else write_shard([VideoRef(*v) for v in group], uri, settings)
    return {"report": json.dumps(report)}


def write_shard(videos: list[VideoRef], uri: str, settings: Clips) -> dict[str, Any]:
    """Decodes videos and writes their clips as one Parquet file.

    Returns the file's report, which is in its metadata as well: the videos (rows of the index), the
    bad ones with reasons, rows and bytes. At most a row group is held in memory: each video's clips
    go to a temporary file first, and into the shard once the video has been read to its end.
    """
    schema = clip_schema(settings.codec)
    good: list[dict[str, Any]] = []
    bad: list[dict[str, str]] = []
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
                bad.append({"video": video.name, "path": video.path, "reason": str(error)})
                continue
            with pa.OSFile(str(spool)) as file:
                for batch in pa.ipc.open_stream(file):
                    writer.write_batch(batch, row_group_size=len(batch))
            good.append(asdict(VideoEntry(shard=storage.name(uri), first_row=rows, **entry)))
            rows += entry["clips"]
        report = {"name": storage.name(uri), "videos": good, "bad": bad, "rows": rows}
        writer.add_key_value_metadata({SHARD_KEY: json.dumps(report)})
        writer.close()
        storage.upload_file(local, uri)
        return {**report, "bytes": local.stat().st_size}


def _read_report(uri: str) -> dict[str, Any]:
    try:
        metadata = pq.ParquetFile(storage.open_read(uri)).metadata.metadata
    except pa.ArrowInvalid as error:
        raise ValueError(f"{uri}: the shard is damaged ({error}); delete it and run again") from error
    return {**json.loads(metadata[SHARD_KEY]), "bytes": storage.size(uri)}


def _spool_video(video: VideoRef, path: Path, schema: pa.Schema, settings: Clips) -> dict[str, Any]:
    """Writes one video's clips as record batches of about a row group; returns its counts."""
    limit = settings.row_group_mb * 2**20
    frames = read_video(
        video, short_side=settings.short_side, fps=settings.fps, max_seconds=settings.max_seconds
    )
    rows: list[dict[str, Any]] = []
    pending = clips = full = total = 0
    shape: tuple[int, ...] | None = None
    annotated = False
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as sink:
        for group in _group(frames, settings.clip_frames):
            for frame in group:
                shape = shape or frame.pixels.shape[:2]
                if frame.pixels.shape[:2] != shape:
                    raise BadVideo(
                        f"its frame size changes from {shape} to {frame.pixels.shape[:2]} (height, width)"
                    )
            assert shape is not None
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


def _write_rows(uri: str, rows: list[dict[str, Any]]) -> None:
    with storage.atomic_write(uri) as file:
        pq.write_table(pa.Table.from_pylist(rows), file)
