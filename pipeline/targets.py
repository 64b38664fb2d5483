"""Stage `cache`: the frozen teacher runs once over every (clip, view), on Ray Data.

A target set has one Parquet file for each clip shard, under the same name, with `views` rows for each
clip in the clips' order: row r of the clips is rows r * views … of the targets. Slots of a frame depend
on where its clip started, so targets belong to clips, never to single frames.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline import storage
from pipeline.builders import (
    backbone_identity,
    best_device,
    build_backbone,
    build_student,
    checkpoint_hints,
    load_teacher,
    model_identity,
    require_teacher,
    teacher_location,
    view_recipe,
)
from pipeline.clips.schema import Clip
from pipeline.clips.table import SHARD_FOLDER, ClipSet, ShardReader
from pipeline.clips.views import View, apply_view, make_view, stable_hash
from pipeline.config import Config
from pipeline.heap import keep_freed_memory
from pipeline.lease import lease
from pipeline.models import SlotModel, SlotModelConfig
from pipeline.progress import Progress, log
from pipeline.ray_session import actor_options, ray_session

FORMAT = 1
SHAPE_KEY = b"shape"
FEATURES = ("features", "teacher_features")  # optional columns: the student's and the teacher's
_ROW_GROUP_BYTES = 1 << 20
# Between two runs on one machine slots differ by about 1e-6; between two kinds of GPU by more.
VERIFY_TOLERANCE = 1e-3


class TargetMismatch(RuntimeError):
    """Cached targets that are not what the teacher computes: damaged or of another origin."""


@dataclass(frozen=True)
class Target:
    """One row: the view, slots `(T, N, d)`, and what else was asked for.

    features: the student's `(T, P, F)`. teacher_features: `(T, P', F')`.
    """

    view: View
    slots: np.ndarray
    features: np.ndarray | None = None
    teacher_features: np.ndarray | None = None


class TargetSet:
    """A published folder of targets; raises storage.IncompleteError where there is none."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.manifest: dict[str, Any] = storage.read_manifest(uri, kind="targets")
        self.fingerprint: str = self.manifest["fingerprint"]
        self.views: int = self.manifest["views"]["views"]
        self.reader = ShardReader(storage.join(uri, SHARD_FOLDER))

    @property
    def teacher_config(self) -> SlotModelConfig:
        return SlotModelConfig.from_dict(self.manifest["teacher_config"])

    @property
    def has_features(self) -> bool:
        return self.manifest["student_features"] is not None

    def read(
        self, shard: str, clip_row: int, view: int, *, features: bool = False, teacher_features: bool = False
    ) -> tuple[str, int, Target]:
        """Video id, clip index and target of one (clip, view), found by position."""
        extra = [n for n, wanted in zip(FEATURES, (features, teacher_features), strict=True) if wanted]
        columns = [f.name for f in fields(View)] + ["video_id", "clip_index", "slots", *extra]
        row = self.reader.row(shard, clip_row * self.views + view, columns)
        values = row.select([f.name for f in fields(View)] + ["video_id", "clip_index"]).to_pylist()[0]
        video_id, clip_index = values.pop("video_id"), values.pop("clip_index")
        target = Target(
            view=View(**values),
            slots=_array(row, "slots"),
            **{name: _array(row, name) for name in extra},
        )
        return video_id, clip_index, target


def _array(row: pa.Table, name: str) -> np.ndarray:
    field = row.schema.field(name)
    shape = json.loads(field.metadata[SHAPE_KEY])
    column = row.column(name).combine_chunks()
    if name == "slots":
        return column.flatten().to_numpy().reshape(shape)
    dtype = np.dtype(field.metadata[b"dtype"].decode())
    return np.frombuffer(column[0].as_py(), dtype).reshape(shape)


