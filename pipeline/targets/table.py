"""Reading published targets and features: one row for each (clip, view)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.artifacts.manifests import FeatureManifest, TargetManifest
from pipeline.clips.table import SHARD_FOLDER, ShardReader
from pipeline.clips.views import View
from pipeline.models.segmenter import SegmenterConfig
from pipeline.models.systems import parse_config

SHAPE_KEY = b"shape"


FEATURES = ("features", "teacher_features")  # optional columns: the student's and the teacher's


class TargetMismatch(RuntimeError):
    """Cached targets that are not what the teacher computes: damaged or of another origin."""


@dataclass(frozen=True)
class Target:
    """One row: the view, and what was asked for.

    slots: `(T, N, d)`. features: the student's `(T, P, F)`. teacher_features: `(T, P', F')`.
    """

    view: View
    slots: np.ndarray | None = None
    features: np.ndarray | None = None
    teacher_features: np.ndarray | None = None


class ViewSet:
    """A published folder with a row for each (clip, view); raises storage.IncompleteError where there is none."""

    manifest_type: ClassVar[type[TargetManifest | FeatureManifest]]

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.manifest = self.manifest_type.read(uri)
        self.fingerprint = self.manifest.fingerprint
        self.views: int = self.manifest.views["views"]
        self.reader = ShardReader(storage.join(uri, SHARD_FOLDER))

    def read_columns(
        self, shard: str, clip_row: int, view: int, names: Sequence[str]
    ) -> tuple[str, int, Target]:
        """Video id, clip index and the named columns of one (clip, view), found by position."""
        columns = [f.name for f in fields(View)] + ["video_id", "clip_index"]
        row = self.reader.row(shard, clip_row * self.views + view, [*columns, *names])
        values = row.select(columns).to_pylist()[0]
        video_id, clip_index = values.pop("video_id"), values.pop("clip_index")
        return video_id, clip_index, Target(View(**values), **{name: _array(row, name) for name in names})


class FeatureSet(ViewSet):
    """Stored features of a frozen backbone, of whichever teachers and students have it."""

    manifest_type = FeatureManifest


class TargetSet(ViewSet):
    """A teacher's targets."""

    manifest_type = TargetManifest
    manifest: TargetManifest

    @property
    def teacher_config(self) -> SegmenterConfig:
        return parse_config(self.manifest.teacher_config)[1]

    @property
    def has_features(self) -> bool:
        return self.manifest.student_features is not None

    def read(
        self, shard: str, clip_row: int, view: int, *, features: bool = False, teacher_features: bool = False
    ) -> tuple[str, int, Target]:
        """Video id, clip index and target of one (clip, view), found by position."""
        extra = [n for n, wanted in zip(FEATURES, (features, teacher_features), strict=True) if wanted]
        return self.read_columns(shard, clip_row, view, ["slots", *extra])


def _array(row: pa.Table, name: str) -> np.ndarray:
    field = row.schema.field(name)
    shape = json.loads(field.metadata[SHAPE_KEY])
    column = row.column(name).combine_chunks()
    if name == "slots":
        return column.flatten().to_numpy().reshape(shape)
    dtype = np.dtype(field.metadata[b"dtype"].decode())
    return np.frombuffer(column[0].as_buffer(), dtype).reshape(shape)  # not a copy, as `as_py` is


def _schema(
    slots_shape: tuple[int, ...] | None, features_shapes: Mapping[str, tuple[int, ...]], dtype: str
) -> pa.Schema:
    """Of a set's rows, with slots where they have a shape."""
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
    ]
    if slots_shape is not None:
        # Zeros for a shorter tail, which training skips: Arrow can't read null lists of fixed size back.
        kind = pa.list_(pa.float32(), int(np.prod(slots_shape)))
        columns.append(pa.field("slots", kind, metadata={SHAPE_KEY: json.dumps(slots_shape)}))
    for name, shape in features_shapes.items():
        # Bytes: Parquet reads lists of millions of numbers an order of magnitude slower.
        metadata = {SHAPE_KEY: json.dumps(shape), b"dtype": dtype}
        columns.append(pa.field(name, pa.large_binary(), metadata=metadata))
    return pa.schema(columns)
