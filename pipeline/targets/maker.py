"""Making targets and features: a frozen model over every (clip, view) of a shard."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline import storage
from pipeline.clips.schema import Clip
from pipeline.clips.table import SHARD_FOLDER, ClipSet
from pipeline.clips.views import View, apply_view, make_view, stable_hash
from pipeline.compute import best_device
from pipeline.config import Config, Model
from pipeline.models.build import build_model, build_student, load_teacher
from pipeline.models.memory import keep_freed_memory
from pipeline.models.segmenter import VideoSegmenter
from pipeline.models.slot_model import SlotModel
from pipeline.models.tf32 import without_tf32
from pipeline.storage.threads import ahead, behind
from pipeline.targets.table import FEATURES, FeatureSet, TargetMismatch, TargetSet, ViewSet, _schema

ROW_GROUP_BYTES = 1 << 20


@dataclass(frozen=True)
class _Batch:
    """Rows of a target set, and what a model sees of them.

    items: clip, number and numbers of each view, shorter tails included.
    pixels: `(T, h, w, 3)` uint8 of the full clips' views, those that are equal once.
    place: for each full clip's view the index of its pixels.
    """

    items: list[tuple[Clip, int, View]]
    pixels: list[np.ndarray]
    place: list[int]

    @property
    def full(self) -> list[tuple[Clip, int, View]]:
        return [item for item in self.items if item[0].full]


def _batch(items: list[tuple[Clip, int, View]]) -> _Batch:
    seen: dict[tuple[int, View], int] = {}
    pixels: list[np.ndarray] = []
    place = []
    for clip, _, view in items:
        if clip.full:
            key = (id(clip), replace(view, noise_seed=0))
            if key not in seen:
                seen[key] = len(pixels)
                pixels.append(apply_view(clip.frames, view))
            place.append(seen[key])
    return _Batch(items, pixels, place)


class ShardMaker:
    """Writes and verifies the shards of a set with a row for each (clip, view); a subclass says what a row holds."""

    set_type: ClassVar[type[ViewSet]]  # which reads what is published

    def __init__(self, config: Config, clips_uri: str) -> None:
        self.config = config
        self.clips = ClipSet(clips_uri)
        self.device = best_device()
        if self.device.type == "cpu":
            keep_freed_memory()

    def schema(self) -> pa.Schema:
        """Of the rows; its columns of numbers are those that `compute` gives."""
        raise NotImplementedError

    def compute(self, batch: _Batch) -> dict[str, Tensor]:
        """Columns of a batch's M full views, with M in front; none of an empty batch."""
        raise NotImplementedError

    def items(self, clip: Clip) -> list[tuple[Clip, int, View]]:
        height, width = clip.frames.shape[1:3]
        recipe, seed = self.config.targets, self.config.dataset.seed
        return [
            (clip, k, make_view(recipe, seed, clip.video_id, clip.clip_index, k, height, width))
            for k in range(recipe.views)
        ]

    def write_shard(self, shard: str, folder: str) -> None:
        """Computes and publishes the rows of one clip shard.

        Clips are decoded, and rows encoded and written, in threads while the model computes in between.
        """
        schema = self.schema()
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / shard
            writer = pq.ParquetWriter(
                path, schema, compression="none", use_dictionary=["video_id"], write_page_checksum=True
            )
            with behind() as later:
                for batch in ahead(self._batches(shard)):
                    later(self._write, writer, batch, self.compute(batch), schema)
            writer.close()
            storage.upload_file(path, storage.join(folder, shard))

    def _batches(self, shard: str) -> Iterator[_Batch]:
        pending: list[tuple[Clip, int, View]] = []
        for clip in self.clips.iter_shard(shard):
            pending += self.items(clip)
            if len(pending) >= self.config.targets.batch_size:
                yield _batch(pending)
                pending = []
        if pending:
            yield _batch(pending)

    def _write(
        self, writer: pq.ParquetWriter, batch: _Batch, computed: dict[str, Tensor], schema: pa.Schema
    ) -> None:
        table = self._table(batch.items, computed, schema)
        limit = max(1, ROW_GROUP_BYTES * len(table) // max(table.nbytes, 1))
        writer.write_table(table, row_group_size=limit)

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
        columns["full"] = ~short
        if "slots" in schema.names:
            width = schema.field("slots").type.list_size
            values = np.zeros((len(items), width), np.float32)
            if computed:
                values[~short] = computed["slots"].numpy().reshape(-1, width)
            columns["slots"] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), width)
        dtype = np.dtype(self.config.targets.feature_dtype)
        for name in set(FEATURES) & set(schema.names):
            encoded = iter([f.numpy().astype(dtype).tobytes() for f in computed.get(name, ())])
            columns[name] = [None if s else next(encoded) for s in short]
        return pa.Table.from_pydict(columns, schema=schema)

    def verify_shard(self, shard: str, uri: str, fraction: float) -> dict[str, Any]:
        """Computes a random share of a published shard's rows again; returns the worst deviation.

        The batches of those rows are computed whole, as they were when the shard was written.
        """
        published = self.set_type(uri)
        nonce = os.urandom(8).hex()  # other rows in every run
        checked, worst, where, first = 0, 0.0, "", 0
        for batch in ahead(self._batches(shard)):
            rows = [row for row, (clip, _, _) in enumerate(batch.items, first) if clip.full]
            first += len(batch.items)
            drawn = [i for i, item in enumerate(batch.full) if _is_drawn(item, nonce, fraction)]
            columns = self.compute(batch) if drawn else {}
            for i in drawn:
                clip, k, _ = batch.full[i]
                computed = {name: column[i].numpy() for name, column in columns.items()}
                deviation = self._compare(published, shard, rows[i], batch.full[i], computed)
                checked += 1
                if deviation >= worst:
                    worst, where = deviation, f"{clip.video_id} clip {clip.clip_index} view {k}"
        return {"checked": checked, "worst": worst, "where": where}

    def _compare(
        self,
        published: ViewSet,
        shard: str,
        row: int,
        item: tuple[Clip, int, View],
        computed: dict[str, np.ndarray],
    ) -> float:
        clip, k, view = item
        clip_row = row // self.config.targets.views
        video_id, clip_index, target = published.read_columns(shard, clip_row, k, list(computed))
        if (video_id, clip_index, target.view) != (clip.video_id, clip.clip_index, view):
            raise TargetMismatch(f"{published.uri} {shard}: row {row} is of {video_id} clip {clip_index}")
        return max(_deviation(value, getattr(target, name)) for name, value in computed.items())


