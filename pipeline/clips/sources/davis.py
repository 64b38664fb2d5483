"""DAVIS 2017: folders of frames and of palette PNGs, and lists of names.

`JPEGImages/<resolution>/<video>/00000.jpg`, `Annotations_unsupervised/<resolution>/<video>/00000.png`
(0 background, 255 void) and `ImageSets/2017/<split>.txt`. A video without a folder of masks (test-dev)
is not annotated.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from pipeline import storage
from pipeline.clips.sources.base import FrameIterator, VideoRef
from pipeline.clips.sources.files import HashMemo, in_threads, is_image, natural_key, read_lines, read_whole
from pipeline.clips.sources.frames import RawFrame, fitted, read_images, with_labels
from pipeline.config import Dataset
from pipeline.storage import FileInfo

_Videos = dict[str, list[FileInfo]]


def find(dataset: Dataset, split: str, memo: HashMemo) -> list[VideoRef]:
    """The videos that the split's list names, in its order.

    Raises:
        FileNotFoundError: no such split or resolution; the message names those that are there.
    """
    root = str(dataset.path)
    lists = storage.join(root, "ImageSets", "2017")
    splits = [n.removesuffix(".txt") for n in storage.list_names(lists) if n.endswith(".txt")]
    if split not in splits:
        raise FileNotFoundError(
            f"split {split!r}: {lists} has no {split}.txt; splits: {', '.join(splits) or 'none'}"
        )
    lines = read_lines(storage.join(lists, f"{split}.txt"))
    images = storage.join(root, "JPEGImages", dataset.resolution)
    labels = storage.join(root, "Annotations_unsupervised", dataset.resolution)
    frames, masks = _by_video(images), _by_video(labels)
    if not frames:
        known = storage.list_names(storage.join(root, "JPEGImages"))
        raise FileNotFoundError(
            f"dataset.resolution: no frames in {images}; resolutions: {', '.join(known) or 'none'}"
        )
    # One name a line, which may have blanks in it; else several in one, as was always read.
    names = [name for line in lines for name in ([line] if line in frames else line.split(" ")) if name]
    return in_threads(lambda name: _reference(name, images, labels, frames, masks, memo), names)


def _by_video(folder: str) -> _Videos:
    found: _Videos = {}
    for file in storage.list_files(folder):
        video, _, name = file.name.rpartition("/")
        if is_image(name):
            found.setdefault(video, []).append(file)
    return {v: sorted(files, key=lambda f: natural_key(f.name)) for v, files in found.items()}


def _reference(
    name: str, images: str, labels: str, frames: _Videos, masks: _Videos, memo: HashMemo
) -> VideoRef:
    files, labelled = frames.get(name, []), masks.get(name)
    mask_names = {PurePosixPath(f.name).stem: f.name for f in labelled or []}
    stems = [PurePosixPath(f.name).stem for f in files]
    if not files:
        problem = f"is in the list of the split, but has no frames in {images}"
    elif labelled is not None and set(mask_names) != set(stems):
        missing = [f"mask {s}.png is missing" for s in stems if s not in mask_names]
        problem = (missing or [f"mask {s}.png has no frame" for s in mask_names if s not in stems])[0]
    else:
        problem = ""
    content = [(f.name, memo.content(images, f)) for f in files]
    content += [(f.name, memo.content(labels, f)) for f in labelled or []]
    return VideoRef(
        name,
        storage.join(images, name),
        storage.fingerprint(["davis", content, problem]),
        sum(f.size for f in files) + sum(f.size for f in labelled or []),
        "davis",
        {
            "images": images,
            "frames": [f.name for f in files],
            "labels": labels,
            "masks": [mask_names.get(s, "") for s in stems] if labelled is not None else None,
        },
        problem,
    )


def read(video: VideoRef, short_side: int | None) -> FrameIterator:
    """Raises BadVideo for a frame or mask that can't be decoded, or of another size than the others."""
    yield from fitted(_decoded(video), short_side)


def _decoded(video: VideoRef) -> Iterator[RawFrame]:
    details = video.details
    for index, frame in enumerate(read_images(details["images"], details["frames"])):
        if details["masks"] is not None:
            mask = details["masks"][index]
            mask_name = PurePosixPath(mask).name
            content = read_whole(storage.join(details["labels"], mask), f"mask {mask_name}")
            frame = with_labels(frame, content, mask_name)
        yield frame
