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
from pipeline.clips.sources.pictures import is_exchanged, turn

_LONGEST_NUMBER = 7  # characters of five bits; a run of 2^34 pixels


def find_json(
    places: Sequence[str], split: str, known_splits: Callable[[], Iterable[str]], others: Sequence[str] = ()
) -> str:
    """The first of the places that is there; raises FileNotFoundError, naming them all.

    Args:
        others: names of files there that hold annotations in a form that is not read.
    """
    for uri in places:
        if storage.exists(uri):
            return uri
    unread = f" ({', '.join(others)}: not read, objects with masks are)" if others else ""
    raise FileNotFoundError(
        f"split {split!r}: no annotations, looked for {', '.join(places)}{unread}; "
        f"splits: {', '.join(sorted(known_splits())) or 'none'}"
    )


_Entries = dict[Any, dict[str, Any]]
_Objects = dict[Any, list[dict[str, Any]]]


def read_annotations(
    uri: str, videos_key: str, owner_key: str, masks_key: str
) -> tuple[_Entries, _Objects | None]:
    """The videos (or images) by their ids, and the objects of each, crowds left out.

    No objects but None: the file has no annotations.

    Raises:
        ValueError: an entry that is damaged, two videos of one id, objects of videos that are not there, or objects
            without masks alone.
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
    _check_masks(uri, [entry for own in objects.values() for entry in own], videos_key, masks_key)
    return videos, objects


def _check_masks(uri: str, objects: list[dict[str, Any]], videos_key: str, masks_key: str) -> None:
    """Raises ValueError where there are objects, but masks of none: they would be scored as if there was nothing."""
    if not objects or not all(is_without_masks(entry, masks_key) for entry in objects):
        return
    what = f"its {len(objects)} objects have no {masks_key!r}, they are boxes alone"
    if any("segments_info" in entry for entry in objects):
        what = "its annotations are panoptic ('segments_info'), whose PNGs are not read"
    raise ValueError(
        f"{uri}: {what}; take the file that has run lengths or polygons, or, to use the {videos_key} without "
        "annotations, take its list 'annotations' out"
    )


def is_without_masks(entry: dict[str, Any], masks_key: str) -> bool:
    """Whether an object's segmentation, or each of its track, is missing, empty or a box."""
    value = entry.get(masks_key)
    if masks_key == "segmentation":
        return _is_no_mask(value, entry.get("bbox"))
    if not isinstance(value, list):
        return value is None
    boxes = entry.get("bboxes")
    boxes = boxes if isinstance(boxes, list) and len(boxes) == len(value) else [None] * len(value)
    return all(_is_no_mask(part, box) for part, box in zip(value, boxes, strict=True))


def is_box_alone(entry: dict[str, Any], masks_key: str) -> bool:
    """Whether an object is there, by its boxes, but has no masks."""
    boxes = entry.get("bbox") if masks_key == "segmentation" else entry.get("bboxes")
    has_box = isinstance(boxes, list) and any(box is not None for box in boxes)
    return has_box and is_without_masks(entry, masks_key)


def _is_no_mask(segmentation: Any, box: Any) -> bool:
    if segmentation is None or segmentation in ([], {}):
        return True
    return box is not None and segmentation in (box, [box])


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
    stored = frame._replace(pixels=frame.pixels.swapaxes(0, 1), orientation=1)
    if is_exchanged(frame.orientation) and _made_for(segmentations, size) == stored.pixels.shape[:2]:
        masks = _decode(stored, segmentations, size)
        return frame._replace(masks={number: turn(mask, frame.orientation) for number, mask in masks.items()})
    return frame._replace(masks=_decode(frame, segmentations, size))


def _made_for(segmentations: Sequence[Any], size: Sequence[Any] | None) -> tuple[Any, ...] | None:
    """The height and width that a frame's annotations say that they are of."""
    sizes = [size, *(s.get("size") for s in segmentations if isinstance(s, dict))]
    return next((tuple(s) for s in sizes if s is not None and _is_size(s)), None)


def _decode(
    frame: RawFrame, segmentations: Sequence[Any], size: Sequence[Any] | None
) -> dict[int, np.ndarray]:
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
            mask = decode_segmentation(segmentation, *frame.pixels.shape[:2])
        except (ValueError, TypeError, OverflowError) as error:
            raise BadVideo(f"mask {name} in frame {frame.name} is damaged: {error}") from error
        if mask is not None:
            masks[number] = mask
    return masks


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, int | float) for v in value)


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray | None:
    """A mask (height, width) bool from run lengths (compressed or not), or a list of them or of polygons.

    Polygons are numbers x, y, x, y, … as in COCO, or pairs (x, y) as other tools write them; a list of pairs is one.
    Polygons of fewer than three corners have no area and are left out; None: there is no other.

    Raises ValueError for anything else, and for runs that don't fill the mask: pycocotools would read
    or write behind them.
    """
    if isinstance(segmentation, dict):
        return _decode_runs(segmentation.get("counts"), height, width)
    if not isinstance(segmentation, list):
        raise ValueError("it is neither run lengths nor polygons")
    if not segmentation:
        return np.zeros((height, width), bool)
    if all(isinstance(part, dict) for part in segmentation):
        return np.any([_decode_runs(part.get("counts"), height, width) for part in segmentation], axis=0)
    polygons = [part for part in _without_pairs(segmentation) if not _is_degenerate(part)]
    if not polygons:
        return None
    for polygon in polygons:
        _check_polygon(polygon, height, width)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(bool)


def _is_degenerate(part: Any) -> bool:
    return isinstance(part, list) and len(part) < 6


def _without_pairs(polygons: list[Any]) -> list[Any]:
    """Polygons whose corners are pairs, as numbers x, y, x, y, …; the others as they are."""
    if _is_of_pairs(polygons):
        polygons = [polygons]
    return [[v for pair in part for v in pair] if _is_of_pairs(part) else part for part in polygons]


def _is_of_pairs(polygon: Any) -> bool:
    """Whether a list is three or more corners (x, y): fewer may as well be polygons of one corner each."""
    if not isinstance(polygon, list) or len(polygon) < 3:
        return False
    return all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(v, int | float) for v in pair)
        for pair in polygon
    )


def is_read_since(segmentation: Any) -> bool:
    """Whether earlier versions set the video of such a segmentation aside, so that its clip sets are others."""
    if not isinstance(segmentation, list) or not segmentation:
        return False
    if _without_pairs(segmentation) != segmentation:
        return True
    return any(map(_is_degenerate, segmentation)) or all(isinstance(part, dict) for part in segmentation)


def _decode_runs(counts: Any, height: int, width: int) -> np.ndarray:
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    runs = _decode_counts(text) if isinstance(text, str) else _integers(text)
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"its runs don't add up to {width}x{height} pixels")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


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
