"""COCO: images as videos of one frame, with overlapping objects.

The images are `<split>/*.jpg` or `images/<split>/*.jpg`, the JSON is `annotations/instances_<split>.json`.
An image without objects is annotated, and empty; crowds are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pipeline import storage
from pipeline.clips.sources.annotations import declared_size, find_json, read_annotations, with_objects
from pipeline.clips.sources.base import FrameIterator, VideoRef
from pipeline.clips.sources.files import HashMemo, in_threads, natural_key, read_whole
from pipeline.clips.sources.frames import RawFrame, decode_image, fitted
from pipeline.config import Dataset


def find(dataset: Dataset, split: str, memo: HashMemo) -> list[VideoRef]:
    """The images of the split's JSON, by their numbers.

    Raises:
        FileNotFoundError: no JSON or no images; the message names all places looked in.
        ValueError: the JSON is damaged, or has objects of images that are not in it.
    """
    root = str(dataset.path)
    annotations = storage.join(root, "annotations")
    place = storage.join(annotations, f"instances_{split}.json")
    uri = find_json([place], split, lambda: _splits(annotations))
    images, objects = read_annotations(uri, "images", "image_id")
    folders = [storage.join(root, split), storage.join(root, "images", split)]
    for folder in folders:
        files = {file.name: file for file in storage.list_files(folder)}
        if files:
            break
    else:
        raise FileNotFoundError(f"split {split!r}: no images; looked in {', '.join(folders)}")

    def reference(number: Any) -> VideoRef:
        image, own = images[number], None if objects is None else objects[number]
        name = str(image.get("file_name"))
        file, size = files.get(name), declared_size(image)
        segmentations = None if own is None else [entry.get("segmentation") for entry in own]
        return VideoRef(
            name.rsplit(".", 1)[0],
            storage.join(folder, name),
            storage.fingerprint(["coco", file and memo.content(folder, file), segmentations, size]),
            file.size if file else 0,
            "coco",
            {"objects": segmentations, "size": size},
            "" if file else f"the image {name} is missing in {folder}",
        )

    return in_threads(reference, sorted(images, key=lambda n: natural_key(str(n))))


def _splits(annotations: str) -> list[str]:
    matches = [re.fullmatch(r"instances_(.+)\.json", n) for n in storage.list_names(annotations)]
    return [match[1] for match in matches if match]


def read(video: VideoRef, short_side: int | None) -> FrameIterator:
    """Raises BadVideo for an image or mask that can't be decoded, or masks of another size."""
    yield from fitted(_decoded(video), short_side)


def _decoded(video: VideoRef) -> Iterator[RawFrame]:
    name = storage.name(video.path)
    frame = RawFrame(name, decode_image(read_whole(video.path, name), name))
    if video.details["objects"] is not None:
        frame = with_objects(frame, video.details["objects"], video.details["size"])
    yield frame
