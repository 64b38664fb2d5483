"""Tiny data sets in the layouts of the public ones, byte for byte, and what a reader must find in them.

`write_x(folder, videos=3, frames=5, size=(48, 64), seed=0)` writes `videos` training videos and one less
(at least one) for evaluation, of `frames`, `frames + 1`, … frames. Each returns the truth by video id, in
order, split by split. The first video of a split has a frame without objects.
"""

import io
import json
import struct
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from pipeline import storage


@dataclass
class Truth:
    """Frames (T, H, W, 3) uint8 and, for each, masks (H, W) bool by object id; None: not annotated."""

    split: str
    frames: np.ndarray
    masks: list[dict[int, np.ndarray]] | None


def scene(rng, length, size, *, objects=2, empty=None):
    """Smooth frames (T, H, W, 3), and for each object boxes (T, 4) of x0, y0, x1, y1 that may overlap.

    Frame `empty` has no object: its boxes are empty.
    """
    height, width = size
    y, x = np.mgrid[:height, :width]
    phase = rng.uniform(0, 6, 3)
    frames = np.empty((length, height, width, 3), np.uint8)
    boxes = np.zeros((objects, length, 4), int)
    colours = rng.integers(40, 255, (objects, 3))
    starts = rng.integers(0, [width // 2, height // 2], (objects, 2))
    for t in range(length):
        for c in range(3):
            frames[t, :, :, c] = 128 + 90 * np.sin(x / 9 + y / 13 + phase[c] + t / 3)
        for k in range(objects):
            if t == empty:
                continue
            x0, y0 = np.minimum(starts[k] + (k + 1) * t, [width - 9, height - 9])
            boxes[k, t] = x0, y0, min(width, x0 + width // 3), min(height, y0 + height // 3)
            frames[t, y0 : boxes[k, t, 3], x0 : boxes[k, t, 2]] = colours[k]
    return frames, boxes


def box_mask(box, size):
    mask = np.zeros(size, bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def object_masks(boxes, t, size):
    """The masks of frame t by object id from 1, without those of objects that are not there."""
    masks = {k: box_mask(track[t], size) for k, track in enumerate(boxes, 1)}
    return {k: mask for k, mask in masks.items() if mask.any()}


def label_map(boxes, t, size):
    """Labels (H, W) uint8: the last object covers the others."""
    labels = np.zeros(size, np.uint8)
    for k, mask in object_masks(boxes, t, size).items():
        labels[mask] = k
    return labels


def masks_of_labels(labels):
    return {int(i): labels == i for i in np.unique(labels) if i not in (0, 255)}


def splits(videos, *names):
    """(split, index) of every video."""
    counts = [videos, max(1, videos - 1)]
    return [(name, i) for name, count in zip(names, counts, strict=True) for i in range(count)]


def jpeg(path, pixels):
    """Writes a JPEG and returns it as decoded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "JPEG", quality=90)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def png_bytes(pixels, palette=False):
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette([0, 0, 0, *[128, 0, 0] * 255])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# --- DAVIS ------------------------------------------------------------------------------------------


def write_davis(folder, *, videos=3, frames=5, size=(48, 64), seed=0):
    """Splits train, val, and test-dev, whose one video has no masks. Masks have a void border."""
    rng, folder, truth = np.random.default_rng(seed), Path(folder), {}
    for split, i in [*splits(videos, "train", "val"), ("test-dev", 0)]:
        name = f"{split}-video{9 + i}"  # video10 comes behind video9
        pixels, boxes = scene(rng, frames + i, size, empty=1 if i == 0 else None)
        decoded, masks = [], []
        for t, frame in enumerate(pixels):
            decoded.append(jpeg(folder / "JPEGImages/480p" / name / f"{t:05d}.jpg", frame))
            labels = label_map(boxes, t, size)
            labels[0] = 255
            masks.append(masks_of_labels(labels))
            if split != "test-dev":
                path = folder / "Annotations_unsupervised/480p" / name / f"{t:05d}.png"
                storage.write_bytes(str(path), png_bytes(labels, palette=True))
        lists = folder / "ImageSets/2017" / f"{split}.txt"
        lists.parent.mkdir(parents=True, exist_ok=True)
        with open(lists, "a") as file:
            file.write(f"{name}\n")
        truth[name] = Truth(split, np.stack(decoded), masks if split != "test-dev" else None)
    return truth


# --- COCO's JSON ------------------------------------------------------------------------------------


def write_json(path, content):
    storage.write_bytes(str(path), json.dumps(content).encode())


def compressed_rle(mask):
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def uncompressed_rle(mask):
    """Run lengths down the columns, the first of background."""
    counts, value, run = [], False, 0
    for pixel in mask.T.flatten():
        if pixel != value:
            counts.append(run)
            value, run = pixel, 0
        run += 1
    return {"size": list(mask.shape), "counts": [*counts, run]}


def polygon(box):
    x0, y0, x1, y1 = (float(v) for v in box)
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def _segmentation(kind, box, size):
    if box[0] == box[2]:
        return None
    if kind == 2:
        return polygon(box)
    return (compressed_rle, uncompressed_rle)[kind](box_mask(box, size))


def write_ytvis(folder, **settings):
    """`<split>/instances.json` and `<split>/JPEGImages`; split valid has no annotations.

    The JSON lists the videos backwards. Objects overlap; the third one of each video is a crowd.
    """
    image = lambda split, name, t: (f"{split}/JPEGImages", f"{name}/{5 * t:05d}.jpg")  # noqa: E731
    return _write_vis(Path(folder), "{}/instances.json", image, **settings)


def write_ovis(folder, **settings):
    """`annotations_<split>.json` and `<split>/<video>/img_0000001.jpg`; split valid has no annotations."""
    image = lambda split, name, t: (split, f"{name}/img_{t + 1:07d}.jpg")  # noqa: E731
    return _write_vis(Path(folder), "annotations_{}.json", image, **settings)


def _write_vis(folder, json_name, image_name, *, videos=3, frames=5, size=(48, 64), seed=0):
    rng, truth, files = np.random.default_rng(seed), {}, {}
    for split, i in splits(videos, "train", "valid"):
        number, name = 9 + i, f"{rng.integers(16**8):08x}"  # 10 comes behind 9
        pixels, boxes = scene(rng, frames + i, size, objects=3, empty=1 if i == 0 else None)
        decoded, file_names = [], []
        for t, frame in enumerate(pixels):
            base, file_name = image_name(split, name, t)
            decoded.append(jpeg(folder / base / file_name, frame))
            file_names.append(file_name)
        content = files.setdefault(split, {"info": {}, "videos": [], "annotations": []})
        video = {"id": number, "file_names": file_names, "length": len(pixels)}
        content["videos"].insert(0, {**video, "height": size[0], "width": size[1]})
        for k, track in enumerate(boxes):
            segmentations = [_segmentation((i + k) % 3, box, size) for box in track]
            entry = {"id": 10**10 + 10 * number + k, "video_id": number}  # more than 32 bits
            entry |= {"category_id": 7, "iscrowd": int(k == 2), "segmentations": segmentations}
            content["annotations"].append(entry)
        masks = [object_masks(boxes[:2], t, size) for t in range(len(pixels))]
        truth[f"{number}-{name}"] = Truth(split, np.stack(decoded), masks if split == "train" else None)
    for split, content in files.items():
        if split != "train":
            del content["annotations"]
        write_json(folder / json_name.format(split), content)
    return truth


def write_coco(folder, *, videos=3, frames=1, size=(48, 64), seed=0):
    """Splits train2017 and val2017 of images (`frames` says nothing here). The first image of a split has
    no object, the second is grey; objects overlap, the last annotation of each image is a crowd."""
    rng, folder, truth, files = np.random.default_rng(seed), Path(folder), {}, {}
    for split, i in splits(videos, "train2017", "val2017"):
        number = (139 if split == "train2017" else 5000) + 7 * i
        pixels, boxes = scene(rng, 1, size, objects=3, empty=0 if i == 0 else None)
        image = pixels[0] if i != 1 else np.asarray(Image.fromarray(pixels[0]).convert("L"))
        decoded = jpeg(folder / split / f"{number:012d}.jpg", image)
        content = files.setdefault(split, {"images": [], "annotations": []})
        entry = {"id": number, "file_name": f"{number:012d}.jpg", "height": size[0], "width": size[1]}
        content["images"].insert(0, entry)
        for k, track in enumerate(boxes):
            if i == 0 and k < 2:
                continue
            everything = compressed_rle(np.ones(size, bool))
            segmentation = _segmentation((2 * k + i) % 3, track[0], size) or everything
            entry = {"id": 900_000_000_000 + 10 * number + k, "image_id": number, "category_id": 90}
            content["annotations"].append({**entry, "iscrowd": int(k == 2), "segmentation": segmentation})
        truth[f"{number:012d}"] = Truth(split, decoded[None], [object_masks(boxes[:2], 0, size)])
    for split, content in files.items():
        write_json(folder / "annotations" / f"instances_{split}.json", content)
    return truth


# --- MOVi: TFRecords, written from their specification ----------------------------------------------


def _crc_table():
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC_TABLE = _crc_table()


def crc32c(content):
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def masked_crc(content):
    crc = crc32c(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF)


def tfrecord(content):
    length = struct.pack("<Q", len(content))
    return length + masked_crc(length) + content + masked_crc(content)


def _varint(number):
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _field(number, content):
    """A length-delimited field of protobuf's wire format."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def example(features, floats=()):
    """A serialised tf.train.Example: lists of bytes, and lists of integers and of floats beside them."""
    entries = {name: _field(1, b"".join(_field(1, v) for v in values)) for name, values in features.items()}
    for name, values in dict(floats).items():
        entries[name] = _field(2, _field(1, struct.pack(f"<{len(values)}f", *values)))
    entries["metadata/num_frames"] = _field(3, _field(1, _varint(24)))
    entries["camera/focal_length"] = _field(2, _field(1, struct.pack("<f", 35.0)))
    rows = b"".join(_field(1, _field(1, name.encode()) + _field(2, v)) for name, v in sorted(entries.items()))
    return _field(1, rows)


def write_movi(folder, *, videos=3, frames=5, size=(48, 64), seed=0):
    """`movi_e-<split>.tfrecord-0000N-of-0000M` of splits train and validation, two videos a file."""
    rng, folder, truth, files = np.random.default_rng(seed), Path(folder), {}, {}
    folder.mkdir(parents=True, exist_ok=True)
    for split, i in splits(videos, "train", "validation"):
        pixels, boxes = scene(rng, frames + i, size, empty=1 if i == 0 else None)
        labels = [label_map(boxes, t, size) for t in range(len(pixels))]
        images = {"video": list(map(png_bytes, pixels)), "segmentations": list(map(png_bytes, labels))}
        record = example({**images, "metadata/video_name": [str(i).encode()]})
        files.setdefault((split, i // 2), []).append(tfrecord(record))
        masks = [masks_of_labels(label) for label in labels]
        truth[f"movi_e-{split}-{i // 2:05d}/{i % 2:04d}"] = Truth(split, pixels, masks)
    for (split, shard), records in files.items():
        total = sum(s == split for s, _ in files)
        name = f"movi_e-{split}.tfrecord-{shard:05d}-of-{total:05d}"
        (folder / name).write_bytes(b"".join(records))
    return truth


# --- WebDataset tars --------------------------------------------------------------------------------


def npy_bytes(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def write_tar(path, members):
    """A tar as webdataset writes it: members in the order given, times with fractions in PAX headers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1700000000.25
            tar.addfile(info, io.BytesIO(content))


def write_webdataset(folder, *, videos=3, frames=5, size=(48, 64), seed=0):
    """`movi_e-<split>-00000N.tar` of splits train and validation, two samples a tar.

    Segmentations are in turn labels (T, H, W, 1) with a void row, objects (T, H, W, N) as YTVIS has
    them, and labels (T, H, W); the last sample of a split is an image with objects (N, H, W).
    """
    rng, folder, truth, files = np.random.default_rng(seed), Path(folder), {}, {}
    samples = splits(videos, "train", "validation")
    for number, (split, i) in enumerate(samples):
        is_image = number + 1 == len(samples) or samples[number + 1][0] != split
        pixels, boxes = scene(rng, 1 if is_image else frames + i, size, empty=1 if i == 0 else None)
        labels = np.stack([label_map(boxes, t, size) for t in range(len(pixels))])
        objects = np.stack([[box_mask(track[t], size) for track in boxes] for t in range(len(pixels))])
        masks = [object_masks(boxes, t, size) for t in range(len(pixels))]
        if is_image:
            segmentations = objects[0].astype(np.uint8) * 17
        elif i % 3 == 1:
            segmentations = objects.transpose(0, 2, 3, 1).astype(np.uint8) * 255
        else:
            labels[:, -1] = 255
            segmentations = labels[..., None] if i % 3 == 0 else labels.astype(np.int64)
            masks = [masks_of_labels(label) for label in labels]
        pixel_member = ("image.npy", pixels[0]) if is_image else ("video.npy", pixels)
        members = [("segmentations.npy", segmentations), pixel_member]
        members.append(("forward_flow.npy", np.zeros((2, 3), np.float32)))
        rows = files.setdefault((split, i // 2), [])
        rows += [(f"{i}.{name}", npy_bytes(array)) for name, array in sorted(members, key=lambda m: m[0])]
        truth[f"movi_e-{split}-{i // 2:06d}/{i}"] = Truth(split, pixels, masks)
    for (split, shard), rows in files.items():
        write_tar(folder / f"movi_e-{split}-{shard:06d}.tar", rows)
    return truth


# Of each kind its writer, its split for evaluation and its shipped config.
_KINDS = {
    "davis": (write_davis, "val", "davis2017"),
    "ytvis": (write_ytvis, "valid", "ytvis2021"),
    "ovis": (write_ovis, "valid", "ovis"),
    "movi": (write_movi, "validation", "movi_e"),
    "coco": (write_coco, "val2017", "coco"),
    "webdataset": (write_webdataset, "validation", "webdataset"),
}
WRITERS = {kind: writer for kind, (writer, *_) in _KINDS.items()}
EVALUATION_SPLITS = {kind: split for kind, (_, split, _) in _KINDS.items()}
SHIPPED = {config: kind for kind, (*_, config) in _KINDS.items()}  # what each config reads


def training_split(kind):
    return "train2017" if kind == "coco" else "train"


# --- comparing -----------------------------------------------------------------------------------------


def assert_holds(clips, truth):
    """The clip set's videos are those of the truth, in order, pixel by pixel."""
    assert [v.video_id for v in clips.videos] == list(truth)
    for video in clips.videos:
        expected = truth[video.video_id]
        assert video.frames == len(expected.frames)
        assert video.annotated == (expected.masks is not None)
        read = list(clips.iter_video(video, masks=True))
        np.testing.assert_array_equal(np.concatenate([c.frames for c in read]), expected.frames)
        if expected.masks is None:
            assert all(c.masks is None for c in read)
            continue
        masks = [m for c in read for m in c.masks]
        assert [sorted(m) for m in masks] == [sorted(m) for m in expected.masks]
        for objects, expected_objects in zip(masks, expected.masks, strict=True):
            for object_id, mask in objects.items():
                np.testing.assert_array_equal(mask, expected_objects[object_id])


def of_split(truth, split):
    return {name: t for name, t in truth.items() if t.split == split}


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def upload(folder, uri):
    """Copies a local folder to S3."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        storage.upload_file(path, storage.join(uri, path.relative_to(folder).as_posix()))
