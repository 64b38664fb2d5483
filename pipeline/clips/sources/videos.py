"""A folder of video files and of folders of frames, with optional masks beside them.

`FOLDER/a.mp4`, `FOLDER/deep/b.webm` and `FOLDER/c/0001.jpg …` are the videos `a`, `deep/b` and `c`;
their masks, if any, are label images `FOLDER/masks/a/00000.png …`, one a frame in order, in which 0
is background and 255 is void, or in a video without any other label an object.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import storage
from pipeline.clips.sources.base import BadVideo, Frame, FrameIterator, VideoRef
from pipeline.clips.sources.container import outline, read_file, reads_differently
from pipeline.clips.sources.files import HashMemo, in_threads, is_image, natural_key, read_whole
from pipeline.clips.sources.folders import FIRST_SUFFIXES, choose, is_apart, walk
from pipeline.clips.sources.frames import (
    as_shown,
    decode_labels,
    fits,
    fitted,
    is_one_object,
    label_masks,
    marked_content,
    only_void,
    read_images,
)
from pipeline.clips.sources.pictures import frame_mark, label_mark
from pipeline.log import log, printable
from pipeline.storage import FileInfo

READER = "reader 2"  # in the content of videos that the first reader showed otherwise, or could not read


def list_videos(
    folder: str, masks: str, *, exclude: str | None = None, memo_uri: str | None = None
) -> list[VideoRef]:
    """All videos below a folder, local or in S3, sorted by id. What is left out there is logged.

    Folders named `masks` hold no videos, at whatever depth; nor does the sub-folder `exclude`.

    Raises:
        FileNotFoundError: no such folder, or nothing in it that could be a video.
        ValueError: two videos that would have the same id (`a.mp4` and `a.mkv`).
    """
    root = storage.absolute(folder).rstrip("/")
    memo = HashMemo(memo_uri)
    if storage.is_remote(root):
        listing = _list_objects(root)
        folders = sorted((here, list(files)) for here, files in listing.items())
        choice = choose(root, [(h, n) for h, n in folders if not is_apart(h, masks, exclude)])
        videos = in_threads(
            lambda v: _remote_reference(root, v, choice.paths[v], masks, listing, memo), sorted(choice.paths)
        )
    else:
        if not Path(root).is_dir():
            raise FileNotFoundError(f"dataset.path: there is no folder {root!r}")
        choice = choose(root, walk(root, masks, exclude))
        paths = {v: Path(root) / path for v, path in choice.paths.items()}
        videos = in_threads(
            lambda v: _reference(v, paths[v], Path(root) / masks / v, memo), sorted(choice.paths)
        )
    left_out = choice.left_out_in_words()
    memo.save()
    if not videos:
        raise FileNotFoundError(
            f"dataset.path: no video in {root!r} (looked for video files, such as {', '.join(FIRST_SUFFIXES)}, and "
            f"folders of images{f'; {left_out}' if left_out else ''})"
        )
    if left_out:
        log(f"videos in {root}: {left_out}")
    return videos


def _list_objects(root: str) -> dict[str, dict[str, FileInfo]]:
    """What lies below a remote folder: of each folder there the files by name."""
    listing: dict[str, dict[str, FileInfo]] = {}
    for file in storage.list_files(root):
        here, _, name = file.name.rpartition("/")
        listing.setdefault(here, {})[name] = file
    return listing


def _reference(video_id: str, path: Path, masks_path: Path, memo: HashMemo) -> VideoRef:
    files = [path / name for name in _images(str(path))] if path.is_dir() else [path]
    size = sum(f.stat().st_size for f in files if f.exists())
    has_masks = masks_path.is_dir()
    masks = [masks_path / name for name in _images(str(masks_path))] if has_masks else []
    hashes = [(f.name, memo.hash_or_error(f, frame_mark if path.is_dir() else None)) for f in files]
    hashes += [(f.name, memo.hash_or_error(f, label_mark)) for f in masks]
    content = marked_content(storage.fingerprint(hashes), masks, memo)
    if path.is_file():
        status = path.stat()
        file = FileInfo(path.name, status.st_size, str(status.st_mtime_ns))
        content = _marked(content, str(path.parent), file, memo)
    return VideoRef(
        video_id, str(path), content, size, details={"masks": str(masks_path)} if has_masks else {}
    )


def _remote_reference(
    root: str, video_id: str, path: str, masks: str, listing: dict[str, dict[str, FileInfo]], memo: HashMemo
) -> VideoRef:
    """ETags and sizes stand for the content; of video files no more than the beginning is read."""
    here, _, name = path.rpartition("/")
    is_folder = name not in listing.get(here, {})
    files = listing[path] if is_folder else {name: listing[here][name]}
    chosen = [files[n] for n in (_sorted_images(files) if is_folder else files)]
    masks_path = f"{masks}/{video_id}"
    mask_files = listing.get(masks_path, {})
    versions = [
        (f.name, f.version, f.size) for f in chosen + [mask_files[n] for n in _sorted_images(mask_files)]
    ]
    content = storage.fingerprint(versions)
    if not is_folder:
        content = _marked(content, root, files[name], memo)
    details: dict[str, Any] = {"folder": True} if is_folder else {}
    if masks_path in listing:
        details["masks"] = storage.join(root, masks_path)
    size = sum(file.size for file in chosen)
    return VideoRef(video_id, storage.join(root, path), content, size, details=details)


def _marked(content: str, folder: str, file: FileInfo, memo: HashMemo) -> str:
    """A video file's content, which is another one where the first reader showed it otherwise, or refused it."""
    if not file.name.lower().endswith(FIRST_SUFFIXES):
        return content
    differs = memo.walk(
        folder, file, lambda uri, size: reads_differently(VideoRef(file.name, uri, bytes=size)), READER
    )
    return storage.fingerprint([READER, content]) if differs else content


