"""Stage `shard`: videos -> a published clip set, on Ray Data.

The task that decodes a video also writes its shard; only names and counts travel through Ray. Shards
are written whole, so a job that was killed goes on with those that are missing.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import av

from pipeline import storage
from pipeline.artifacts.identity import _content_settings, clip_set_uri
from pipeline.artifacts.once import lease
from pipeline.clips.sources import VideoRef, list_videos
from pipeline.clips.sources.synthetic import SyntheticSettings, write_dataset
from pipeline.clips.sources.videos import list_videos as list_local
from pipeline.clips.table import INDEX_FILE, SHARD_FOLDER, SOURCES_FILE, VideoEntry
from pipeline.clips.write import _read_report, _shard_task
from pipeline.compute import ray_session
from pipeline.config import Config, parse_split
from pipeline.config.sections import ConfigError
from pipeline.log import Progress, log

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


def training_clips(config: Config) -> str:
    """The published clip set to train on.

    Raises:
        ConfigError: it has not been made.
    """
    return _published_clips(config, config.dataset.split)


def _published_clips(config: Config, split: str) -> str:
    uri = find_clips(config, split)
    if not storage.is_complete(uri):
        raise ConfigError(
            f"the clips of these videos and settings are not there ({uri}); make them: python -m jobs.shard CONFIG"
        )
    return uri


def shard_stage(config: Config) -> dict[str, Any]:
    """Shards the training split, and the evaluation split where there is one."""
    check_disjoint(config)
    summary = shard(config, config.dataset.split)
    if config.evaluate.split not in (None, config.dataset.split):
        assert config.evaluate.split is not None
        summary["evaluation"] = shard(config, config.evaluate.split)
    return summary


def check_disjoint(config: Config) -> None:
    """Raises ConfigError where slices of one split overlap: a video would be trained on and scored."""
    training, evaluation = config.dataset.split, config.evaluate.split
    if evaluation in (None, training):
        return  # the same one twice is refused, unless nothing is trained on it
    assert evaluation is not None
    if parse_split(training)[0] != parse_split(evaluation)[0]:
        return  # video ids are unique in a split only
    ids = [{v.video_id for v in find_videos(config, split)} for split in (training, evaluation)]
    if both := sorted(ids[0] & ids[1]):
        raise ConfigError(
            f"evaluate.split: {evaluation!r} and dataset.split {training!r} share {len(both)} videos "
            f"({both[0]}, …): they would be trained on and scored"
        )