class TargetMaker(ShardMaker):
    """The frozen teacher (and, where its features are cached, the student's backbone)."""

    set_type = TargetSet

    def __init__(self, config: Config, clips_uri: str, teacher_uri: str) -> None:
        super().__init__(config, clips_uri)
        self.teacher = load_teacher(config, teacher_uri).to(self.device)
        self.student: SlotModel | None = None
        if config.targets.student_features:
            # The frozen backbone is all that is used of it.
            self.student = build_student(config, teacher=self.teacher.config, seed=0).to(self.device)

    @without_tf32()
    @torch.no_grad()
    def compute(self, batch: _Batch) -> dict[str, Tensor]:
        """Columns of a batch's M full views: `slots` `(M, T, N, d)`, and `FEATURES` where they are cached.

        Raises:
            ValueError: slots that are not finite.
        """
        if not batch.pixels:
            return {}
        views = [view for _, _, view in batch.full]
        rollout = self.config.targets.rollout
        slots, features = teacher_outputs(self.teacher, batch.pixels, views, rollout, batch.place)
        columns = {"slots": slots.cpu()}
        _check_finite("teacher's slots", columns["slots"], batch)
        if self.student is not None:
            own = self.student.backbone_features(self.student.prepare(batch.pixels))
            columns["features"] = _taken(own.cpu(), batch.place)
        if features is not None and self.config.targets.teacher_features:
            columns["teacher_features"] = _taken(features.cpu(), batch.place)
        return columns

    def schema(self) -> pa.Schema:
        T = self.clips.clip_frames
        slots_shape = (T, self.teacher.config.num_slots, self.teacher.config.slot_size)
        models = {"features": self.student}
        if self.config.targets.teacher_features and isinstance(self.teacher, SlotModel):
            models["teacher_features"] = self.teacher
        backbones = {name: m.encoder.backbone for name, m in models.items() if m is not None}
        shapes = {name: (T, b.num_patches, b.feature_size) for name, b in backbones.items()}
        return _schema(slots_shape, shapes, self.config.targets.feature_dtype)


