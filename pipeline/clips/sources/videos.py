"""A folder of video files and of folders of frames, with optional masks beside them.

`FOLDER/a.mp4`, `FOLDER/deep/b.webm` and `FOLDER/c/0001.jpg …` are the videos `a`, `deep/b` and `c`;
their masks, if any, are label images `FOLDER/masks/a/00000.png …`, one a frame in order, in which 0
is background and 255 is void, or in a video without any other label an object.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from PIL import Image

from pipeline import storage
from pipeline.clips.sources.base import BadVideo, Frame, FrameIterator, VideoRef
from pipeline.clips.sources.files import HashMemo, in_threads, is_image, natural_key, read_whole
from pipeline.clips.sources.frames import (
    RawFrame,
    as_shown,
    decode_labels,
    fits,
    fitted,
    is_one_object,
    label_masks,
    marked_content,
    only_void,
    read_images,
    reason,
    target_size,
)
from pipeline.clips.sources.pictures import frame_mark, label_mark
from pipeline.storage import FileInfo

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")
AHEAD = 1 << 20  # bytes that are read at a time of a remote video

# PyAV's logging callback takes the GIL from FFmpeg's threads and can deadlock inside Ray workers.
# FFmpeg's own callback does not; `set_level` would bring PyAV's back.
av.logging.restore_default_callback()
av.logging.set_libav_level(av.logging.PANIC)


def list_videos(
    folder: str, masks: str, *, exclude: str | None = None, memo_uri: str | None = None
) -> list[VideoRef]:
    """All videos below a folder, local or in S3, sorted by id.

    Folders named `masks` hold no videos, at whatever depth; nor does the sub-folder `exclude`.

    Raises:
        FileNotFoundError: no such folder, or nothing in it that could be a video.
        ValueError: two videos that would have the same id (`a.mp4` and `a.mkv`).
    """
    root = storage.absolute(folder).rstrip("/")
    if storage.is_remote(root):
        listing = _list_objects(root)
        found = sorted((here, list(files)) for here, files in listing.items())
        paths = _choose(root, [(h, n) for h, n in found if not _is_apart(h, masks, exclude)])
        videos = [_remote_reference(root, v, paths[v], masks, listing) for v in sorted(paths)]
    else:
        if not Path(root).is_dir():
            raise FileNotFoundError(f"dataset.path: there is no folder {root!r}")
        paths = _choose(root, _walk(root, masks, exclude))
        memo = HashMemo(memo_uri)
        videos = in_threads(
            lambda v: _reference(v, Path(root) / paths[v], Path(root) / masks / v, memo), sorted(paths)
        )
        memo.save()
    if not videos:
        raise FileNotFoundError(
            f"dataset.path: no video in {root!r} (looked for {', '.join(VIDEO_SUFFIXES)} and folders of images)"
        )
    return videos


def _walk(root: str, masks: str, exclude: str | None) -> Iterator[tuple[str, list[str]]]:
    """Folders below a local one, as paths from there, with the names of their files."""
    for directory, folders, names in os.walk(root):
        here = os.path.relpath(directory, root).replace(os.sep, "/").removeprefix(".")
        folders[:] = sorted(f for f in folders if not _is_apart(f"{here}/{f}".lstrip("/"), masks, exclude))
        yield here, names


def _is_apart(folder: str, masks: str, exclude: str | None) -> bool:
    """Whether a folder, or one that it is in, is hidden, of masks, or `exclude`."""
    parts = PurePosixPath(folder).parts
    hidden = any(part.startswith(".") or part == masks for part in parts)
    return hidden or (
        exclude is not None and parts[: len(PurePosixPath(exclude).parts)] == PurePosixPath(exclude).parts
    )


def _list_objects(root: str) -> dict[str, dict[str, FileInfo]]:
    """What lies below a remote folder: of each folder there the files by name."""
    listing: dict[str, dict[str, FileInfo]] = {}
    for file in storage.list_files(root):
        here, _, name = file.name.rpartition("/")
        listing.setdefault(here, {})[name] = file
    return listing


def _choose(root: str, folders: Iterable[tuple[str, list[str]]]) -> dict[str, str]:
    """The paths of videos below `root` by id, from its folders with the names of their files."""
    paths: dict[str, str] = {}
    for here, names in folders:
        found = [
            f"{here}/{n}".lstrip("/")
            for n in names
            if n.lower().endswith(VIDEO_SUFFIXES) and not n.startswith(".")
        ]
        if not found and here and any(map(is_image, names)):
            found = [here]
        for path in found:
            video_id = path if path == here else str(PurePosixPath(path).with_suffix(""))
            if video_id in paths:
                raise ValueError(
                    f"{storage.join(root, path)} and {storage.join(root, paths[video_id])} would both be the video "
                    f"{video_id!r}; rename one"
                )
            paths[video_id] = path
    return paths


def _reference(video_id: str, path: Path, masks_path: Path, memo: HashMemo) -> VideoRef:
    files = [path / name for name in _images(str(path))] if path.is_dir() else [path]
    size = sum(f.stat().st_size for f in files if f.exists())
    has_masks = masks_path.is_dir()
    masks = [masks_path / name for name in _images(str(masks_path))] if has_masks else []
    hashes = [(f.name, memo.hash_or_error(f, frame_mark if path.is_dir() else None)) for f in files]
    hashes += [(f.name, memo.hash_or_error(f, label_mark)) for f in masks]
    content = marked_content(storage.fingerprint(hashes), masks, memo)
    return VideoRef(
        video_id, str(path), content, size, details={"masks": str(masks_path)} if has_masks else {}
    )


def _remote_reference(
    root: str, video_id: str, path: str, masks: str, listing: dict[str, dict[str, FileInfo]]
) -> VideoRef:
    """Nothing is opened: ETags and sizes stand for the content."""
    here, _, name = path.rpartition("/")
    is_folder = name not in listing.get(here, {})
    files = listing[path] if is_folder else {name: listing[here][name]}
    chosen = [files[n] for n in (_sorted_images(files) if is_folder else files)]
    masks_path = f"{masks}/{video_id}"
    mask_files = listing.get(masks_path, {})
    versions = [
        (f.name, f.version, f.size) for f in chosen + [mask_files[n] for n in _sorted_images(mask_files)]
    ]
    details: dict[str, Any] = {"folder": True} if is_folder else {}
    if masks_path in listing:
        details["masks"] = storage.join(root, masks_path)
    size = sum(file.size for file in chosen)
    return VideoRef(video_id, storage.join(root, path), storage.fingerprint(versions), size, details=details)


def _images(folder: str) -> list[str]:
    return _sorted_images(storage.list_names(folder))


def _sorted_images(names: Iterable[str]) -> list[str]:
    return sorted(filter(is_image, names), key=lambda name: (natural_key(name), name))


def read(video: VideoRef, short_side: int | None) -> FrameIterator:
    """All frames; raises BadVideo for what can't be decoded to its end, or masks that don't fit the frames.

    Storage that fails is no bad video: then its error is raised.
    """
    is_folder = video.details.get("folder") or os.path.isdir(video.path)
    stored = read_images(video.path, _images(video.path)) if is_folder else _read_file(video, short_side)
    frames, masks = fitted(stored, short_side), video.details.get("masks")
    yield from _with_masks(frames, masks) if masks else frames


def _read_file(video: VideoRef, short_side: int | None) -> Iterator[RawFrame]:
    """A video file's frames. FFmpeg resizes them while it converts their colours, which is one pass fewer."""
    remote = None
    if storage.is_remote(video.path):
        remote = storage.RangeFile(video.path, 0, video.bytes, ahead=AHEAD)
    try:
        if (video.bytes if remote else os.path.getsize(video.path)) == 0:
            raise BadVideo("the file is empty")
        with av.open(remote or storage.absolute(video.path)) as container:
            # A picture attached to an audio file is a video stream too.
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise BadVideo("the file has no video stream")
            yield from _decode(container, streams[0], short_side)
    except (BadVideo, av.error.FFmpegError, OSError, ValueError) as error:
        # FFmpeg takes a read that failed for the end of the file, or for damage.
        if remote and remote.failure:
            raise remote.failure from error
        if isinstance(error, BadVideo):
            raise
        raise BadVideo(f"can't be decoded ({reason(error, video.path)})") from error
    if remote and remote.failure:
        raise remote.failure


