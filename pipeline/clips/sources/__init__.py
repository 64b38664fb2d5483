"""Readers: one module a data-set layout, each listing videos and yielding their frames."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from pipeline import storage
from pipeline.clips.sources import coco, davis, movi, videos, webdataset, ytvis
from pipeline.clips.sources.base import BadVideo, Frame, FrameIterator, VideoRef
from pipeline.clips.sources.files import HashMemo
from pipeline.clips.sources.frames import resample
from pipeline.clips.sources.motion_files import with_motion, with_motion_files
from pipeline.config import ConfigError, Dataset, NamedSplit, parse_split
from pipeline.log import is_storable, printable

__all__ = ["BadVideo", "Frame", "FrameIterator", "VideoRef", "list_videos", "read_video"]


class Source(NamedTuple):
    """A layout's reader: the videos of a split in their order, and the frames of one of them."""

    find: Callable[[Dataset, str, HashMemo], list[VideoRef]]
    read: Callable[[VideoRef, int | None], FrameIterator]


_SOURCES = {
    "davis": Source(davis.find, davis.read),
    "ytvis": Source(ytvis.find, ytvis.read),
    "ovis": Source(ytvis.find, ytvis.read),
    "movi": Source(movi.find, movi.read),
    "coco": Source(coco.find, coco.read),
    "webdataset": Source(webdataset.find, webdataset.read),
}


def list_videos(
    dataset: Dataset, split: str, *, held_out: str | None = None, memo_folder: str | None = None
) -> list[VideoRef]:
    """The videos of a split, or of a slice of it, in their order.

    Args:
        held_out: a sub-folder that a folder of videos is listed without, where all of it is meant.
        memo_folder: where what was read for this is remembered: hashes of local files, headers.

    Raises:
        ConfigError: a split of `dataset.splits` asks for videos that the listed split does not have.
        FileNotFoundError: no such folder, split or file, or no video in it; the message says where
            has been looked, and which splits there are.
        ValueError: two videos of one id, or annotations that can't be understood.
    """
    if not dataset.path:
        raise ValueError("dataset.path: is not set; give the folder that holds the videos")
    named, part = parse_split(split)
    name = dataset.listed(split)
    place = storage.join(dataset.path, name) if name else dataset.path
    key = [dataset.kind, dataset.resolution, place] if dataset.kind in _SOURCES else place
    memo_uri = memo_folder and storage.join(memo_folder, f"{storage.fingerprint(key)}.json")
    if dataset.kind not in _SOURCES:
        exclude = held_out if not name else None
        found = videos.list_videos(place, dataset.masks, exclude=exclude, memo_uri=memo_uri)
    else:
        memo = HashMemo(memo_uri)
        found = _SOURCES[dataset.kind].find(dataset, name, memo)
        memo.save()
    _check_unique(found)
    found = [_checked(video) for video in found]
    if named in dataset.splits:
        found = _part_by_name(named, dataset.splits[named], found)
    if not found[part]:
        raise FileNotFoundError(f"no video: {split!r} is empty, {place} has {len(found)}")
    if dataset.motion is None:
        return found[part]
    memo = HashMemo(memo_uri and memo_uri.replace(".json", "-motion.json"))
    found = with_motion_files(found[part], dataset.motion, memo)
    memo.save()
    return found


def _part_by_name(name: str, split: NamedSplit, found: list[VideoRef]) -> list[VideoRef]:
    """A split's videos in the order that they were found in."""
    if split.skip >= len(found):
        raise ConfigError(
            f"dataset.splits.{name}.skip: {split.skip} leaves none of the {len(found)} videos of {split.of!r}; "
            f"nearest valid: {len(found) - 1}"
        )
    if split.take is not None and split.skip + split.take > len(found):
        raise ConfigError(
            f"dataset.splits.{name}.take: there are {len(found)} videos of {split.of!r}, not {split.take} after "
            f"{split.skip}; nearest valid: {len(found) - split.skip}"
        )
    names = sorted((video.video_id for video in found), key=lambda i: hashlib.sha256(i.encode()).hexdigest())
    chosen = set(names[split.part])
    return [video for video in found if video.video_id in chosen]


def _check_unique(found: list[VideoRef]) -> None:
    paths: dict[str, str] = {}
    for video in found:
        if video.video_id in paths:
            raise ValueError(
                f"two videos have the id {video.video_id!r}: {paths[video.video_id]} and {video.path}"
            )
        paths[video.video_id] = video.path


def _checked(video: VideoRef) -> VideoRef:
    """Sets a video aside whose id can't be stored, or would lead out of a folder that files are named by it in."""
    if problem := _problem_of_name(video.video_id):
        shown = printable(video.video_id)
        return video._replace(
            video_id=shown,
            path=printable(video.path),
            problem=f"the name '{shown}' can't be used: {problem}; rename it",
        )
    if not video.video_id.isprintable():
        # Earlier versions set these aside, so that their clip sets are others.
        return video._replace(content=storage.fingerprint(["unusual name", video.content]))
    return video


def _problem_of_name(video_id: str) -> str:
    parts = PurePosixPath(video_id).parts
    if not is_storable(video_id):
        return "it has bytes that are no UTF-8"
    if not parts:
        return "it is empty"
    if parts[0] == "/" or ".." in parts or "//" in video_id:
        return "it leads out of a folder"
    if "\\" in video_id:
        return "it has a backslash, which leads out of a folder on some systems"
    if printable(video_id) != video_id:
        return "it has a control character"
    return ""


def read_video(
    video: VideoRef,
    *,
    short_side: int | None = None,
    fps: float | None = None,
    max_seconds: float | None = None,
    square: bool = True,
    flow: Sequence[str] = (),
) -> FrameIterator:
    """Yields a video's frames in the order they are shown, at most a few at a time in memory.

    Args:
        short_side: pixels of the shorter side after resizing (bicubic; masks: nearest); None keeps it.
        fps: frames a second to keep, each the one on display at that time; None keeps them all.
            Layouts without a clock count frames instead of seconds.
        max_seconds: stop there.
        square: show square pixels where a video file says that its own are none.
        flow: of `FLOW_DIRECTIONS` those whose flow is wanted too, of a layout that has some: MOVi.

    Raises:
        BadVideo: what can't be decoded to its end, or masks that don't fit the frames.
    """
    if video.problem:
        raise BadVideo(video.problem)
    if flow:
        frames = movi.read(video, short_side, flow)
    elif video.kind in _SOURCES:
        frames = _SOURCES[video.kind].read(video, short_side)
    else:
        frames = videos.read(video, short_side, square=square)
    if "motion" in video.details:
        frames = with_motion(frames, video)
    yield from resample(frames, fps, max_seconds)
