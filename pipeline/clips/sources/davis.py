"""DAVIS 2017 and 2016: folders of frames and of label PNGs, and lists of names.

`JPEGImages/<resolution>/<video>/00000.jpg`, `Annotations_unsupervised/<resolution>/<video>/00000.png` or
`Annotations/…` (0 background, 255 void; 2016: 255 the object) and `ImageSets/2017/<split>.txt`, `ImageSets/2016/…` or
`ImageSets/<resolution>/…`. A video without masks, or with one of its first frame alone (test-dev), is not annotated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from pipeline import storage
from pipeline.clips.sources.base import FrameIterator, VideoRef
from pipeline.clips.sources.files import HashMemo, in_threads, is_image, natural_key, read_lines, read_whole
from pipeline.clips.sources.frames import (
    RawFrame,
    decode_labels,
    fitted,
    is_one_object,
    marked_content,
    only_void,
    read_images,
    with_labels,
)
from pipeline.clips.sources.pictures import frame_mark, label_mark
from pipeline.config import Dataset
from pipeline.log import log
from pipeline.storage import FileInfo

_LABELS = ("Annotations_unsupervised", "Annotations")  # the first that has masks of a split's videos is read
_Videos = dict[str, list[FileInfo]]


def find(dataset: Dataset, split: str, memo: HashMemo) -> list[VideoRef]:
    """The videos that the split's list names, in its order.

    Raises:
        FileNotFoundError: no such split or resolution; the message names those that are there.
    """
    root = str(dataset.path)
    lines = _lines(root, split, dataset.resolution)
    images = storage.join(root, "JPEGImages", dataset.resolution)
    frames = _by_video(images)
    if not frames:
        known = storage.list_names(storage.join(root, "JPEGImages"))
        raise FileNotFoundError(
            f"dataset.resolution: no frames in {images}; resolutions: {', '.join(known) or 'none'}"
        )
    names = [name for line in lines for name in _names(line, frames)]
    labels, masks = _find_masks(root, dataset.resolution, split, names, frames)
    return in_threads(lambda name: _reference(name, images, labels, frames, masks, memo), names)


def _lines(root: str, split: str, resolution: str) -> list[str]:
    """Those of the split's list: of DAVIS 2017's, or of 2016's where that is not there."""
    folders = [storage.join(root, "ImageSets", name) for name in ("2017", "2016", resolution)]
    lists = next((folder for folder in folders if storage.list_names(folder)), folders[0])
    splits = [n.removesuffix(".txt") for n in storage.list_names(lists) if n.endswith(".txt")]
    if split not in splits:
        raise FileNotFoundError(
            f"split {split!r}: {lists} has no {split}.txt; splits: {', '.join(splits) or 'none'}"
        )
    lines = read_lines(storage.join(lists, f"{split}.txt"))
    # DAVIS 2016 lists each frame with its mask: /JPEGImages/480p/bear/00000.jpg /Annotations/480p/bear/00000.png
    pairs = [re.match(r"/?JPEGImages/[^/]+/([^/]+)/", line) for line in lines]
    return list(dict.fromkeys(pair[1] for pair in pairs if pair)) or lines


def _names(line: str, frames: _Videos) -> list[str]:
    """One name a line, which may have blanks in it; else several in one, as was always read."""
    return [line] if line in frames else [name for name in line.split(" ") if name]


def _find_masks(
    root: str, resolution: str, split: str, names: list[str], frames: _Videos
) -> tuple[str, _Videos]:
    """The folder of the split's label images, and those of each video, as far as they are masks of its frames."""
    for folder in _LABELS:
        labels = storage.join(root, folder, resolution)
        masks = _by_video(labels)
        if any(name in masks for name in names):
            break
    else:
        others = [f"{f}/{r}" for f in _LABELS for r in storage.list_names(storage.join(root, f))]
        if others and not any(storage.name(other) == resolution for other in others):
            log(
                f"split {split!r}: read as not annotated, there are masks in {', '.join(others)} alone; set "
                "dataset.resolution to use them"
            )
        return labels, {}
    if folder == "Annotations":
        # The task of these is to follow objects that are given in the first frame.
        given = [n for n in names if len(masks.get(n, [])) == 1 < len(frames.get(n, []))]
        if given:
            log(
                f"split {split!r}: {len(given)} videos have a mask of one frame alone in {labels} ({given[0]}, …), "
                "and are read as not annotated"
            )
        masks = {name: files for name, files in masks.items() if name not in given}
    return labels, masks


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
    hashes = [(f.name, memo.content(images, f, frame_mark)) for f in files]
    hashes += [(f.name, memo.content(labels, f, label_mark)) for f in labelled or []]
    content = storage.fingerprint(["davis", hashes, problem])
    if not problem and not storage.is_remote(labels):
        content = marked_content(content, [Path(labels) / f.name for f in labelled or []], memo)
    return VideoRef(
        name,
        storage.join(images, name),
        content,
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
    frames, masks = read_images(details["images"], details["frames"]), details["masks"]
    if masks is None:
        yield from frames
        return

    def read_mask(mask: str) -> tuple[bytes, str]:
        name = PurePosixPath(mask).name
        return read_whole(storage.join(details["labels"], mask), f"mask {name}"), name

    one_object = is_one_object(only_void(decode_labels(*read_mask(mask))) for mask in masks)
    for frame, mask in zip(frames, masks, strict=True):
        yield with_labels(frame, *read_mask(mask), one_object)
