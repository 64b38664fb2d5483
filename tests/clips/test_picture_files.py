"""Pictures of every kind, in every layout, as Pillow's `exif_transpose` shows them, or by values computed by hand."""

import io
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from layout_sets import clip_set, find
from layouts import (
    WRITERS,
    Truth,
    assert_holds,
    edit_json,
    example,
    of_split,
    png_bytes,
    tfrecord,
    training_split,
)
from PIL import Image, ImageOps

from pipeline import storage
from pipeline.clips.sources import BadVideo, read_video
from pipeline.clips.sources.frames import decode_frame, decode_labels
from pipeline.clips.sources.pictures import frame_mark, label_mark

ORIENTATIONS = range(1, 9)
_BACK = {  # what a picture is stored as, so that it is shown as it was
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
FORMATS = {"JPEG": {"quality": 90}, "PNG": {}, "WEBP": {"lossless": True}}
RNG = np.random.default_rng(0)


def encoded(pixels, orientation, kind="PNG", *, turned_back=True):
    """A picture's file, with EXIF; its shown pixels are `pixels`, or if not `turned_back` its stored ones."""
    image = Image.fromarray(pixels)
    if turned_back and orientation in _BACK:
        image = image.transpose(_BACK[orientation])
    exif = Image.Exif()
    exif[0x112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=exif, **FORMATS[kind])
    return buffer.getvalue()


def shown(content):
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(values, depth, colour_type):
    """A PNG by its specification of samples (H, W, channels), which Pillow can't write in all depths."""
    samples = values.reshape(len(values), -1)
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in samples]
    else:
        bits = (samples[..., None] >> np.arange(depth)[::-1]) & 1
        rows = [np.packbits(row.reshape(-1)).tobytes() for row in bits]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


# --- one picture -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_turns_a_picture_as_pillow_shows_it(orientation, kind):
    content = encoded(RNG.integers(0, 256, (6, 10, 3), np.uint8), orientation, kind)
    frame = decode_frame(content, "a")
    np.testing.assert_array_equal(frame.pixels, shown(content))
    assert frame.pixels.shape == (6, 10, 3)
    assert frame.orientation == orientation
    assert bool(frame_mark(io.BytesIO(content))) == (orientation != 1)


def behind_the_pixels(content, name, data):
    return content[:-12] + chunk(name, data) + content[-12:]


EXIF = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
PROFILE = b"Raw profile type exif\0\nexif\n      26\n" + EXIF.hex().encode() + b"\n"
XMP = b'XML:com.adobe.xmp\0\0\0\0\0<rdf:Description tiff:Orientation="6"/>'


@pytest.mark.parametrize(("name", "data"), [(b"eXIf", EXIF), (b"tEXt", PROFILE), (b"iTXt", XMP)])
def test_exif_behind_the_pixels_of_a_png(name, data):
    """As exiftool and ImageMagick write it."""
    content = behind_the_pixels(png_bytes(RNG.integers(0, 256, (6, 10, 3), np.uint8)), name, data)
    frame = decode_frame(content, "a")
    assert frame.pixels.shape == (10, 6, 3)
    np.testing.assert_array_equal(frame.pixels, shown(content))
    assert frame_mark(io.BytesIO(content)) == "turned 6"


def test_text_behind_the_pixels_of_a_png_is_no_exif():
    content = behind_the_pixels(png_bytes(np.zeros((6, 10, 3), np.uint8)), b"tEXt", b"date:create\0today")
    assert frame_mark(io.BytesIO(content)) == ""


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"", b"MM\0*", b"broken", EXIF[:-12], EXIF.replace(b"\x06", b"\x09")])
def test_exif_that_says_nothing_is_passed_over(exif):
    pixels = RNG.integers(0, 256, (6, 10, 3), np.uint8)
    content = behind_the_pixels(png_bytes(pixels), b"eXIf", exif)
    np.testing.assert_array_equal(decode_frame(content, "a").pixels, pixels)
    assert frame_mark(io.BytesIO(content)) == ""


