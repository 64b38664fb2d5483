"""WebDataset tars as the public scripts of SlotContrast and VideoSAUR write them.

`<name>-<split>-000000.tar` holds `<key>.video.npy` (T, H, W, 3) uint8, or `<key>.image.npy` (H, W, 3), and
`<key>.segmentations.npy`: labels (T, H, W) or (T, H, W, 1), in which 0 is background and 255 void (an object, where
a video has no other label), or objects (T, H, W, N), for images (N, H, W), that are nonzero where they are. Listing
reads the tars' headers, and of local ones labels, mostly the first of a video.
"""

from __future__ import annotations

import math
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.lib import format as npy_format

from pipeline import storage
from pipeline.clips.sources.base import BadVideo, FrameIterator, VideoRef
from pipeline.clips.sources.files import HashMemo, check_complete, in_threads, natural_key, read_part
from pipeline.clips.sources.frames import (
    RawFrame,
    check_mask_size,
    fitted,
    is_one_object,
    label_masks,
    only_void,
)
from pipeline.config import Dataset
from pipeline.storage import FileInfo

_FILE = r"(?P<name>.+)-{split}-(?P<shard>\d+)\.tar"
_VIDEO, _IMAGE, _SEGMENTATIONS = "video.npy", "image.npy", "segmentations.npy"
_LABEL_LIMIT = 2**31  # object ids are 32-bit integers in the clip table


def find(dataset: Dataset, split: str, memo: HashMemo) -> list[VideoRef]:
    """The samples of the split's tars, in order.

    Raises:
        FileNotFoundError: no tar of that split; the message names the splits that are there. Or a tar before
            the last one is missing.
        ValueError: tars of two data sets.
    """
    root = str(dataset.path)
    files = {f.name: f for f in storage.list_files(root) if "/" not in f.name}
    matches = {name: re.fullmatch(_FILE.format(split=re.escape(split)), name) for name in files}
    chosen = sorted((name for name, match in matches.items() if match), key=natural_key)
    if not chosen:
        named = [re.fullmatch(_FILE.format(split="(?P<split>[^-]+)"), name) for name in files]
        known = sorted({match["split"] for match in named if match})
        raise FileNotFoundError(
            f"split {split!r}: no file NAME-{split}-000000.tar in {root}; splits: {', '.join(known) or 'none'}"
        )
    names = sorted({match["name"] for match in matches.values() if match})
    if len(names) > 1:
        raise ValueError(f"{root} holds several data sets: {', '.join(names)}; give each a folder of its own")
    numbers = [match["shard"] for match in matches.values() if match]
    present, stem, width = {int(n) for n in numbers}, f"{names[0]}-{split}", len(numbers[0])
    check_complete(root, present, max(present) + 1, lambda n: f"{stem}-{n:0{width}d}.tar")
    found = in_threads(lambda name: _references(root, files[name], memo), chosen)
    return [video for videos in found for video in videos]


