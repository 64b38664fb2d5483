"""A folder of video files and of folders of frames, with optional masks beside them.

`FOLDER/a.mp4`, `FOLDER/deep/b.webm` and `FOLDER/c/0001.jpg …` are the videos `a`, `deep/b` and `c`;
their masks, if any, are label images `FOLDER/masks/a/00000.png …`, one a frame in order, in which 0
is background and 255 is void.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from PIL import Image

from pipeline import storage
from pipeline.clips.sources.base import BadVideo, Frame, FrameIterator, VideoRef
from pipeline.clips.sources.files import HashMemo, in_threads, is_image, natural_key
from pipeline.clips.sources.frames import label_masks, reason, target_size

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")

# PyAV's logging callback takes the GIL from FFmpeg's threads and can deadlock inside Ray workers.
# FFmpeg's own callback does not; `set_level` would bring PyAV's back.
av.logging.restore_default_callback()
av.logging.set_libav_level(av.logging.PANIC)


def list_videos(
    folder: str, masks: str, *, exclude: str | None = None, memo_uri: str | None = None
) -> list[VideoRef]:
    """All videos below a local folder, sorted by id.

    Folders named `masks` hold no videos, at whatever depth; nor does the sub-folder `exclude`.

    Raises:
        FileNotFoundError: no such folder, or nothing in it that could be a video.
        ValueError: two videos that would have the same id (`a.mp4` and `a.mkv`).
    """
    if storage.is_remote(folder):
        raise ValueError(f"dataset.path {folder!r}: video folders are read from a local or mounted path")
    root = Path(folder).expanduser().absolute()
    if not root.is_dir():
        raise FileNotFoundError(f"dataset.path: there is no folder {str(root)!r}")
    paths: dict[str, Path] = {}
    for directory, folders, names in os.walk(root):
        here = Path(directory)
        folders[:] = sorted(
            f
            for f in folders
            if not f.startswith(".") and f != masks and (exclude is None or here / f != root / exclude)
        )
        found = [here / n for n in names if n.lower().endswith(VIDEO_SUFFIXES) and not n.startswith(".")]
        if not found and here != root and any(map(is_image, names)):
            found = [here]
        for path in found:
            relative = path.relative_to(root)
            video_id = str(relative if path == here else relative.with_suffix(""))
            if video_id in paths:
                raise ValueError(
                    f"{path} and {paths[video_id]} would both be the video {video_id!r}; rename one"
                )
            paths[video_id] = path
    if not paths:
        raise FileNotFoundError(
            f"dataset.path: no video in {str(root)!r} (looked for {', '.join(VIDEO_SUFFIXES)} and folders of images)"
        )
    video_ids = sorted(paths)
    memo = HashMemo(memo_uri)
    videos = in_threads(lambda v: _reference(v, paths[v], root / masks / v, memo), video_ids)
    memo.save()
    return videos


def _reference(video_id: str, path: Path, masks_path: Path, memo: HashMemo) -> VideoRef:
    files = _images(path) if path.is_dir() else [path]
    size = sum(f.stat().st_size for f in files if f.exists())
    has_masks = masks_path.is_dir()
    files += _images(masks_path) if has_masks else []
    content = storage.fingerprint([(f.name, memo.hash_or_error(f)) for f in files])
    return VideoRef(
        video_id, str(path), content, size, details={"masks": str(masks_path)} if has_masks else {}
    )


def _images(folder: Path) -> list[Path]:
    files = [f for f in folder.iterdir() if is_image(f.name)]
    return sorted(files, key=lambda f: (natural_key(f.name), f.name))


def read(video: VideoRef, short_side: int | None) -> FrameIterator:
    """All frames; raises BadVideo for what can't be decoded to its end, or masks that don't fit the frames."""
    source = Path(video.path)
    decode = _read_folder if source.is_dir() else _read_file
    masks = _images(Path(video.details["masks"])) if "masks" in video.details else None
    yield from _with_masks(decode(source, short_side), masks)


def _read_folder(folder: Path, short_side: int | None) -> FrameIterator:
    size = None
    for index, path in enumerate(_images(folder)):
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
                size = size or image.size
                if image.size != size:
                    raise BadVideo(f"frame {path.name} is {image.size}, the first one {size} (width, height)")
                height, width = target_size(image.height, image.width, short_side)
                if (width, height) != image.size:
                    image = image.resize((width, height), Image.Resampling.BICUBIC)
                yield Frame(np.asarray(image), float(index), None)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise BadVideo(f"frame {path.name} can't be decoded ({reason(error, path)})") from error


def _read_file(path: Path, short_side: int | None) -> FrameIterator:
    try:
        if path.stat().st_size == 0:
            raise BadVideo("the file is empty")
        with av.open(str(path)) as container:
            # A picture attached to an audio file is a video stream too.
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise BadVideo("the file has no video stream")
            yield from _decode(container, streams[0], short_side)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise BadVideo(f"can't be decoded ({reason(error, path)})") from error


def _decode(container: Any, stream: Any, short_side: int | None) -> FrameIterator:
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
            seconds = frame.time if frame.time is not None else float(index)
            yield Frame(pixels, float(seconds), None)
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


def _with_masks(frames: FrameIterator, masks: list[Path] | None) -> FrameIterator:
    if masks is None:
        yield from frames
        return
    count = 0
    for frame in frames:
        if count >= len(masks):
            raise BadVideo(f"has more frames than masks ({len(masks)})")
        yield frame._replace(masks=_read_masks(masks[count], frame.pixels.shape[:2]))
        count += 1
    if count != len(masks):
        raise BadVideo(f"has {count} frames but {len(masks)} masks")


def _read_masks(path: Path, shape: tuple[int, ...]) -> dict[int, np.ndarray]:
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "1"):
                raise BadVideo(f"mask {path.name} is a {image.mode} image, not one of labels")
            mask_ratio, frame_ratio = image.width / image.height, shape[1] / shape[0]
            if abs(mask_ratio / frame_ratio - 1) > 0.02:
                raise BadVideo(
                    f"mask {path.name} is {image.width}x{image.height}, its frame {shape[1]}x{shape[0]} pixels"
                )
            labels = np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.NEAREST))
    except OSError as error:
        raise BadVideo(f"mask {path.name} can't be decoded ({reason(error, path)})") from error
    return label_masks(labels)
