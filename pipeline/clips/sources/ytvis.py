"""YouTube-VIS and OVIS: folders of frames, and one JSON a split in the way of COCO's.

The frames are `<split>/JPEGImages/<file>`, `<split>/<file>`, `JPEGImages/<split>/<file>` or
`JPEGImages/<file>`; the JSON is `<split>/instances.json`, `<split>.json`, `annotations_<split>.json` or
`annotations/instances_<split>.json`. A JSON without `annotations` (valid) is a split without masks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
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
from pipeline.clips.sources.files import HashMemo, in_threads, natural_key
from pipeline.clips.sources.frames import RawFrame, fitted, read_images
from pipeline.clips.sources.pictures import frame_mark
from pipeline.config import Dataset
from pipeline.storage import FileInfo


def find(dataset: Dataset, split: str, memo: HashMemo) -> list[VideoRef]:
    """The videos of the split's JSON, by their numbers.

    Raises:
        FileNotFoundError: no JSON or no frames; the message names all places looked in.
        ValueError: the JSON is damaged, or has objects of videos that are not in it.
    """
    root = str(dataset.path)
    places = [f"{split}/instances.json", f"{split}.json", f"annotations_{split}.json"]
    places.append(f"annotations/instances_{split}.json")
    uri = find_json([storage.join(root, place) for place in places], split, lambda: _splits(root))
    videos, objects = read_annotations(uri, "videos", "video_id", "segmentations")
    wanted = {name for video in videos.values() for name in _names(video)}
    images, files = _find_images(root, split, wanted)

    def reference(number: Any) -> VideoRef:
        own = None if objects is None else objects[number]
        return _reference(number, videos[number], own, dataset.kind, images, files, memo)

    return in_threads(reference, sorted(videos, key=lambda n: natural_key(str(n))))


def _names(video: dict[str, Any]) -> list[str]:
    names = video.get("file_names")
    return [str(name) for name in names] if isinstance(names, list) else []


def _splits(root: str) -> set[str]:
    """The splits that have a JSON in one of the known places."""
    found = set()
    top = storage.list_names(root)
    for name in [*top, *(f"annotations/{n}" for n in storage.list_names(storage.join(root, "annotations")))]:
        match = re.fullmatch(r"(?:annotations_|annotations/instances_)?([^/]+)\.json", name)
        if match:
            found.add(match[1])
        elif "." not in name and storage.exists(storage.join(root, name, "instances.json")):
            found.add(name)
    return found


def _find_images(root: str, split: str, wanted: set[str]) -> tuple[str, dict[str, FileInfo]]:
    """The folder below which the frames are, and its files by name."""
    places = [f"{split}/JPEGImages", split, f"JPEGImages/{split}", "JPEGImages"]
    folders = [storage.join(root, place) for place in places]
    for folder in folders:
        files = {file.name: file for file in storage.list_files(folder) if file.name in wanted}
        if files:
            return folder, files
    raise FileNotFoundError(f"split {split!r}: none of its frames is there; looked in {', '.join(folders)}")


def _reference(
    number: Any,
    video: dict[str, Any],
    objects: list[dict[str, Any]] | None,
    kind: str,
    images: str,
    files: dict[str, FileInfo],
    memo: HashMemo,
) -> VideoRef:
    names = _names(video)
    folder = PurePosixPath(names[0]).parent.name if names else ""
    found = [files[name] for name in names if name in files]
    segmentations = None if objects is None else [entry.get("segmentations") for entry in objects]
    size = declared_size(video)
    files_read = [(file.name, memo.content(images, file, frame_mark)) for file in found]
    problem = _problem(video, names, files, segmentations)
    if not problem and objects and all(is_box_alone(entry, "segmentations") for entry in objects):
        problem = f"its {len(objects)} objects have boxes, but no segmentations"
    content = storage.fingerprint(["ytvis", names, files_read, segmentations, size, problem])
    if not problem and any(is_read_since(part) for entries in segmentations or [] for part in entries or []):
        content = storage.fingerprint(["rings", content])
    return VideoRef(
        f"{number}-{folder}" if folder else str(number),
        storage.join(images, folder),
        content,
        sum(file.size for file in found),
        kind,
        {"images": images, "frames": names, "objects": segmentations, "size": size},
        problem,
    )


def _problem(
    video: dict[str, Any], names: list[str], files: dict[str, FileInfo], segmentations: list[Any] | None
) -> str:
    missing = [name for name in names if name not in files]
    if not names:
        return "its JSON entry names no frames"
    if missing:
        return f"{len(missing)} of {len(names)} frames are missing, the first is {missing[0]}"
    if video.get("length", len(names)) != len(names):
        return f"its JSON entry declares {video['length']} frames and names {len(names)}"
    for index, entries in enumerate(segmentations or [], 1):
        if not isinstance(entries, list) or len(entries) != len(names):
            length = len(entries) if isinstance(entries, list) else "no"
            return f"object {index} has {length} segmentations for {len(names)} frames"
    return ""


def read(video: VideoRef, short_side: int | None) -> FrameIterator:
    """Raises BadVideo for a frame or mask that can't be decoded, or of another size than the others."""
    yield from fitted(_decoded(video), short_side)


def _decoded(video: VideoRef) -> Iterator[RawFrame]:
    details = video.details
    for index, frame in enumerate(read_images(details["images"], details["frames"])):
        if details["objects"] is not None:
            segmentations = [entries[index] for entries in details["objects"]]
            frame = with_objects(frame, segmentations, details["size"])
        yield frame