@pytest.mark.parametrize("colour_type", [0, 2, 4, 6])  # grey, colour, and both with alpha
def test_16_bits_are_scaled(colour_type):
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    values = RNG.integers(0, 65536, (6, 10, channels))
    expected = values[..., :3] if channels > 2 else np.repeat(values[..., :1], 3, axis=2)
    content = png(values, 16, colour_type)
    np.testing.assert_array_equal(decode_frame(content, "a").pixels, expected // 256)
    assert frame_mark(io.BytesIO(content)) == ("16 bits" if colour_type == 0 else "")


def test_16_bits_that_are_turned():
    values = np.arange(60).reshape(6, 10, 1) * 1000
    frame = decode_frame(behind_the_pixels(png(values, 16, 0), b"eXIf", EXIF), "a")
    np.testing.assert_array_equal(frame.pixels[..., 0], np.rot90(values[..., 0] // 256, -1))


def test_pictures_of_other_modes():
    """Inverted CMYK as Adobe writes it, alpha (left out), palettes and single bits."""
    inks = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    buffer = io.BytesIO()
    inks.save(buffer, "JPEG", quality=95)
    assert b"Adobe" in buffer.getvalue()
    assert abs(decode_frame(buffer.getvalue(), "a").pixels.astype(int) - [255, 0, 0]).max() < 6

    pictures = {
        "RGBA": (Image.new("RGBA", (3, 2), (10, 20, 30, 0)), [10, 20, 30]),
        "LA": (Image.new("LA", (3, 2), (10, 128)), [10, 10, 10]),
        "1": (Image.new("1", (3, 2), 1), [255, 255, 255]),
        "P": (Image.new("P", (3, 2), 1), [7, 8, 9]),
    }
    pictures["P"][0].putpalette([0, 0, 0, 7, 8, 9])
    for mode, (image, expected) in pictures.items():
        buffer = io.BytesIO()
        image.save(buffer, "PNG", **({"transparency": 1} if mode == "P" else {}))
        assert decode_frame(buffer.getvalue(), "a").pixels[0, 0].tolist() == expected, mode


# --- label images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("colour_type", [0, 3])
def test_labels_of_every_depth(depth, colour_type):
    """Pillow stretches grey of few bits, so that the last label was void."""
    if (depth, colour_type) == (16, 3):
        pytest.skip("a palette has 256 colours")
    labels = np.arange(60).reshape(6, 10, 1) % min(2**depth, 256)
    content = png(labels, depth, colour_type)
    if colour_type == 3:
        content = content[:33] + chunk(b"PLTE", bytes(3 * min(2**depth, 256))) + content[33:]
    np.testing.assert_array_equal(decode_labels(content, "a"), labels[..., 0])
    unusual = colour_type == 0 and depth in (2, 4, 16)
    assert bool(label_mark(io.BytesIO(content))) == unusual


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png(np.full((2, 3, 1), 26001), 16, 0), "mask a has 16-bit labels up to 26001, the most that is read is 255"),
        (png(np.ones((2, 3, 3), int), 16, 2), "mask a is a RGB image, not one of labels; save it with its palette"),
        (png_bytes(np.full((2, 3, 3), (128, 0, 0), np.uint8)), "save it with its palette (mode P), or as grey labels"),
        (png(np.ones((2, 3, 2), int), 8, 4), "mask a is a LA image"),
    ],
)  # fmt: skip
def test_labels_that_are_lost_are_named(content, reason):
    with pytest.raises(BadVideo) as error:
        decode_labels(content, "a")
    assert reason in str(error.value)
    assert label_mark(io.BytesIO(content)) == "", "it was refused before, too"


# --- every layout ----------------------------------------------------------------------------------------


def write_frame_folders(folder):
    """Folders of frames with masks, as the videos of split train."""
    truth = of_split(WRITERS["davis"](folder), "train")
    (folder / "JPEGImages/480p").rename(folder / "train")
    (folder / "Annotations_unsupervised/480p").rename(folder / "train/masks")
    for path in [*folder.glob("train/val-*"), *folder.glob("train/test-*")]:
        shutil.rmtree(path)
    return {name: truth[name] for name in sorted(truth)}


