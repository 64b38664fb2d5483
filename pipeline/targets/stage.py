"""Stage `cache`: the frozen teacher runs once over every (clip, view), on Ray Data.

A target set has one Parquet file for each clip shard, under the same name, with `views` rows for each
clip in the clips' order: row r of the clips is rows r * views … of the targets. Slots of a frame depend
on where its clip started, so targets belong to clips, never to single frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline import storage
from pipeline.artifacts.identity import (
    _describe,
    require_teacher,
)
from pipeline.artifacts.once import lease
from pipeline.clips.stage import training_clips
from pipeline.clips.table import SHARD_FOLDER, ClipSet
from pipeline.compute import actor_options, ray_session
from pipeline.config import Config
from pipeline.log import Progress, log
from pipeline.models.build import build_backbone, load_teacher
from pipeline.targets.maker import _ShardActor
from pipeline.targets.table import TargetMismatch

FORMAT = 1
# Between two runs on one machine slots differ by about 1e-6; between two kinds of GPU by more.
VERIFY_TOLERANCE = 1e-3


def cache(config: Config, clips_uri: str) -> dict[str, Any]:
    """Makes the target set of a clip set, or finds it made.

    Returns what the job's summary holds: `uri`, counts, and how many shards were computed and reused.

    Raises:
        storage.IncompleteError: the clips are not published.
        ConfigError: no teacher, or a student that doesn't fit it.
        TargetMismatch: `targets.verify` found rows that the teacher does not reproduce.
    """
    clips = ClipSet(clips_uri)
    teacher_uri = require_teacher(config, clips.fingerprint)
    uri, content = _describe(config, clips)
    maker = (config, clips_uri, teacher_uri)
    computed = 0
    if not storage.is_complete(uri):
        with lease(uri, "cache"):
            if not storage.is_complete(uri):
                computed = _fill(config, clips, maker, uri, content)
    if not computed:
        log(f"cache: all targets found, reusing {uri}")
    manifest = storage.read_manifest(uri)
    summary = {
        "uri": uri,
        "fingerprint": manifest["fingerprint"],
        "clips": clips.manifest["clips"],
        "views": config.targets.views,
        "rows": manifest["rows"],
        "computed_shards": computed,
        "reused_shards": len(clips.shards) - computed,
    }
    if config.targets.verify:
        summary["verified_rows"] = _verify(config, clips, maker, uri)
    return summary


def _fill(
    config: Config, clips: ClipSet, maker: tuple[Config, str, str], uri: str, content: dict[str, Any]
) -> int:
    """Computes the shards that are missing and publishes the set; returns how many it computed."""
    _, clips_uri, teacher_uri = maker
    teacher_config = load_teacher(config, teacher_uri).config
    if config.targets.student_features:
        build_backbone(config.student)  # fails here and now if its weights can't be had
    folder = storage.join(uri, SHARD_FOLDER)
    done = set(storage.list_names(folder))
    missing = [shard for shard in clips.shards if shard not in done]
    if done:
        log(f"cache: {len(clips.shards) - len(missing)} of {len(clips.shards)} shards are there already")
    rows_of = {s["name"]: s["rows"] for s in clips.manifest["shards"]}
    with Progress("cache", clips.manifest["clips"], "clips") as progress:
        progress.skip(sum(rows_of[s] for s in clips.shards if s in done))
        for report in _run(config, missing, maker, uri, verify=0.0):
            progress.advance(rows_of[report["shard"]])
    manifest = {
        "kind": "targets",
        "fingerprint": storage.name(uri),
        "created": storage.timestamp(),
        **content,
        "clips_uri": clips_uri,
        "teacher_uri": teacher_uri,
        "teacher_config": teacher_config.to_dict(),
        "shards": clips.shards,
        "rows": clips.manifest["clips"] * config.targets.views,
    }
    storage.write_bytes(storage.join(uri, "config.yaml"), config.to_yaml().encode())
    storage.publish(uri, manifest)
    return len(missing)


def _run(
    config: Config, shards: list[str], maker: tuple[Config, str, str], uri: str, *, verify: float
) -> Iterator[dict[str, Any]]:
    if not shards:
        return
    with ray_session(config):
        import ray

        options = actor_options(config, len(shards))
        dataset = ray.data.from_items([{"shard": s} for s in shards], override_num_blocks=len(shards))
        yield from dataset.map(
            _ShardActor,  # type: ignore[arg-type]
            fn_constructor_args=(maker, uri, verify),
            **options,
        ).iter_rows()


def _verify(config: Config, clips: ClipSet, maker: tuple[Config, str, str], uri: str) -> int:
    checked = 0
    with Progress("verify targets", len(clips.shards), "shards") as progress:
        for report in _run(config, clips.shards, maker, uri, verify=config.targets.verify):
            checked += report["checked"]
            progress.advance()
            if report["worst"] > VERIFY_TOLERANCE:
                raise TargetMismatch(
                    f"{uri} {report['shard']}: {report['where']} differs from what the teacher computes by "
                    f"{report['worst']:.2g} of its largest value (tolerance {VERIFY_TOLERANCE:g}); delete the "
                    "folder and cache again"
                )
    return checked


def cache_stage(config: Config) -> dict[str, Any]:
    return cache(config, training_clips(config))