def _decode(container: Any, stream: Any, short_side: int | None) -> Iterator[RawFrame]:
    stream.thread_count = 1  # Ray runs one task a core
    packets = index = 0
    reach = 0.0  # seconds up to which any stream has data
    for packet in container.demux():
        if packet.size and packet.pts is not None:
            reach = max(reach, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream is not stream:
            continue
        packets += packet.size > 0
        for frame in packet.decode():
            height, width = target_size(frame.height, frame.width, short_side)
            image = frame.reformat(width, height, "rgb24", interpolation="BICUBIC", threads=1)
            pixels = image.to_ndarray()
            if frame.rotation:  # degrees counter-clockwise, from the file's display matrix
                pixels = np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
            yield RawFrame(str(index), pixels, seconds=None if frame.time is None else float(frame.time))
            index += 1
    if index == 0:
        raise BadVideo("not one frame could be decoded")
    # A cut file often just ends. MP4 declares its frames, Matroska its duration.
    if stream.frames and packets < stream.frames:
        raise BadVideo(f"truncated: {packets} of {stream.frames} frames are there")
    declared = (container.duration or 0) / av.time_base
    start = (container.start_time or 0) / av.time_base
    if declared and not stream.frames and reach - start < declared - max(1.0, 0.05 * declared):
        raise BadVideo(f"truncated: {reach - start:.1f} of {declared:.1f} seconds are there")


def _with_masks(frames: FrameIterator, folder: str) -> FrameIterator:
    """Frames with the masks of a folder's label images, one each in order."""
    names = _images(folder)
    one_object = is_one_object(only_void(_read_labels(folder, name)) for name in names)
    count = 0
    for frame in frames:
        if count >= len(names):
            raise BadVideo(f"has more frames than masks ({len(names)})")
        yield frame._replace(masks=_read_masks(folder, names[count], frame, one_object))
        count += 1
    if count != len(names):
        raise BadVideo(f"has {count} frames but {len(names)} masks")


def _read_labels(folder: str, name: str) -> np.ndarray:
    return decode_labels(read_whole(storage.join(folder, name), f"mask {name}"), name)


def _read_masks(folder: str, name: str, frame: Frame, one_object: bool) -> dict[int, np.ndarray]:
    """Masks (H, W) bool at a frame's size, of a label image that may have another one of the same shape.

    Where a pixel's centre falls between two of the label image, Pillow takes another one than `nearest_resize`: it
    stays Pillow, as what is written under a fingerprint does.
    """
    size = frame.pixels.shape[:2]
    labels = as_shown(_read_labels(folder, name), size, frame.orientation)
    (mask_height, mask_width), (height, width) = labels.shape, size
    if not fits(labels.shape, size):
        raise BadVideo(f"mask {name} is {mask_width}x{mask_height}, its frame {width}x{height} pixels")
    resized = Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST)
    return label_masks(np.asarray(resized), one_object)