def _schema(
    slots_shape: tuple[int, ...], features_shapes: Mapping[str, tuple[int, ...]], dtype: str
) -> pa.Schema:
    columns = [
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("clip_index", pa.int32(), nullable=False),
        pa.field("view", pa.int32(), nullable=False),
        pa.field("top", pa.int32(), nullable=False),
        pa.field("left", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("flip", pa.bool_(), nullable=False),
        pa.field("noise_seed", pa.int64(), nullable=False),
        pa.field("full", pa.bool_(), nullable=False),
        # Zeros for a shorter tail, which training skips: Arrow can't read null lists of fixed size back.
        pa.field(
            "slots",
            pa.list_(pa.float32(), int(np.prod(slots_shape))),
            metadata={SHAPE_KEY: json.dumps(slots_shape)},
        ),
    ]
    for name, shape in features_shapes.items():
        # Bytes: Parquet reads lists of millions of numbers an order of magnitude slower.
        metadata = {SHAPE_KEY: json.dumps(shape), b"dtype": dtype}
        columns.append(pa.field(name, pa.large_binary(), metadata=metadata))
    return pa.schema(columns)


class TargetMaker:
    """The frozen teacher (and, where its features are cached, the student's backbone)."""

    def __init__(self, config: Config, clips_uri: str, teacher_uri: str) -> None:
        self.config = config
        self.clips = ClipSet(clips_uri)
        self.device = best_device()
        if self.device.type == "cpu":
            keep_freed_memory()
        self.teacher = load_teacher(config, teacher_uri).to(self.device)
        self.student: SlotModel | None = None
        if config.targets.student_features:
            # The frozen backbone is all that is used of it.
            self.student = build_student(config, teacher=self.teacher.config, seed=0).to(self.device)

    def items(self, clip: Clip) -> list[tuple[Clip, int, View]]:
        height, width = clip.frames.shape[1:3]
        recipe, seed = self.config.targets, self.config.dataset.seed
        return [
            (clip, k, make_view(recipe, seed, clip.video_id, clip.clip_index, k, height, width))
            for k in range(recipe.views)
        ]

    @torch.no_grad()
    def compute(self, items: list[tuple[Clip, int, View]]) -> dict[str, Tensor]:
        """Columns of M full clips' views: `slots` `(M, T, N, d)`, and `FEATURES` where they are cached."""
        pixels = [apply_view(clip.frames, view) for clip, _, view in items]
        views = [view for _, _, view in items]
        slots, features = teacher_outputs(self.teacher, pixels, views, self.config.targets.rollout)
        columns = {"slots": slots.cpu()}
        if self.student is not None:
            columns["features"] = self.student.backbone_features(self.student.prepare(pixels)).cpu()
        if self.config.targets.teacher_features:
            columns["teacher_features"] = features.cpu()
        return columns

    def schema(self) -> pa.Schema:
        T = self.clips.clip_frames
        slots_shape = (T, self.teacher.config.num_slots, self.teacher.config.slot_size)
        models = {"features": self.student}
        if self.config.targets.teacher_features:
            models["teacher_features"] = self.teacher
        backbones = {name: m.encoder.backbone for name, m in models.items() if m is not None}
        shapes = {name: (T, b.num_patches, b.feature_size) for name, b in backbones.items()}
        return _schema(slots_shape, shapes, self.config.targets.feature_dtype)

    def write_shard(self, shard: str, folder: str) -> None:
        """Computes and publishes the targets of one clip shard."""
        schema = self.schema()
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / shard
            writer = pq.ParquetWriter(
                path, schema, compression="none", use_dictionary=["video_id"], write_page_checksum=True
            )
            for items in self._batches(shard):
                full = [item for item in items if item[0].full]
                computed = self.compute(full) if full else {}
                if full and not bool(torch.isfinite(computed["slots"]).all()):
                    names = sorted({f"{c.video_id} clip {c.clip_index}" for c, _, _ in full})
                    raise ValueError(f"the teacher's slots are not finite for one of: {', '.join(names)}")
                table = self._table(items, computed, schema)
                limit = max(1, _ROW_GROUP_BYTES * len(table) // max(table.nbytes, 1))
                writer.write_table(table, row_group_size=limit)
            writer.close()
            storage.upload_file(path, storage.join(folder, shard))

    def _batches(self, shard: str) -> Iterator[list[tuple[Clip, int, View]]]:
        pending: list[tuple[Clip, int, View]] = []
        for clip in self.clips.iter_shard(shard):
            pending += self.items(clip)
            if len(pending) >= self.config.targets.batch_size:
                yield pending
                pending = []
        if pending:
            yield pending

    def _table(
        self,
        items: list[tuple[Clip, int, View]],
        computed: dict[str, Tensor],  # of the full ones among them
        schema: pa.Schema,
    ) -> pa.Table:
        columns: dict[str, Any] = {
            "video_id": [clip.video_id for clip, _, _ in items],
            "clip_index": [clip.clip_index for clip, _, _ in items],
            "view": [k for _, k, _ in items],
        }
        for field in fields(View):
            columns[field.name] = [getattr(view, field.name) for _, _, view in items]
        short = np.array([not clip.full for clip, _, _ in items])
        width = schema.field("slots").type.list_size
        values = np.zeros((len(items), width), np.float32)
        if computed:
            values[~short] = computed["slots"].numpy().reshape(-1, width)
        columns["full"] = ~short
        columns["slots"] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), width)
        dtype = np.dtype(self.config.targets.feature_dtype)
        for name in set(FEATURES) & set(schema.names):
            encoded = iter([f.numpy().astype(dtype).tobytes() for f in computed.get(name, ())])
            columns[name] = [None if s else next(encoded) for s in short]
        return pa.Table.from_pydict(columns, schema=schema)

    def verify_shard(self, shard: str, targets_uri: str, fraction: float) -> dict[str, Any]:
        """Computes a random share of a published shard's rows again; returns the worst deviation."""
        targets = TargetSet(targets_uri)
        nonce = os.urandom(8).hex()  # other rows in every run
        checked, worst, where = 0, 0.0, ""
        for row, clip in enumerate(self.clips.iter_shard(shard)):
            for item in self.items(clip) if clip.full else []:
                draw = stable_hash(nonce, clip.video_id, clip.clip_index, item[1])
                if draw % 10**6 >= fraction * 10**6:
                    continue
                deviation = self._verify_row(targets, shard, row, item)
                checked += 1
                if deviation >= worst:
                    worst, where = deviation, f"{clip.video_id} clip {clip.clip_index} view {item[1]}"
        return {"checked": checked, "worst": worst, "where": where}

    def _verify_row(self, targets: TargetSet, shard: str, row: int, item: tuple[Clip, int, View]) -> float:
        clip, k, view = item
        computed = self.compute([item])
        cached = {name: name in computed for name in FEATURES}
        video_id, clip_index, target = targets.read(shard, row, k, **cached)
        if (video_id, clip_index, target.view) != (clip.video_id, clip.clip_index, view):
            raise TargetMismatch(f"{targets.uri} {shard}: row {row} is of {video_id} clip {clip_index}")
        return max(_deviation(value[0].numpy(), getattr(target, name)) for name, value in computed.items())