PICTURE_LAYOUTS = {
    **{k: WRITERS[k] for k in ("davis", "ytvis", "ovis", "coco")},
    "videos": write_frame_folders,
}


def rewrite_frames(folder, change):
    """Each JPEG as a PNG whose file is `change(pixels)`."""
    for path in sorted(folder.rglob("*.jpg")):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        path.with_suffix(".png").write_bytes(change(pixels))
        path.unlink()
    for path in folder.rglob("*.json"):
        path.write_text(path.read_text().replace(".jpg", ".png"))


def write_layout(kind, folder):
    return of_split(PICTURE_LAYOUTS[kind](folder), training_split(kind))


def check(kind, folder, truth, tmp_path):
    clips, report = clip_set(find(kind, folder), tmp_path)
    assert report.bad == []
    assert_holds(clips, truth)


@pytest.mark.fault(
    "frames with an EXIF orientation", "shard, davis ytvis ovis coco videos", "as exif_transpose shows them"
)
@pytest.mark.parametrize("orientation", [2, 3, 6, 7])
@pytest.mark.parametrize("kind", PICTURE_LAYOUTS)
def test_turned_frames_with_masks_of_the_shown_ones(kind, orientation, tmp_path):
    truth = write_layout(kind, tmp_path / "data")
    rewrite_frames(tmp_path / "data", lambda pixels: encoded(pixels, orientation))
    check(kind, tmp_path / "data", truth, tmp_path)


@pytest.mark.fault(
    "annotations of frames as stored, without EXIF",
    "shard, davis ytvis ovis coco videos",
    "turned with the frames",
)
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("kind", PICTURE_LAYOUTS)
def test_turned_frames_with_masks_of_the_stored_ones(kind, orientation, tmp_path):
    stored = write_layout(kind, tmp_path / "data")
    rewrite_frames(tmp_path / "data", lambda pixels: encoded(pixels, orientation, turned_back=False))

    def turned(pixels):
        return shown(encoded(np.repeat(pixels[..., None], 3, axis=2), orientation, turned_back=False))[..., 0]

    truth = {}
    for name, video in stored.items():
        frames = [shown(encoded(f, orientation, turned_back=False)) for f in video.frames]
        masks = [{k: turned(m.astype(np.uint8)) > 0 for k, m in objects.items()} for objects in video.masks]
        truth[name] = Truth(video.split, np.stack(frames), masks)
    check(kind, tmp_path / "data", truth, tmp_path)
    for video in find(kind, tmp_path / "data"):
        frames = list(read_video(video, short_side=24))
        assert all(m.shape == (32, 24) for f in frames for m in f.masks.values())


@pytest.mark.parametrize("kind", ["ytvis", "coco"])
def test_the_size_of_annotations_that_declare_none_is_that_of_their_run_lengths(kind, tmp_path):
    stored = write_layout(kind, tmp_path / "data")
    for path in (tmp_path / "data").rglob("*train*.json" if kind == "coco" else "train/*.json"):
        edit_json(path, lambda c: [v.pop("height") for v in c["videos" if kind == "ytvis" else "images"]])
    rewrite_frames(tmp_path / "data", lambda pixels: encoded(pixels, 6, turned_back=False))
    for video in find(kind, tmp_path / "data"):
        for frame, masks in zip(read_video(video), stored[video.video_id].masks, strict=True):
            whole = not any(isinstance(s, dict) for s in objects_of(video, int(frame.seconds)))
            for number, mask in frame.masks.items():
                assert mask.shape == (64, 48)
                assert whole or (mask == np.rot90(masks[number], -1)).all()


def objects_of(video, index):
    return [o[index] if video.kind == "ytvis" else o for o in video.details["objects"]]


