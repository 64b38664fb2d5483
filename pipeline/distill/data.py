"""Batches for training: which clips a step uses, and a loader that reads ahead and sends them to the device.

Which samples step s sees follows from (seed, s) alone. There is no shuffle buffer and no state: every
worker computes the same batch and takes its share, and a resumed run goes on where it was.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pipeline.clips.table import ClipSet, VideoEntry
from pipeline.clips.views import View, apply_view, flow_in_view, labels_in_view, make_view, stable_hash
from pipeline.config import Targets
from pipeline.distill.frame_map import FrameMap
from pipeline.models.pixels import send
from pipeline.targets.table import FeatureSet, Target, TargetMismatch, TargetSet, ViewSet


@dataclass(frozen=True)
class Sample:
    """One clip of one video, seen through one of its views."""

    video: VideoEntry
    clip_index: int
    view: int

    @property
    def row(self) -> int:
        return self.video.first_row + self.clip_index


class Sampler:
    """Every epoch visits each video once, in an order, with a clip and a view of its own.

    With `views=None` every epoch has a view that no other has had.

    Raises:
        ValueError: no video has a full clip.
    """

    def __init__(self, videos: list[VideoEntry], *, seed: int, batch_size: int, views: int | None) -> None:
        self.videos = [v for v in videos if v.full_clips]
        if not self.videos:
            raise ValueError("no video is long enough for one full clip: lower clips.clip_frames")
        self.seed, self.batch_size, self.views = seed, batch_size, views
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            rng = np.random.default_rng(stable_hash(self.seed, "order", epoch))
            self._orders[epoch] = rng.permutation(len(self.videos))
            if len(self._orders) > 4:
                self._orders.popitem(last=False)
        return self._orders[epoch]

    def batch(self, step: int) -> list[Sample]:
        samples = []
        for index in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, position = divmod(index, len(self.videos))
            video = self.videos[self._order(epoch)[position]]
            clip = stable_hash(self.seed, "clip", epoch, video.video_id) % video.full_clips
            draw = stable_hash(self.seed, "view", epoch, video.video_id)
            view = draw % self.views if self.views else epoch
            samples.append(Sample(video, clip, view))
        return samples


@dataclass(frozen=True)
class RawBatch:
    """Samples as they are read: `pixels` uint8 clips `(T, h, w, 3)`, or features `(B, T, P, F)` instead."""

    views: list[View]
    pixels: list[torch.Tensor] | None
    features: torch.Tensor | None
    target_slots: torch.Tensor | None
    teacher_features: torch.Tensor | None
    samples: list[Sample]
    motion: list[torch.Tensor] | None = None  # segments `(T, h, w)` uint8, 0 where nothing moves
    flow: list[torch.Tensor] | None = None  # `(T, h, w, 2)` pixels down and to the right
    boxes: torch.Tensor | None = None  # `(B, K, 4)` of objects, as `boxes_in_view`

    def to(self, device: torch.device) -> RawBatch:
        """On the device, features in fp32; they are sent as they were stored, and widened there.

        Copies to a GPU don't wait: they are made on the current stream.
        """

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            there = send(tensor, device)
            return there.float() if there.is_floating_point() else there

        return self._map(moved)

    def used_on(self, stream: torch.cuda.Stream) -> None:
        """Tells the allocator that another stream than the one of the copies uses the tensors."""

        def used(tensor: torch.Tensor) -> torch.Tensor:
            tensor.record_stream(stream)
            return tensor

        self._map(used)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> RawBatch:
        def each(clips: list[torch.Tensor] | None) -> list[torch.Tensor] | None:
            return None if clips is None else [function(clip) for clip in clips]

        def mapped(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else function(tensor)

        return replace(
            self,
            pixels=each(self.pixels),
            motion=each(self.motion),
            flow=each(self.flow),
            boxes=mapped(self.boxes),
            features=mapped(self.features),
            target_slots=mapped(self.target_slots),
            teacher_features=mapped(self.teacher_features),
        )


_Sent = tuple[RawBatch, torch.cuda.Event | None]  # on its way to the device; the event says when it is there


class Loader:
    """Reads this worker's share of the batches of steps `start … stop - 1`, a few ahead, in threads.

    Threads suffice: reading files, checksums, decoding and copying large arrays leave Python's lock to others. They
    also send the batches to the device, to a GPU from pinned memory and on a stream of its own, so that a batch is
    there when its step begins. Iterate to get `(RawBatch, seconds waited)`. Use as a context manager, which closes
    the frame map as well.
    """

    def __init__(
        self,
        clips_uri: str,
        targets_uri: str | None,
        sampler: Sampler,
        *,
        recipe: Targets,
        dataset_seed: int,
        pixels: bool,
        features_uri: str | None = None,
        teacher_features: bool = False,
        motion: bool = False,
        flow: bool = False,
        boxes: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        stop: int,
        threads: int = 2,
        device: torch.device | None = None,
        frame_map: FrameMap | None = None,
    ) -> None:
        """
        Args:
            pixels: read frames; else features, of `features_uri` or, without it, of the targets.
            features_uri: a `FeatureSet` of the clips.
            motion, flow: read their motion segments, their optical flow too.
            boxes: read so many boxes of objects of each clip.
        """
        self.clips_uri, self.targets_uri, self.features_uri = clips_uri, targets_uri, features_uri
        self.sampler, self.recipe, self.dataset_seed = sampler, recipe, dataset_seed
        self.pixels, self.teacher_features = pixels, teacher_features
        self.motion, self.flow, self.boxes = motion, flow, boxes
        self.rank, self.world_size = rank, world_size
        self.start, self.stop = start, stop
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._ahead = threads + 1
        self._local = threading.local()  # Parquet readers are not safe to share
        self.device, self.frame_map = device or torch.device("cpu"), frame_map
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self.frame_map is not None:
            self.frame_map.close()

    def __iter__(self) -> Iterator[tuple[RawBatch, float]]:
        pending: list[Future[_Sent]] = []
        step = self.start
        while step < self.stop or pending:
            while step < self.stop and len(pending) < self._ahead:
                share = self.sampler.batch(step)[self.rank :: self.world_size]
                pending.append(self._pool.submit(self._send, share))
                step += 1
            waiting = time.monotonic()
            batch, copied = pending.pop(0).result()
            waited = time.monotonic() - waiting
            yield self._there(batch, copied), waited

    def of_pixels(self) -> Loader:
        """One that reads the frames of the same clips and views, of samples of one's own choice."""
        return Loader(
            self.clips_uri,
            None,
            self.sampler,
            recipe=self.recipe,
            dataset_seed=self.dataset_seed,
            pixels=True,
            rank=self.rank,
            world_size=self.world_size,
            stop=0,
            device=self.device,
        )

    def read(self, samples: list[Sample]) -> RawBatch:
        """Samples of one's own choice, on the device."""
        return self._there(*self._pool.submit(self._send, samples).result())

    def _there(self, batch: RawBatch, copied: torch.cuda.Event | None) -> RawBatch:
        """A batch that has been sent, once the device may use it."""
        if copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            batch.used_on(stream)
        return batch

    def _send(self, samples: list[Sample]) -> _Sent:
        batch = self._read(samples)
        if self._stream is None:
            return batch.to(self.device), None
        with torch.cuda.stream(self._stream):
            return batch.to(self.device), self._stream.record_event()

    def _sets(self) -> tuple[ClipSet, TargetSet | None, FeatureSet | None]:
        if not hasattr(self._local, "sets"):
            targets = TargetSet(self.targets_uri) if self.targets_uri else None
            features = FeatureSet(self.features_uri) if self.features_uri else None
            self._local.sets = (ClipSet(self.clips_uri), targets, features)
        return self._local.sets

    def _read(self, samples: list[Sample]) -> RawBatch:
        clips, targets, features = self._sets()
        views: list[View] = []
        pixels: list[torch.Tensor] = []
        cached: list[Target] = []
        for sample in samples:
            video = sample.video
            target = self._read_target(targets, sample) if targets is not None else None
            if features is not None:
                found = features.read_columns(video.shard, sample.row, sample.view, ["features"])
                stored = _of_sample(found, sample, features)
                target = replace(target, features=stored.features) if target is not None else stored
            if target is not None:
                cached.append(target)
                view = target.view
            else:
                view = make_view(
                    self.recipe,
                    self.dataset_seed,
                    video.video_id,
                    sample.clip_index,
                    sample.view,
                    video.height,
                    video.width,
                )
            views.append(view)
            if self.pixels:
                pixels.append(torch.from_numpy(apply_view(self._frames(clips, sample), view)))
        return RawBatch(
            views=views,
            pixels=pixels if self.pixels else None,
            features=_stack([t.features for t in cached]),
            target_slots=_stack([t.slots for t in cached]),
            teacher_features=_stack([t.teacher_features for t in cached]),
            samples=samples,
            **self._read_annotations(clips, samples, views),
        )

    def _read_annotations(self, clips: ClipSet, samples: list[Sample], views: list[View]) -> dict[str, Any]:
        """What is read of samples beside their pixels, by the names of `RawBatch`, as their views show it."""
        found: dict[str, Any] = {}
        seen = [(sample.video.shard, sample.row, view) for sample, view in zip(samples, views, strict=True)]
        if self.motion:
            found["motion"] = [
                torch.from_numpy(labels_in_view(clips.read_motion(shard, row), view))
                for shard, row, view in seen
            ]
        if self.flow:
            found["flow"] = [
                torch.from_numpy(flow_in_view(clips.read_flow(shard, row), view)) for shard, row, view in seen
            ]
        if self.boxes:
            found["boxes"] = _stack([clips.read_boxes(*place, self.boxes) for place in seen])
        return found

    def _frames(self, clips: ClipSet, sample: Sample) -> np.ndarray:
        """A clip as it was decoded, now or before."""
        video = sample.video
        if self.frame_map is not None:
            kept = self.frame_map.read(video, sample.clip_index)
            if kept is not None:
                return kept
        clip = clips.read_clip(video.shard, sample.row)
        if (clip.video_id, clip.clip_index) != (video.video_id, sample.clip_index):
            raise ValueError(f"{clips.uri} {video.shard}: row {sample.row} is of {clip.video_id}")
        if self.frame_map is not None:
            self.frame_map.write(video, sample.clip_index, clip.frames)
        return clip.frames

    def _read_target(self, targets: TargetSet, sample: Sample) -> Target:
        own = not self.pixels and self.features_uri is None
        place = (sample.video.shard, sample.row, sample.view)
        found = targets.read(*place, features=own, teacher_features=self.teacher_features)
        return _of_sample(found, sample, targets)


def _of_sample(found: tuple[str, int, Target], sample: Sample, table: ViewSet) -> Target:
    """A row that was found by position, if it is the sample's."""
    video_id, clip_index, target = found
    if (video_id, clip_index) != (sample.video.video_id, sample.clip_index):
        raise TargetMismatch(
            f"{table.uri} {sample.video.shard}: expected {sample.video.video_id} clip {sample.clip_index}, "
            f"found {video_id} clip {clip_index}; the {table.manifest.kind} are of other clips"
        )
    return target


def _stack(arrays: list[np.ndarray | None]) -> torch.Tensor | None:
    found = [array for array in arrays if array is not None]
    return torch.from_numpy(np.stack(found)) if found else None