def _is_drawn(item: tuple[Clip, int, View], nonce: str, fraction: float) -> bool:
    clip, k, _ = item
    return stable_hash(nonce, clip.video_id, clip.clip_index, k) % 10**6 < fraction * 10**6


def _deviation(computed: np.ndarray, cached: np.ndarray) -> float:
    """The largest difference over the largest value; infinite where something is not finite."""
    difference = float(np.abs(computed - cached).max() / max(np.abs(computed).max(), 1e-12))
    return difference if np.isfinite(difference) else float("inf")


@without_tf32()
def teacher_outputs(
    teacher: VideoSegmenter,
    pixels: Sequence[np.ndarray | Tensor],
    views: list[View],
    rollout: str,
    place: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The frozen teacher's slots `(M, T, N, d)` of M views, and a slot model's features `(U, T, P, F)` of U pixels.

    The same code cached and live. Drawn initial slots are those of the views' noise seeds.

    Args:
        place: for each view the index of its pixels, where some views have equal ones; by default M = U. The ViT sees
            pixels once, and so does slot attention where it starts from learned slots.
    """
    place = range(len(views)) if place is None else place
    if not isinstance(teacher, SlotModel):
        video = _taken(teacher.prepare(pixels), place)
        return teacher.target_slots(video, [v.noise_seed for v in views]), None
    features = teacher.backbone_features(teacher.prepare(pixels))
    if teacher.config.initializer == "learned":
        initial = teacher.initial_slots(len(pixels))
        return _taken(teacher.roll_out(features, initial, rollout)[0], place), features
    initial = teacher.initial_slots(len(views), [v.noise_seed for v in views])
    return teacher.roll_out(_taken(features, place), initial, rollout)[0], features


def _taken(values: Tensor, place: Sequence[int]) -> Tensor:
    """Rows of a tensor by their index; itself where these are all its rows in order."""
    return values if list(place) == list(range(len(values))) else values[list(place)]


class FeatureMaker(ShardMaker):
    """The frozen backbone of a teacher or student that trains on stored features."""

    set_type = FeatureSet

    def __init__(self, config: Config, clips_uri: str, section: Model) -> None:
        super().__init__(config, clips_uri)
        # The frozen backbone is all that is used of it.
        self.model = build_model(section, seed=0, **config.teacher.sizes).to(self.device)

    @without_tf32()
    @torch.no_grad()
    def compute(self, batch: _Batch) -> dict[str, Tensor]:
        """`features` `(M, T, P, F)` of a batch's M full views.

        Raises:
            ValueError: features that are not finite.
        """
        if not batch.pixels:
            return {}
        features = self.model.backbone_features(self.model.prepare(batch.pixels)).cpu()
        _check_finite("backbone's features", features, batch)
        return {"features": _taken(features, batch.place)}

    def schema(self) -> pa.Schema:
        backbone = self.model.encoder.backbone
        shape = (self.clips.clip_frames, backbone.num_patches, backbone.feature_size)
        return _schema(None, {"features": shape}, self.config.targets.feature_dtype)


def _check_finite(what: str, values: Tensor, batch: _Batch) -> None:
    if not bool(torch.isfinite(values).all()):
        names = sorted({f"{c.video_id} clip {c.clip_index}" for c, _, _ in batch.full})
        raise ValueError(f"the {what} are not finite for one of: {', '.join(names)}")


class ShardTask:
    """A task that is a class (see `map_tasks`): holds a maker and works through shards."""

    def __init__(self, make: Callable[[], ShardMaker], uri: str, verify: float) -> None:
        self.maker = make()
        self.uri = uri
        self.verify = verify

    def __call__(self, row: dict[str, str]) -> dict[str, Any]:
        shard = row["shard"]
        if self.verify:
            return {"shard": shard, **self.maker.verify_shard(shard, self.uri, self.verify)}
        folder = storage.join(self.uri, SHARD_FOLDER)
        if not storage.exists(storage.join(folder, shard)):
            self.maker.write_shard(shard, folder)
        return {"shard": shard}