def _references(root: str, file: FileInfo, memo: HashMemo) -> list[VideoRef]:
    walked = memo.walk(root, file, walk_tar)
    content = memo.content(root, file)
    stem = file.name.removesuffix(".tar")
    samples: dict[str, dict[str, list[int]]] = {}
    twice: dict[str, str] = {}
    for name, offset, size in walked["members"]:
        match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", name)
        if match is None or not name.endswith(".npy"):
            continue
        sample = samples.setdefault(match[1], {})
        if match[2] in sample:
            twice[match[1]] = f"the tar has {name} twice"
        sample[match[2]] = [offset, size]
    problems = {key: twice.get(key, "") or _missing(sample) for key, sample in samples.items()}
    damage = walked["problem"] and f"{file.name}: {walked['problem']}"
    if damage:
        # The last sample may have lost a member, and must not pass for one without segmentations.
        last = next(reversed(samples), None)
        usual = set(samples[next(iter(samples))]) if len(samples) > 1 else {_VIDEO, _SEGMENTATIONS}
        if last is not None and not usual <= set(samples[last]):
            problems[last] = damage
        else:
            key = f"after {last}" if last is not None else "start"
            samples[key], problems[key] = {}, damage
    contents = {
        k: storage.fingerprint(["webdataset", content, k, s, problems[k]]) for k, s in samples.items()
    }
    if not storage.is_remote(root):
        # Those whose 255 earlier versions took for void; on S3 nothing is read for it.
        good = {key: sample for key, sample in samples.items() if not problems[key]}
        changed = memo.walk(
            root, file, lambda uri, _: [k for k, s in good.items() if _is_changed(uri, s)], "marks"
        )
        contents |= {key: storage.fingerprint(["one object", contents[key]]) for key in changed}
    return [
        VideoRef(
            f"{stem}/{key}",
            storage.join(root, file.name),
            contents[key],
            sum(size for _, size in sample.values()),
            "webdataset",
            sample,
            problems[key],
        )
        for key, sample in samples.items()
    ]


def _missing(sample: dict[str, list[int]]) -> str:
    if _VIDEO in sample or _IMAGE in sample:
        return ""
    return f"has no {_VIDEO} or {_IMAGE}, only {', '.join(sorted(sample))}"


def walk_tar(uri: str, size: int) -> dict[str, Any]:
    """The files in a tar: `members` of (name, offset of the data, size), and the `problem`, if any,
    behind which no more can be found."""
    members: list[list[Any]] = []
    source = storage.RangeFile(uri, 0, size)
    try:
        with tarfile.open(fileobj=source, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.offset_data + member.size > size:
                    return {"members": members, "problem": f"the tar ends within {member.name}"}
                if member.isreg() and not member.issparse():
                    members.append([member.name, member.offset_data, member.size])
            # At a damaged header tarfile stops as if the tar ended there.
            source.seek(tar.offset)
            mark = source.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, ValueError) as error:  # ValueError: numbers in a header that are none
        return {"members": members, "problem": f"the tar is damaged or cut ({error})"}
    if mark == bytes(tarfile.BLOCKSIZE):
        return {"members": members, "problem": ""}
    what = f"the header at byte {tar.offset} is damaged" if mark else "the tar ends without its end mark"
    return {"members": members, "problem": f"{what}, what follows can't be found"}


@dataclass(frozen=True)
class Array:
    """An array in a file, read a step along its first axis at a time."""

    uri: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    def step(self, index: int) -> np.ndarray:
        length = math.prod(self.shape[1:]) * self.dtype.itemsize
        content = read_part(self.uri, self.offset + index * length, length, self.name)
        return np.frombuffer(content, self.dtype).reshape(self.shape[1:])


def open_array(uri: str, name: str, offset: int, size: int) -> Array:
    """The .npy file that lies at `offset` in another file; only its header is read.

    Raises:
        BadVideo: it is none, is cut, holds Python objects or is in Fortran's order.
    """
    file = storage.RangeFile(uri, offset, size)
    try:
        version = npy_format.read_magic(file)
        readers = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"npy format {version[0]}.{version[1]} is not known")
        shape, fortran, dtype = readers[version](file)
    except (ValueError, EOFError) as error:
        raise BadVideo(f"{name} is no array ({str(error).splitlines()[0]})") from error
    if dtype.hasobject:
        raise BadVideo(f"{name} holds Python objects, which are never unpickled")
    if fortran:
        raise BadVideo(f"{name} is in Fortran's order and can't be read frame by frame; save it in C's")
    expected = file.tell() + math.prod(shape) * dtype.itemsize
    if size != expected:
        raise BadVideo(f"{name} has {size} bytes, an array {dtype} {shape} {expected}")
    return Array(uri, name, shape, dtype, offset + file.tell())


