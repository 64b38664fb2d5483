"""MOVi as TFDS stores it: `<name>-<split>.tfrecord-00000-of-01024`, read without TensorFlow.

A record is a `tf.train.Example` with `video`, a list of PNGs, and `segmentations`, a list of PNGs of
labels (0 background). `forward_flow` and `backward_flow` are lists of PNGs of two channels of 16 bits, which go from
the least to the greatest of `metadata/forward_flow_range` (or `backward…`), pixels.

A file is a row of records: length (8 bytes, little endian), its checksum, data, its checksum. Listing reads the
lengths, and of local files the headers of pictures.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import av
import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from pipeline import storage
from pipeline.clips.sources.base import BadVideo, FrameIterator, VideoRef
from pipeline.clips.sources.files import HashMemo, check_complete, in_threads, read_part
from pipeline.clips.sources.frames import (
    RawFrame,
    decode_frame,
    decode_labels,
    fitted,
    is_one_object,
    only_void,
    reason,
    with_labels,
)
from pipeline.clips.sources.pictures import frame_mark, label_mark
from pipeline.config import Dataset
from pipeline.storage import FileInfo

_HEADER = struct.Struct("<QI")  # a record's length, and the checksum of these 8 bytes
_CHECKSUM = struct.Struct("<I")
_FILE = r"(?P<name>.+)-{split}\.tfrecord-(?P<shard>\d{{5}})-of-(?P<total>\d{{5}})"


def find(dataset: Dataset, split: str, memo: HashMemo) -> list[VideoRef]:
    """The records of the split's files, in order.

    Raises:
        FileNotFoundError: no file of that split; the message names the splits that are there. Or some of
            its files are missing.
        ValueError: files of two data sets.
    """
    root = str(dataset.path)
    files = {f.name: f for f in storage.list_files(root) if "/" not in f.name}
    shards: dict[tuple[str, int], dict[int, FileInfo]] = {}
    for name, file in files.items():
        match = re.fullmatch(_FILE.format(split=re.escape(split)), name)
        if match:
            shards.setdefault((match["name"], int(match["total"])), {})[int(match["shard"])] = file
    if not shards:
        matches = [re.fullmatch(_FILE.format(split="(?P<split>[^-]+)"), name) for name in files]
        known = sorted({match["split"] for match in matches if match})
        raise FileNotFoundError(
            f"split {split!r}: no file NAME-{split}.tfrecord-00000-of-00000 in {root}; "
            f"splits: {', '.join(known) or 'none'}"
        )
    if len(shards) > 1:
        sets = ", ".join(f"{name} ({total} files)" for name, total in sorted(shards))
        raise ValueError(f"{root} holds several data sets: {sets}; give each a folder of its own")
    ((prefix, total), present) = next(iter(shards.items()))
    check_complete(root, present, total, lambda n: f"{prefix}-{split}.tfrecord-{n:05d}-of-{total:05d}")

    def references(shard: int) -> list[VideoRef]:
        return _references(root, present[shard], f"{prefix}-{split}-{shard:05d}", memo)

    return [video for found in in_threads(references, sorted(present)) for video in found]


def _references(root: str, file: FileInfo, stem: str, memo: HashMemo) -> list[VideoRef]:
    found = memo.walk(root, file, walk_records)
    content = memo.content(root, file)
    records = found["records"]
    # Those of earlier versions' clips that were read otherwise; on S3 nothing is read for it.
    marks = [""] * len(records)
    if not storage.is_remote(root):
        marks = memo.walk(root, file, lambda uri, _: [_mark(uri, *record) for record in records], "marks")
    contents = [storage.fingerprint(["movi", content, offset, length]) for offset, length in records]
    videos = [
        VideoRef(
            f"{stem}/{index:04d}",
            storage.join(root, file.name),
            storage.fingerprint([marks[index], contents[index]]) if marks[index] else contents[index],
            length,
            "movi",
            {"offset": offset},
        )
        for index, (offset, length) in enumerate(records)
    ]
    if found["problem"]:
        problem = f"{file.name}: {found['problem']}"
        videos.append(
            VideoRef(
                f"{stem}/{len(videos):04d}",
                storage.join(root, file.name),
                storage.fingerprint(["movi", content, problem]),
                kind="movi",
                problem=problem,
            )
        )
    return videos


def walk_records(uri: str, size: int) -> dict[str, Any]:
    """Where the records of a file are: `records` of (offset of the data, length), and the `problem`, if
    any, behind which no more can be found."""
    records: list[list[int]] = []
    position = 0
    while position < size:
        header = storage.read_range(uri, position, min(size, position + _HEADER.size))
        if len(header) < _HEADER.size:
            return {"records": records, "problem": f"the file ends within the header at byte {position}"}
        length, checksum = _HEADER.unpack(header)
        if _masked_crc(header[:8]) != checksum:
            problem = f"the length at byte {position} is damaged, what follows can't be found"
            return {"records": records, "problem": problem}
        start = position + _HEADER.size
        if start + length + _CHECKSUM.size > size:
            return {"records": records, "problem": f"the file ends within the record at byte {position}"}
        records.append([start, length])
        position = start + length + _CHECKSUM.size
    return {"records": records, "problem": ""}


def _masked_crc(content: bytes) -> int:
    crc = google_crc32c.value(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read(video: VideoRef, short_side: int | None, flow: Sequence[str] = ()) -> FrameIterator:
    """Frames with their flow in some of `FLOW_DIRECTIONS`.

    Raises:
        BadVideo: a record with a wrong checksum, without frames or without such flow, or frames, masks and flow that
            can't be decoded or don't fit each other.
    """
    yield from fitted(_decoded(video, flow), short_side)


def _decoded(video: VideoRef, flow: Sequence[str]) -> Iterator[RawFrame]:
    features = _parse(video.path, video.details["offset"], video.bytes)
    frames, masks = _pictures(features)
    one_object = is_one_object(_kinds(masks or []))
    flows = {way: _flow_pictures(features, f"{way}_flow", len(frames)) for way in flow}
    for index, png in enumerate(frames):
        frame = decode_frame(png, str(index))
        if masks is not None:
            frame = with_labels(frame, masks[index], str(index), one_object)
        yield frame._replace(flow={way: _flow(own, index, frame) for way, own in flows.items()} or None)


def _flow_pictures(
    features: Mapping[str, Any], name: str, frames: int
) -> tuple[str, Sequence[bytes], np.ndarray]:
    """The name of a record's flow, its PNGs and the range of its values; raises BadVideo."""
    if lacking := [key for key in (name, f"metadata/{name}_range") if key not in features]:
        raise BadVideo(
            f"it has no feature {lacking[0]!r}, and so no optical flow of its own, which the config asks for "
            "(clips.motion=dataset, clips.flow=dataset); nearest valid: clips.motion=flow, clips.flow=none"
        )
    pngs, limits = features[name].bytes_list.value, features[f"metadata/{name}_range"].float_list.value
    if len(pngs) != frames or len(limits) != 2:
        raise BadVideo(
            f"has {frames} frames, but {len(pngs)} of {name}, whose range has {len(limits)} limits; expected 2"
        )
    return name, pngs, np.asarray(limits, np.float32)


