"""Stage `cache`: the frozen teacher runs once over every (clip, view), on Ray Data.

So does, alone, a backbone whose features are stored for all that train on them (`cache_features`).

A target set has one Parquet file for each clip shard, under the same name, with `views` rows for each
clip in the clips' order: row r of the clips is rows r * views … of the targets. Slots of a frame depend
on where its clip started, so targets belong to clips, never to single frames.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.artifacts.identity import Artifact, Artifacts
from pipeline.artifacts.manifests import FeatureManifest, TargetManifest
from pipeline.artifacts.once import once
from pipeline.clips.library import artifacts_of, open_clips
from pipeline.clips.table import SHARD_FOLDER, ClipSet
from pipeline.compute import map_tasks
from pipeline.config import Config, Model
from pipeline.log import Progress, log
from pipeline.models.build import build_backbone, build_model, load_teacher
from pipeline.targets.maker import FeatureMaker, ShardMaker, ShardTask, TargetMaker
from pipeline.targets.table import TargetMismatch

# Between two runs on one machine slots differ by about 1e-6; between two kinds of GPU by more.
VERIFY_TOLERANCE = 1e-3


def cache(config: Config, artifacts: Artifacts | None = None) -> dict[str, Any]:
    """Makes the target set of a config's clips, or finds it made; and the student's features, if it trains on such.

    Args:
        artifacts: the config's, where they are known already.

    Returns what the job's summary holds: `uri`, counts, and how many shards were computed and reused.

    Raises:
        ConfigError: the clips have not been made, there is no teacher, or the student doesn't fit it.
        TargetMismatch: `targets.verify` found rows that the teacher does not reproduce.
    """
    artifacts = artifacts or artifacts_of(config)
    clips = open_clips(artifacts.clips)
    teacher_uri = artifacts.require_teacher()
    make = functools.partial(TargetMaker, config, clips.uri, teacher_uri)
    work = _Caching("cache", "targets", config, clips, artifacts.targets, make)
    features = cache_features(artifacts, config.student) if config.student.cached_features else None
    with once(work.uri, "cache", files=target_files, inputs=[clips.uri, teacher_uri]) as needed:
        if needed:
            teacher_config = load_teacher(config, teacher_uri).config
            if config.targets.student_features:
                build_backbone(config.student)  # fails here and now if its weights can't be had
            work.fill()
            TargetManifest(
                **work.described(), teacher_uri=teacher_uri, teacher_config=teacher_config.to_dict()
            ).publish(work.uri)
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
    if features is not None:
        summary["features"] = features.uri
    if config.targets.verify:
        if features is not None:
            features.verify()
        summary["verified_rows"] = work.verify()
    return summary


def cache_features(artifacts: Artifacts, section: Model) -> _Caching:
    """Makes the stored features of a section's backbone, or finds them made; they need no teacher.

    Raises:
        ConfigError: the clips have not been made, or the backbone's weights can't be had.
    """
    config, clips = artifacts.config, open_clips(artifacts.clips)
    make = functools.partial(FeatureMaker, config, clips.uri, section)
    work = _Caching("features", "features", config, clips, artifacts.features(section), make)
    with once(work.uri, "features", files=feature_files, inputs=[clips.uri]) as needed:
        if needed:
            build_model(section, seed=0, **config.teacher.sizes)  # what can't be had is said here and now
            work.fill()
            FeatureManifest(**work.described()).publish(work.uri)
    if not needed:
        log(f"features: all found, reusing {work.uri}")
    return work


def feature_files(uri: str) -> list[str]:
    """The files that a published set of features can't do without."""
    return [f"{SHARD_FOLDER}/{name}" for name in FeatureManifest.read(uri).shards]


def target_files(uri: str) -> list[str]:
    """The files that a published target set can't do without."""
    return [f"{SHARD_FOLDER}/{name}" for name in TargetManifest.read(uri).shards]


@dataclass
class _Caching:
    """Fills and verifies one set."""

    label: str  # in messages
    what: str  # it holds
    config: Config
    clips: ClipSet
    artifact: Artifact
    make: Callable[[], ShardMaker]
    computed: int = 0

    @property
    def uri(self) -> str:
        return self.artifact.uri

    def fill(self) -> None:
        """Computes the shards that are missing; the set has still to be published."""
        clips = self.clips
        done = set(storage.list_names(storage.join(self.uri, SHARD_FOLDER)))
        missing = [shard for shard in clips.shards if shard not in done]
        if done:
            log(
                f"{self.label}: {len(clips.shards) - len(missing)} of {len(clips.shards)} shards are there already"
            )
        rows_of = {shard.name: shard.rows for shard in clips.manifest.shards}
        with Progress(self.label, clips.manifest.clips, "clips") as progress:
            progress.skip(sum(rows_of[s] for s in clips.shards if s in done))
            for report in self._map(missing, verify=0.0):
                progress.advance(rows_of[report["shard"]])
        storage.write_bytes(storage.join(self.uri, "config.yaml"), self.config.to_yaml().encode())
        self.computed = len(missing)

    def described(self) -> dict[str, Any]:
        """What the manifests of both kinds of sets say."""
        return {
            "fingerprint": storage.name(self.uri),
            "created": storage.timestamp(),
            **self.artifact.content,
            "clips_uri": self.clips.uri,
            "shards": tuple(self.clips.shards),
            "rows": self.clips.manifest.clips * self.config.targets.views,
        }

    def _map(self, shards: list[str], *, verify: float) -> Iterator[dict[str, Any]]:
        rows = [{"shard": shard} for shard in shards]
        return map_tasks(self.config, ShardTask, rows, arguments=(self.make, self.uri, verify))

    def verify(self) -> int:
        """Computes a share of the rows again; returns how many."""
        checked = 0
        with Progress(f"verify {self.what}", len(self.clips.shards), "shards") as progress:
            for report in self._map(self.clips.shards, verify=self.config.targets.verify):
                checked += report["checked"]
                progress.advance()
                if report["worst"] > VERIFY_TOLERANCE:
                    raise TargetMismatch(
                        f"{self.uri} {report['shard']}: {report['where']} differs from what its model computes by "
                        f"{report['worst']:.2g} of its largest value (tolerance {VERIFY_TOLERANCE:g}); delete the "
                        "folder and cache again"
                    )
        return checked
