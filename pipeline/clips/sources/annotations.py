"""Annotations in COCO's JSON: lists of objects, their segmentations as run lengths or polygons."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from pipeline import storage
from pipeline.clips.sources.base import BadVideo
from pipeline.clips.sources.files import natural_key
from pipeline.clips.sources.frames import RawFrame, check_mask_size

_LONGEST_NUMBER = 7  # characters of five bits; a run of 2^34 pixels


def find_json(places: Sequence[str], split: str, known_splits: Callable[[], Iterable[str]]) -> str:
    """The first of the places that is there; raises FileNotFoundError, naming them all."""
    for uri in places:
        if storage.exists(uri):
            return uri
    raise FileNotFoundError(
        f"split {split!r}: no annotations, looked for {', '.join(places)}; "
        f"splits: {', '.join(sorted(known_splits())) or 'none'}"
    )


_Entries = dict[Any, dict[str, Any]]
_Objects = dict[Any, list[dict[str, Any]]]


def read_annotations(uri: str, videos_key: str, owner_key: str) -> tuple[_Entries, _Objects | None]:
    """The videos (or images) by their ids, and the objects of each, crowds left out.

    No objects but None: the file has no annotations.

    Raises:
        ValueError: an entry that is damaged, two videos of one id, or objects of videos that are not there.
    """
    content = storage.read_json(uri)
    if not isinstance(content, dict):
        raise ValueError(f"{uri}: has no list {videos_key!r} of entries with 'id'")
    entries = _entries(uri, content, videos_key, "id")
    videos = {entry["id"]: entry for entry in entries}
    if len(videos) != len(entries):
        raise ValueError(f"{uri}: two {videos_key} have the same id")
    if content.get("annotations") is None:
        return videos, None
    objects: _Objects = {number: [] for number in videos}
    strangers: set[str] = set()
    for entry in _entries(uri, content, "annotations", owner_key):
        if entry[owner_key] not in videos:
            strangers.add(str(entry[owner_key]))
        elif not entry.get("iscrowd"):
            objects[entry[owner_key]].append(entry)
    if strangers:
        first = ", ".join(sorted(strangers, key=natural_key)[:10]) + (", …" if len(strangers) > 10 else "")
        raise ValueError(
            f"{uri}: {len(strangers)} {videos_key} have annotations, but are not among the {videos_key} "
            f"({owner_key} {first}); add them, or take their annotations out"
        )
    return videos, objects


def _entries(uri: str, content: dict[str, Any], key: str, id_key: str) -> list[dict[str, Any]]:
    entries = content.get(key)
    if not isinstance(entries, list):
        raise ValueError(f"{uri}: has no list {key!r} of entries with {id_key!r}")
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get(id_key), int | float | str):
            raise ValueError(
                f"{uri}: {key}[{index}] is no entry with {id_key!r}, but {json.dumps(entry)[:80]}"
            )
    return entries


def declared_size(entry: dict[str, Any]) -> list[Any] | None:
    """Height and width as the file gives them, or None."""
    size = [entry.get("height"), entry.get("width")]
    return size if None not in size else None


def with_objects(frame: RawFrame, segmentations: Sequence[Any], size: Sequence[Any] | None) -> RawFrame:
    """The frame with the masks of its objects, numbered from 1; an object of None is absent.

    Args:
        size: height and width that the annotations were made for.

    Raises:
        BadVideo: a segmentation that can't be decoded, or is of another size than the frame.
    """
    if size is not None and not _is_size(size):
        raise BadVideo(f"its JSON entry declares the height {size[0]!r} and the width {size[1]!r}")
    if size is not None:
        check_mask_size("list", size, frame)
    masks = {}
    for number, segmentation in enumerate(segmentations, 1):
        if segmentation is None:
            continue
        name = f"of object {number}"
        if isinstance(segmentation, dict) and _is_size(segmentation.get("size")):
            check_mask_size(name, segmentation["size"], frame)
        try:
            masks[number] = decode_segmentation(segmentation, *frame.pixels.shape[:2])
        except (ValueError, TypeError, OverflowError) as error:
            raise BadVideo(f"mask {name} in frame {frame.name} is damaged: {error}") from error
    return frame._replace(masks=masks)


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, int | float) for v in value)


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A mask (height, width) bool from run lengths (compressed or not) or a list of polygons.

    Raises ValueError for anything else, and for runs that don't fill the mask: pycocotools would read
    or write behind them.
    """
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        runs = _decode_counts(counts) if isinstance(counts, str) else _integers(counts)
        if (runs < 0).any() or runs.sum() != height * width:
            raise ValueError(f"its runs don't add up to {width}x{height} pixels")
        values = np.arange(len(runs)) % 2 == 1
        return np.repeat(values, runs).reshape(width, height).T
    if not isinstance(segmentation, list):
        raise ValueError("it is neither run lengths nor polygons")
    if not segmentation:
        return np.zeros((height, width), bool)
    for polygon in segmentation:
        _check_polygon(polygon, height, width)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))).astype(bool)


def _integers(counts: Any) -> np.ndarray:
    if not isinstance(counts, list) or not all(isinstance(c, int) for c in counts):
        raise ValueError("its counts are neither text nor a list of integers")
    return np.array(counts, np.int64)


def _decode_counts(text: str) -> np.ndarray:
    """Run lengths from COCO's text: numbers of 5 bits a character, from the third the change in two."""
    codes = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    if not len(codes):
        return codes
    ends = np.flatnonzero(codes & 32 == 0)
    if codes.min() < 0 or codes.max() > 63 or not len(ends) or ends[-1] != len(codes) - 1:
        raise ValueError("its counts are no run lengths")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _LONGEST_NUMBER:
        raise ValueError("its counts are no run lengths")
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    values = np.add.reduceat((codes & 31) << shifts, starts)
    values -= np.where(codes[ends] & 16, 1 << 5 * lengths, 0)  # the sign is the last character's highest bit
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def _check_polygon(polygon: Any, height: int, width: int) -> None:
    """Raises ValueError: pycocotools takes 4 numbers for a box, and far corners for room to allocate."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        raise ValueError("a polygon is no list of three or more corners")
    corners = np.array(polygon, np.float64)
    if not np.isfinite(corners).all() or np.abs(corners).max() > 10 * max(height, width):
        raise ValueError("a polygon has corners far outside of the frame")