def _flow(pictures: tuple[str, Sequence[bytes], np.ndarray], index: int, frame: RawFrame) -> np.ndarray:
    """A frame's flow `(H, W, 2)` float32, pixels down and to the right; raises BadVideo."""
    name, pngs, (low, high) = pictures
    try:
        # A decoder for each picture: one that has decoded another takes the next for a change of that.
        (decoded,) = av.CodecContext.create("png", "r").decode(av.Packet(pngs[index]))
    except (av.error.FFmpegError, ValueError) as error:
        raise BadVideo(f"{name} {index} can't be decoded ({reason(error)})") from error
    height, width = frame.pixels.shape[:2]
    found = (decoded.format.name, decoded.height, decoded.width)
    if found != ("ya16be", height, width):
        raise BadVideo(
            f"{name} {index} is {found[2]}x{found[1]} pixels of {found[0]}, expected {width}x{height} of two channels "
            "of 16 bits"
        )
    rows = np.frombuffer(bytes(decoded.planes[0]), ">u2").reshape(height, -1)  # with padding
    return rows[:, : 2 * width].reshape(height, width, 2) / np.float32(65535) * (high - low) + low


def _parse(uri: str, offset: int, length: int) -> Mapping[str, Any]:
    """A record's features by name; raises BadVideo."""
    content = read_part(uri, offset, length + _CHECKSUM.size, "the record")
    data, (checksum,) = content[:length], _CHECKSUM.unpack(content[length:])
    if _masked_crc(data) != checksum:
        raise BadVideo("its data is damaged (wrong checksum)")
    try:
        return _example_class().FromString(data).features.feature
    except message.DecodeError as error:
        raise BadVideo(f"it is no tf.train.Example ({error})") from error


