"""COCO: images as videos of one frame, with overlapping objects.

The images are `<split>/*.jpg` or `images/<split>/*.jpg`, the JSON is `annotations/instances_<split>.json`.
An image without objects is annotated, and empty; crowds are left out. Annotations are of the image as viewers show
it, or as stored, whichever size they have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pipeline import storage
from pipeline.clips.sources.annotations import (
    declared_size,
    find_json,
    is_box_alone,
    is_read_since,
    read_annotations,
    with_objects,
)
from pipeline.clips.sources.base import FrameIterator, VideoRef
from pipeline.clips.sources.files import HashMemo, in_threads, natural_key, read_whole
from pipeline.clips.sources.frames import RawFrame, decode_frame, fitted
from pipeline.clips.sources.pictures import frame_mark
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
    others = [n for n in storage.list_names(annotations) if n.endswith(f"{split}.json")]
    uri = find_json([place], split, lambda: _splits(annotations), others)
    images, objects = read_annotations(uri, "images", "image_id", "segmentation")
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
        problem = "" if file else f"the image {name} is missing in {folder}"
        content = storage.fingerprint(
            ["coco", file and memo.content(folder, file, frame_mark), segmentations, size]
        )
        if own and all(is_box_alone(entry, "segmentation") for entry in own):
            problem = problem or f"its {len(own)} objects have boxes, but no segmentation"
            content = storage.fingerprint(["boxes", content])
        elif any(map(is_read_since, segmentations or [])):
            content = storage.fingerprint(["rings", content])
        return VideoRef(
            name.rsplit(".", 1)[0],
            storage.join(folder, name),
            content,
            file.size if file else 0,
            "coco",
            {"objects": segmentations, "size": size},
            problem,
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
    frame = decode_frame(read_whole(video.path, name), name)
    if video.details["objects"] is not None:
        frame = with_objects(frame, video.details["objects"], video.details["size"])
    yield frame