def _deviation(computed: np.ndarray, cached: np.ndarray) -> float:
    """The largest difference over the largest value; infinite where something is not finite."""
    difference = float(np.abs(computed - cached).max() / max(np.abs(computed).max(), 1e-12))
    return difference if np.isfinite(difference) else float("inf")


def teacher_outputs(
    teacher: SlotModel, pixels: list[np.ndarray], views: list[View], rollout: str
) -> tuple[Tensor, Tensor]:
    """The frozen teacher's slots `(M, T, N, d)` and features `(M, T, P, F)` of M views.

    The same code cached and live. Drawn initial slots are those of the views' noise seeds.
    """
    features = teacher.backbone_features(teacher.prepare(pixels))
    initial = teacher.initial_slots(len(views), [v.noise_seed for v in views])
    return teacher.roll_out(features, initial, rollout)[0], features


class _ShardActor:
    """A Ray Data actor that holds a `TargetMaker` and works through shards."""

    def __init__(self, maker: tuple[Config, str, str], targets_uri: str, verify: float) -> None:
        self.maker = TargetMaker(*maker)
        self.targets_uri = targets_uri
        self.verify = verify

    def __call__(self, row: dict[str, str]) -> dict[str, Any]:
        shard = row["shard"]
        if self.verify:
            return {"shard": shard, **self.maker.verify_shard(shard, self.targets_uri, self.verify)}
        folder = storage.join(self.targets_uri, SHARD_FOLDER)
        # Ray runs a task again whose answer was lost with its node, though its shard may be there.
        if not storage.exists(storage.join(folder, shard)):
            self.maker.write_shard(shard, folder)
        return {"shard": shard}


def find_targets(config: Config, clips: ClipSet) -> str:
    """The URI of the target set that `cache` makes of a clip set, published yet or not."""
    return _describe(config, clips)[0]


def _describe(config: Config, clips: ClipSet) -> tuple[str, dict[str, Any]]:
    teacher_uri = teacher_location(config, clips.fingerprint)
    content = {
        "format": FORMAT,
        "clips": clips.fingerprint,
        "teacher": model_identity(teacher_uri, checkpoint_hints(config)),
        "rollout": config.targets.rollout,
        "views": view_recipe(config),
        "student_features": None,
        "teacher_features": config.targets.feature_dtype if config.targets.teacher_features else None,
    }
    if config.targets.student_features:
        content["student_features"] = {
            **backbone_identity(config.student),
            "dtype": config.targets.feature_dtype,
        }
    uri = storage.join(storage.absolute(config.storage.root), "targets", storage.fingerprint(content))
    return uri, content


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