def read(video: VideoRef, short_side: int | None) -> FrameIterator:
    """Raises BadVideo for arrays that can't be read, are of another type or shape, or don't fit each other."""
    yield from fitted(_decoded(video), short_side)


def _decoded(video: VideoRef) -> Iterator[RawFrame]:
    is_image = _VIDEO not in video.details
    name = _IMAGE if is_image else _VIDEO
    frames = open_array(video.path, name, *video.details[name])
    if frames.dtype != np.uint8 or len(frames.shape) != (3 if is_image else 4) or frames.shape[-1] != 3:
        wanted = "(H, W, 3)" if is_image else "(T, H, W, 3)"
        raise BadVideo(f"{name} is {frames.dtype} {frames.shape}, not uint8 {wanted}")
    if is_image:
        frames = replace(frames, shape=(1, *frames.shape))
    if 0 in frames.shape:
        raise BadVideo(f"{name} is empty: {frames.shape}")
    segmentations = None
    if _SEGMENTATIONS in video.details:
        segmentations = open_array(video.path, _SEGMENTATIONS, *video.details[_SEGMENTATIONS])
        segmentations = _check_segmentations(segmentations, frames, is_image)
    one_object = segmentations is not None and _is_one_object(segmentations, is_image)
    for index in range(frames.shape[0]):
        frame = RawFrame(str(index), frames.step(index))
        if segmentations is not None:
            frame = frame._replace(masks=_masks(segmentations.step(index), is_image, one_object))
        yield frame


def _is_one_object(segmentations: Array, is_image: bool) -> bool:
    if is_image or (len(segmentations.shape) == 4 and segmentations.shape[3] != 1):
        return False  # each object has a channel
    return is_one_object(only_void(segmentations.step(i)) for i in range(segmentations.shape[0]))


def _is_changed(uri: str, sample: dict[str, list[int]]) -> bool:
    if _VIDEO not in sample or _SEGMENTATIONS not in sample:
        return False
    try:
        segmentations = open_array(uri, _SEGMENTATIONS, *sample[_SEGMENTATIONS])
        return segmentations.dtype.kind in "iu" and _is_one_object(segmentations, False)
    except BadVideo:
        return False  # reading it will say why


def _check_segmentations(array: Array, frames: Array, is_image: bool) -> Array:
    """The array with frames along its first axis."""
    if array.dtype.kind not in "iub":
        raise BadVideo(f"{_SEGMENTATIONS} is {array.dtype}, not integers or bool")
    if is_image and len(array.shape) == 3:
        array = replace(array, shape=(1, *array.shape))  # (1, N, H, W)
    elif is_image or len(array.shape) not in (3, 4):
        raise BadVideo(f"{_SEGMENTATIONS} has the shape {array.shape}, which is none that is known")
    if array.shape[0] != frames.shape[0]:
        raise BadVideo(f"has {frames.shape[0]} frames but segmentations of {array.shape[0]}")
    size = array.shape[2:] if is_image else array.shape[1:3]
    check_mask_size(_SEGMENTATIONS, size, RawFrame("0", np.empty(frames.shape[1:3])))
    return array


def _masks(values: np.ndarray, is_image: bool, one_object: bool) -> dict[int, np.ndarray]:
    """Masks from labels (H, W) or (H, W, 1), or from objects (H, W, N), for images (N, H, W)."""
    if is_image:
        return {i: channel != 0 for i, channel in enumerate(values, 1) if channel.any()}
    if values.ndim == 3 and values.shape[2] != 1:
        return {i: values[..., i - 1] != 0 for i in range(1, values.shape[2] + 1) if values[..., i - 1].any()}
    labels = values.reshape(values.shape[:2])
    if labels.min() < 0 or labels.max() >= _LABEL_LIMIT:
        raise BadVideo(f"{_SEGMENTATIONS} has labels from {labels.min()} to {labels.max()}")
    return label_masks(labels.astype(np.uint8) if labels.dtype == bool else labels, one_object)
