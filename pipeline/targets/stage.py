"""Stage `cache`: the frozen teacher runs once over every (clip, view), on Ray Data.

A target set has one Parquet file for each clip shard, under the same name, with `views` rows for each
clip in the clips' order: row r of the clips is rows r * views … of the targets. Slots of a frame depend
on where its clip started, so targets belong to clips, never to single frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.artifacts.identity import Artifact, Artifacts
from pipeline.artifacts.manifests import TargetManifest
from pipeline.artifacts.once import once
from pipeline.clips.library import artifacts_of, open_clips
from pipeline.clips.table import SHARD_FOLDER, ClipSet
from pipeline.compute import map_tasks
from pipeline.config import Config
from pipeline.log import Progress, log
from pipeline.models.build import build_backbone, load_teacher
from pipeline.targets.maker import ShardTask
from pipeline.targets.table import TargetMismatch

# Between two runs on one machine slots differ by about 1e-6; between two kinds of GPU by more.
VERIFY_TOLERANCE = 1e-3


def cache(config: Config, artifacts: Artifacts | None = None) -> dict[str, Any]:
    """Makes the target set of a config's clips, or finds it made.

    Args:
        artifacts: the config's, where they are known already.

    Returns what the job's summary holds: `uri`, counts, and how many shards were computed and reused.

    Raises:
        ConfigError: the clips have not been made, there is no teacher, or the student doesn't fit it.
        TargetMismatch: `targets.verify` found rows that the teacher does not reproduce.
    """
    artifacts = artifacts or artifacts_of(config)
    clips = open_clips(artifacts.clips)
    work = _Caching(config, clips, artifacts.require_teacher(), artifacts.targets)
    with once(work.uri, "cache", files=target_files, inputs=[clips.uri, work.teacher_uri]) as needed:
        if needed:
            work.fill()
    if not needed:
        log(f"cache: all targets found, reusing {work.uri}")
    manifest = TargetManifest.read(work.uri)
    summary = {
        "uri": work.uri,
        "fingerprint": manifest.fingerprint,
        "clips": clips.manifest.clips,
        "views": config.targets.views,
        "rows": manifest.rows,
        "computed_shards": work.computed,
        "reused_shards": len(clips.shards) - work.computed,
    }
    if config.targets.verify:
        summary["verified_rows"] = work.verify()
    return summary


def target_files(uri: str) -> list[str]:
    """The files that a published target set can't do without."""
    return [f"{SHARD_FOLDER}/{name}" for name in TargetManifest.read(uri).shards]


@dataclass
class _Caching:
    """Fills and verifies one target set."""

    config: Config
    clips: ClipSet
    teacher_uri: str
    targets: Artifact
    computed: int = 0

    @property
    def uri(self) -> str:
        return self.targets.uri

    def fill(self) -> None:
        """Computes the shards that are missing and publishes the set."""
        config, clips = self.config, self.clips
        teacher_config = load_teacher(config, self.teacher_uri).config
        if config.targets.student_features:
            build_backbone(config.student)  # fails here and now if its weights can't be had
        done = set(storage.list_names(storage.join(self.uri, SHARD_FOLDER)))
        missing = [shard for shard in clips.shards if shard not in done]
        if done:
            log(f"cache: {len(clips.shards) - len(missing)} of {len(clips.shards)} shards are there already")
        rows_of = {shard.name: shard.rows for shard in clips.manifest.shards}
        with Progress("cache", clips.manifest.clips, "clips") as progress:
            progress.skip(sum(rows_of[s] for s in clips.shards if s in done))
            for report in self._map(missing, verify=0.0):
                progress.advance(rows_of[report["shard"]])
        storage.write_bytes(storage.join(self.uri, "config.yaml"), config.to_yaml().encode())
        TargetManifest(
            fingerprint=storage.name(self.uri),
            created=storage.timestamp(),
            **self.targets.content,
            clips_uri=clips.uri,
            teacher_uri=self.teacher_uri,
            teacher_config=teacher_config.to_dict(),
            shards=tuple(clips.shards),
            rows=clips.manifest.clips * config.targets.views,
        ).publish(self.uri)
        self.computed = len(missing)

    def _map(self, shards: list[str], *, verify: float) -> Iterator[dict[str, Any]]:
        rows = [{"shard": shard} for shard in shards]
        arguments = (self.config, self.clips.uri, self.teacher_uri, self.uri, verify)
        return map_tasks(self.config, ShardTask, rows, arguments=arguments)

    def verify(self) -> int:
        """Computes a share of the rows again; returns how many."""
        checked = 0
        with Progress("verify targets", len(self.clips.shards), "shards") as progress:
            for report in self._map(self.clips.shards, verify=self.config.targets.verify):
                checked += report["checked"]
                progress.advance()
                if report["worst"] > VERIFY_TOLERANCE:
                    raise TargetMismatch(
                        f"{self.uri} {report['shard']}: {report['where']} differs from what the teacher computes by "
                        f"{report['worst']:.2g} of its largest value (tolerance {VERIFY_TOLERANCE:g}); delete the "
                        "folder and cache again"
                    )
        return checked