@pytest.mark.fault(
    "16-bit grey PNG frames", "shard, davis ytvis ovis coco videos", "each value // 256, masks as ever"
)
@pytest.mark.parametrize("kind", PICTURE_LAYOUTS)
def test_deep_frames(kind, tmp_path):
    truth = write_layout(kind, tmp_path / "data")
    rewrite_frames(tmp_path / "data", lambda p: png(p[..., :1].astype(int) * 256 + 255, 16, 0))
    truth = {n: Truth(t.split, np.repeat(t.frames[..., :1], 3, axis=3), t.masks) for n, t in truth.items()}
    check(kind, tmp_path / "data", truth, tmp_path)


@pytest.mark.fault(
    "MOVi's records with turned or 16-bit pictures", "shard, movi", "as exif_transpose shows them"
)
def test_pictures_in_records(tmp_path):
    pixels = RNG.integers(0, 256, (2, 48, 64, 3), np.uint8)
    labels = [np.zeros((48, 64), np.uint8), np.eye(48, 64, dtype=np.uint8)]
    deep = [png(p[..., :1].astype(int) * 256, 16, 0) for p in pixels]
    records = [
        example({"video": [*map(png_bytes, pixels)], "segmentations": [*map(png_bytes, labels)]}),
        example({"video": [encoded(p, 8) for p in pixels], "segmentations": [*map(png_bytes, labels)]}),
        example({"video": [encoded(p, 1, "WEBP") for p in pixels]}),
        example({"video": deep}),
    ]
    (tmp_path / "movi_x-train.tfrecord-00000-of-00001").write_bytes(b"".join(map(tfrecord, records)))
    masks = [{}, {1: labels[1] == 1}]
    grey = np.repeat(pixels[..., :1], 3, axis=3)
    wanted = [(pixels, masks), (pixels, masks), (pixels, None), (grey, None)]
    truth = {f"movi_x-train-00000/{i:04d}": Truth("train", *value) for i, value in enumerate(wanted)}
    check("movi", tmp_path, truth, tmp_path)


# --- what listing finds out --------------------------------------------------------------------------------


def test_only_videos_that_are_read_otherwise_get_another_content(tmp_path):
    """Contents as the first releases computed them: a hash of the names and the bytes."""
    pixels = RNG.integers(0, 256, (4, 6, 3), np.uint8)
    frames = {
        "plain": png_bytes(pixels),
        "untouched": encoded(pixels, 1, "JPEG"),
        "turned": encoded(pixels, 6, "JPEG"),
        "deep": png(pixels[..., :1].astype(int), 16, 0),
        "colours": png(pixels.astype(int), 16, 2),
    }
    masks = {
        "objects": np.uint8([[0, 1, 255]]),
        "void": np.uint8([[0, 255, 255]]),
        "nothing": np.uint8([[0, 0, 0]]),
    }
    for name, content in frames.items():
        storage.write_bytes(str(tmp_path / name / "0.png"), content)
    for name, labels in masks.items():
        storage.write_bytes(str(tmp_path / name / "0.png"), frames["plain"])
        storage.write_bytes(str(tmp_path / "masks" / name / "0.png"), png_bytes(labels))
    memo = tmp_path.parent / f"{tmp_path.name}-memo"
    for _ in range(2):
        changed = {v.video_id for v in find("videos", tmp_path, "", memo=memo) if v.content != as_ever(v)}
        assert changed == {"turned", "deep", "void"}


def as_ever(video):
    folders = [video.path, *filter(None, [video.details.get("masks")])]
    files = [path for folder in folders for path in sorted(Path(folder).iterdir())]
    return storage.fingerprint([(path.name, storage.hash_file(str(path))) for path in files])


def test_headers_are_looked_at_once(tmp_path, monkeypatch):
    storage.write_bytes(str(tmp_path / "data/a/0.jpg"), encoded(np.zeros((4, 6, 3), np.uint8), 6, "JPEG"))
    first = find("videos", tmp_path / "data", "", memo=tmp_path / "memo")
    looks = []
    monkeypatch.setattr("pipeline.clips.sources.pictures.open_picture", looks.append)
    assert find("videos", tmp_path / "data", "", memo=tmp_path / "memo") == first
    assert looks == []
