"""The clip table's columns, and how frames and masks become plain Arrow values.

One row is a clip: up to `clip_frames` consecutive frames of one video. Frames are encoded image bytes
(the codec is in the schema's metadata), masks are COCO run-length encodings per object and frame, so
that overlapping objects and frames without any survive.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image
from pycocotools import mask as coco_mask

CODEC_KEY = b"slotmatch.codec"
SHARD_KEY = b"slotmatch.shard"

OBJECT = pa.struct([("object_id", pa.int32()), ("counts", pa.binary())])


def clip_schema(codec: str, *, motion: bool = False, flow: bool = False) -> pa.Schema:
    """The table's schema; with `motion` and `flow`, that of clips with motion segments and with optical flow."""
    labels = pa.list_(pa.list_(OBJECT))  # per frame
    return pa.schema(
        [
            pa.field("video_id", pa.string(), nullable=False),
            pa.field("clip_index", pa.int32(), nullable=False),  # in its video, from 0
            pa.field("start_frame", pa.int64(), nullable=False),
            pa.field("full", pa.bool_(), nullable=False),  # False for a shorter tail
            pa.field("height", pa.int32(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("timestamps", pa.list_(pa.float64()), nullable=False),  # seconds
            pa.field("frames", pa.list_(pa.large_binary()), nullable=False),
            pa.field("masks", labels),  # null: no annotation
            *([pa.field("motion", labels, nullable=False)] if motion else []),
            *([pa.field("flow", pa.list_(pa.large_binary()), nullable=False)] if flow else []),
        ],
        metadata={CODEC_KEY: codec.encode()},
    )


@dataclass(frozen=True)
class Clip:
    """A decoded clip: frames `(T, H, W, 3)` uint8; `masks[t]` maps object id to `(H, W)` bool."""

    video_id: str
    clip_index: int
    full: bool
    frames: np.ndarray
    masks: list[dict[int, np.ndarray]] | None


def encode_frame(pixels: np.ndarray, codec: str, quality: int) -> bytes:
    """Bytes of one frame `(H, W, 3)` uint8; `jpeg` without chroma subsampling, `png`, or `raw`."""
    if codec == "raw":
        return np.ascontiguousarray(pixels).tobytes()
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if codec == "jpeg":
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
    else:
        image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def decode_frame(content: bytes, codec: str, height: int, width: int) -> np.ndarray:
    """The inverse of `encode_frame` (exact but for `jpeg`)."""
    if codec == "raw":
        return np.frombuffer(content, np.uint8).reshape(height, width, 3)
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def encode_flow(flow_HW2: np.ndarray) -> bytes:
    """Bytes of one frame's optical flow `(H, W, 2)`: 16-bit floats, little endian, deflated."""
    return zlib.compress(np.ascontiguousarray(flow_HW2, "<f2").tobytes())


def decode_flow(content: bytes, height: int, width: int) -> np.ndarray:
    """The inverse of `encode_flow`, up to its rounding, float32."""
    return np.frombuffer(zlib.decompress(content), "<f2").reshape(height, width, 2).astype(np.float32)


def encode_masks(masks: dict[int, np.ndarray]) -> list[dict[str, object]]:
    """One frame's objects as rows of `OBJECT`; an object without a pixel in this frame is dropped."""
    return [
        {"object_id": object_id, "counts": coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"]}
        for object_id, mask in masks.items()
        if mask.any()
    ]


def decode_masks(objects: list[dict], height: int, width: int) -> dict[int, np.ndarray]:
    """Object id -> `(H, W)` bool for one frame."""
    size = [height, width]
    return {
        entry["object_id"]: coco_mask.decode({"size": size, "counts": entry["counts"]}).astype(bool)
        for entry in objects
    }


def stack_masks(
    masks: list[dict[int, np.ndarray]], object_ids: list[int], shape: tuple[int, int]
) -> np.ndarray:
    """`(T, C, H, W)` bool with one channel for each of `object_ids`, empty where it is absent."""
    stacked = np.zeros((len(masks), len(object_ids), *shape), dtype=bool)
    for t, objects in enumerate(masks):
        for object_id, mask in objects.items():
            stacked[t, object_ids.index(object_id)] = mask
    return stacked