def _pictures(features: Mapping[str, Any]) -> tuple[Sequence[bytes], Sequence[bytes] | None]:
    """The pictures of a record's frames and of its masks; raises BadVideo."""
    if "video" not in features:
        raise BadVideo(f"it has no feature 'video', only {', '.join(sorted(features)) or 'none'}")
    frames = features["video"].bytes_list.value
    masks = features["segmentations"].bytes_list.value if "segmentations" in features else None
    if masks is not None and len(masks) != len(frames):
        raise BadVideo(f"has {len(frames)} frames but {len(masks)} masks")
    return frames, masks


def _kinds(masks: Sequence[bytes]) -> Iterator[bool | None]:
    return (only_void(decode_labels(mask, str(index))) for index, mask in enumerate(masks))


def _mark(uri: str, offset: int, length: int) -> str:
    """What of a record is read otherwise than in earlier versions: "" for most."""
    try:
        frames, masks = _pictures(_parse(uri, offset, length))
        marks = [frame_mark(io.BytesIO(frame)) for frame in frames]
        marks += [label_mark(io.BytesIO(mask)) for mask in masks or []]
        marks.append("one object" if is_one_object(_kinds(masks or [])) else "")
    except BadVideo:
        return ""  # reading it will say why
    return " ".join(filter(None, marks))


@cache
def _example_class() -> Any:
    """`tf.train.Example`, of whose features lists of bytes and of floats are needed; others are skipped."""
    file = descriptor_pb2.FileDescriptorProto(name="slotmatch_example.proto", syntax="proto3")
    field = descriptor_pb2.FieldDescriptorProto

    def add(parent: Any, name: str, fields: list[tuple[str, int, str]], **options: bool) -> Any:
        """A message whose fields (name, type or message, label) are numbered from 1."""
        entry = parent.add(name=name)
        for number, (field_name, label, kind) in enumerate(fields, 1):
            added = entry.field.add(name=field_name, number=number, label=label)
            if kind.startswith("."):
                added.type, added.type_name = field.TYPE_MESSAGE, kind
            else:
                added.type = getattr(field, f"TYPE_{kind.upper()}")
        if options:
            entry.options.map_entry = True
        return entry

    one, many = field.LABEL_OPTIONAL, field.LABEL_REPEATED
    add(file.message_type, "BytesList", [("value", many, "bytes")])
    add(file.message_type, "FloatList", [("value", many, "float")])
    lists = [("bytes_list", one, ".BytesList"), ("float_list", one, ".FloatList")]
    add(file.message_type, "Feature", lists)
    features = add(file.message_type, "Features", [("feature", many, ".Features.FeatureEntry")])
    entry_fields = [("key", one, "string"), ("value", one, ".Feature")]
    add(features.nested_type, "FeatureEntry", entry_fields, map_entry=True)
    add(file.message_type, "Example", [("features", one, ".Features")])
    pool = descriptor_pool.DescriptorPool()  # one of our own: TensorFlow may have its Example in the default
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Example"))