def _images(folder: str) -> list[str]:
    return _sorted_images(storage.list_names(folder))


def _sorted_images(names: Iterable[str]) -> list[str]:
    return sorted(filter(is_image, names), key=lambda name: (natural_key(name), name))


def read(video: VideoRef, short_side: int | None, *, square: bool = True) -> FrameIterator:
    """All frames; raises BadVideo for what can't be decoded to its end, or masks that don't fit the frames.

    Storage that fails is no bad video: then its error is raised.

    Args:
        square: show video files with square pixels, see `read_file`.
    """
    if is_folder(video):
        stored = read_images(video.path, _images(video.path))
    else:
        stored = read_file(video, short_side, square=square)
    frames = fitted(stored, short_side)
    if folder := video.details.get("masks"):
        yield from (frame._replace(masks=masks) for frame, masks in with_labels_of(folder, frames, video))
    else:
        yield from frames


def is_folder(video: VideoRef) -> bool:
    """Whether a video's frames are the files of a folder."""
    return bool(video.details.get("folder")) or os.path.isdir(video.path)


def with_labels_of(
    folder: str, frames: FrameIterator, video: VideoRef, what: str = "masks"
) -> Iterator[tuple[Frame, dict[int, np.ndarray]]]:
    """Frames, each with the masks of a folder's label images, one each in order.

    Raises:
        BadVideo: they can't be read, or don't fit the frames; it calls them `what`.
    """
    names = _images(folder)
    if not names and (others := storage.list_names(folder)):
        raise BadVideo(
            f"its {what} are in a format that is not read ({printable(others[0])}, …); save them as PNG"
        )
    one_object = is_one_object(only_void(_read_labels(folder, name)) for name in names)
    count = 0
    for frame in frames:
        if count >= len(names):
            raise BadVideo(f"has more frames than {what} ({len(names)})")
        yield frame, _read_masks(video, folder, names[count], frame, one_object)
        count += 1
    if count != len(names):
        raise BadVideo(f"has {count} frames but {len(names)} {what}")


def _read_labels(folder: str, name: str) -> np.ndarray:
    return decode_labels(read_whole(storage.join(folder, name), f"mask {name}"), name)


def _read_masks(
    video: VideoRef, folder: str, name: str, frame: Frame, one_object: bool
) -> dict[int, np.ndarray]:
    """Masks (H, W) bool at a frame's size, of a label image that may have another one of the same shape.

    Where a pixel's centre falls between two of the label image, Pillow takes another one than `nearest_resize`: it
    stays Pillow, as what is written under a fingerprint does.
    """
    size = frame.pixels.shape[:2]
    labels = as_shown(_read_labels(folder, name), size, frame.orientation)
    (mask_height, mask_width), (height, width) = labels.shape, size
    if not fits(labels.shape, size) and not _is_of_other_pixels(video, labels.shape, size):
        raise BadVideo(f"mask {name} is {mask_width}x{mask_height}, its frame {width}x{height} pixels")
    resized = Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST)
    return label_masks(np.asarray(resized), one_object)


def _is_of_other_pixels(video: VideoRef, mask: Sequence[int], frame: Sequence[int]) -> bool:
    """Whether a mask is so much wider than its frame because one has the stored pixels, and the other square ones."""
    if is_folder(video) or video.kind != "videos":
        return False
    aspect = float(outline(video).aspect)
    return any(fits((mask[0], mask[1] * stretch), frame) for stretch in (aspect, 1 / aspect))
