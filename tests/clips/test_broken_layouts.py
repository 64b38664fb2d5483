"""What is broken in a data set is set aside by name, and the rest survives."""

import json
import shutil
import struct
import tarfile

import numpy as np
import pytest
from layout_sets import clip_set, find
from layouts import (
    WRITERS,
    assert_holds,
    edit_json,
    example,
    masked_crc,
    npy_bytes,
    of_split,
    png_bytes,
    tfrecord,
    training_split,
    write_tar,
)
from PIL import Image

# --- one broken member: it is set aside by name, the rest survives ----------------------------------------------


def cut(path, keep=0.6):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def truncate_jpeg(pattern):
    return lambda folder: cut(sorted(folder.glob(pattern))[0])


def davis_mask(name, content):
    return lambda folder: (folder / "Annotations_unsupervised/480p/train-video10" / name).write_bytes(content)


def annotation(change, *, number=10, key="video_id", file="train/instances.json"):
    """Changes the first annotation of a video."""

    def damage(folder):
        edit_json(folder / file, lambda c: change(next(a for a in c["annotations"] if a[key] == number)))

    return damage


def video_entry(change):
    return lambda folder: edit_json(
        folder / "train/instances.json", lambda c: change(next(v for v in c["videos"] if v["id"] == 10))
    )


def first_segmentation(value):
    def change(entry):
        entry["segmentations"][1] = value

    return annotation(change)


def records(path):
    """The data of each record of a TFRecord file."""
    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack_from("<Q", content)
        found.append(content[12 : 12 + length])
        content = content[16 + length :]
    return found


def movi_record(make):
    """Replaces the second record of the first file."""

    def damage(folder):
        path = folder / "movi_e-train.tfrecord-00000-of-00002"
        first, second = records(path)
        path.write_bytes(tfrecord(first) + make(second))

    return damage


def flip(content, position):
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


PNG = png_bytes(np.zeros((48, 64, 3), np.uint8))
LABELS = png_bytes(np.zeros((48, 64), np.uint8))
NOISE = png_bytes(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
SMALL = png_bytes(np.zeros((40, 64), np.uint8))


def other_example(**features):
    return lambda _: tfrecord(example(features))


def sample(**arrays):
    """Replaces the members of sample 1, which is the second of the first tar."""

    def damage(folder):
        path = folder / "movi_e-train-000000.tar"
        kept = [(m.name, c) for m, c in tar_members(path) if not m.name.startswith("1.")]
        new = [(f"1.{n}.npy", a if isinstance(a, bytes) else npy_bytes(a)) for n, a in arrays.items()]
        write_tar(path, kept + new)

    return damage


def tar_members(path):
    with tarfile.open(path) as tar:
        return [(m, tar.extractfile(m).read()) for m in tar.getmembers()]


VIDEO = np.zeros((3, 48, 64, 3), np.uint8)
SEGMENTATIONS = np.zeros((3, 48, 64, 1), np.uint8)

# The video that is broken, of each kind; how it is, and the reason that is given.
BROKEN = {
    "davis": "train-video10",
    "ytvis": "10-",
    "coco": "000000000146",
    "movi": "movi_e-train-00000/0001",
    "webdataset": "movi_e-train-000000/1",
}
DAMAGES = {
    "davis: a cut JPEG": (truncate_jpeg("JPEGImages/480p/train-video10/*.jpg"), "frame 00000.jpg can't be decoded"),
    "davis: a mask that is no PNG": (davis_mask("00002.png", b"broken"), "mask 00002.png can't be decoded"),
    "davis: a cut mask": (davis_mask("00002.png", LABELS[:60]), "mask 00002.png can't be decoded"),
    "davis: an empty mask of another size": (davis_mask("00002.png", SMALL),
     "mask 00002.png is 64x40, its frame 00002.jpg 64x48 pixels"),
    "davis: a colour picture for a mask": (davis_mask("00002.png", PNG),
     "mask 00002.png is a RGB image, not one of labels"),
    "davis: a mask is missing": (lambda f: (f / "Annotations_unsupervised/480p/train-video10/00003.png").unlink(),
     "mask 00003.png is missing"),
    "davis: a frame is missing": (lambda f: (f / "JPEGImages/480p/train-video10/00003.jpg").unlink(),
     "mask 00003.png has no frame"),
    "davis: frames of another size": (
        lambda f: Image.new("RGB", (128, 96)).save(f / "JPEGImages/480p/train-video10/00001.jpg"),
        "mask 00001.png is 64x48, its frame 00001.jpg 128x96 pixels"),
    "davis: no folder": (lambda f: shutil.rmtree(f / "JPEGImages/480p/train-video10"),
     "is in the list of the split, but has no frames in"),
    "ytvis: a frame is missing": (lambda f: (ytvis_folder(f) / "00005.jpg").unlink(),
     "1 of 6 frames are missing, the first is"),
    "ytvis: a list of another length": (annotation(lambda a: a["segmentations"].pop()),
     "object 1 has 5 segmentations for 6 frames"),
    "ytvis: no list": (annotation(lambda a: a.pop("segmentations")), "object 1 has no segmentations for 6 frames"),
    "ytvis: run lengths of another size": (first_segmentation({"size": [64, 48], "counts": [3072]}),
     "mask of object 1 is 48x64, its frame 00005.jpg 64x48 pixels"),
    "ytvis: run lengths that are too long": (first_segmentation({"size": [48, 64], "counts": [3072, 1]}),
     "mask of object 1 in frame 00005.jpg is damaged: its runs don't add up to 64x48 pixels"),
    "ytvis: run lengths that are cut": (first_segmentation({"size": [48, 64], "counts": "0Pm0"}),
     "mask of object 1 in frame 00005"),
    "ytvis: run lengths that are no text": (first_segmentation({"size": [48, 64], "counts": "é~"}),
     "its counts are no run lengths"),
    "ytvis: a polygon of seven numbers": (first_segmentation([[1, 1, 5, 5, 5, 9, 1]]),
     "a polygon is no list of three or more corners"),
    "ytvis: a polygon far away": (first_segmentation([[0, 0, 1e9, 0, 1e9, 1e9]]),
     "a polygon has corners far outside"),
    "ytvis: a segmentation of nothing known": (first_segmentation("mask"), "it is neither run lengths nor polygons"),
    "ytvis: another length declared": (video_entry(lambda v: v.update(length=9)), "declares 9 frames and names 6"),
    "ytvis: another size declared": (video_entry(lambda v: v.update(height=50)),
     "mask list is 64x50, its frame 00000.jpg 64x48 pixels"),
    "ytvis: a size that is none": (video_entry(lambda v: v.update(height="abc")),
     "its JSON entry declares the height 'abc' and the width 64"),
    "ytvis: a size of lists": (video_entry(lambda v: v.update(width=[64])),
     "declares the height 48 and the width [64]"),
    "ytvis: run lengths beyond 64 bits": (first_segmentation({"size": [48, 64], "counts": [10**30]}),
     "mask of object 1 in frame 00005.jpg is damaged"),
    "ytvis: a name that leads out": (video_entry(lambda v: v.update(file_names=["../../x.jpg"], length=1)),
     "1 of 1 frames are missing"),
    "coco: a cut JPEG": (truncate_jpeg("train2017/*146.jpg"), "frame 000000000146.jpg can't be decoded"),
    "coco: an image is missing": (lambda f: (f / "train2017/000000000146.jpg").unlink(), "146.jpg is missing in"),
    "coco: run lengths that are too short": (
        annotation(lambda a: a.update(segmentation={"size": [48, 64], "counts": [7]}),
                   number=146, key="image_id", file="annotations/instances_train2017.json"),
        "mask of object 1 in frame 000000000146.jpg is damaged"),
    "movi: a flipped bit": (movi_record(lambda r: flip(tfrecord(r), 500)), "wrong checksum"),
    "movi: no Example": (movi_record(lambda r: tfrecord(b"\xff" * 50)), "no tf.train.Example"),
    "movi: no video": (movi_record(other_example(image=[PNG])),
     "it has no feature 'video', only camera/focal_length, image, metadata/num_frames"),
    "movi: an empty video": (movi_record(other_example(video=[])), "has no frames"),
    "movi: fewer masks than frames": (movi_record(other_example(video=[PNG, PNG], segmentations=[LABELS])),
     "has 2 frames but 1 masks"),
    "movi: a mask of another size": (movi_record(other_example(video=[PNG, PNG], segmentations=[LABELS, SMALL])),
     "mask 1 is 64x40, its frame 1 64x48 pixels"),
    "movi: a cut PNG": (movi_record(other_example(video=[PNG, NOISE[: len(NOISE) // 2]])),
     "frame 1 can't be decoded"),
    "movi: a damaged length": (movi_record(lambda r: flip(tfrecord(r), 1)),
     "movi_e-train.tfrecord-00000-of-00002: the length at byte"),
    "movi: a cut record": (movi_record(lambda r: tfrecord(r)[:-9]), "the file ends within the record"),
    "movi: a cut header": (movi_record(lambda r: tfrecord(r)[:7]), "the file ends within the header"),
    "webdataset: floats": (sample(video=VIDEO.astype(np.float32)),
     "video.npy is float32 (3, 48, 64, 3), not uint8 (T, H, W, 3)"),
    "webdataset: no channels": (sample(video=VIDEO[..., 0]), "not uint8 (T, H, W, 3)"),
    "webdataset: an empty video": (sample(video=VIDEO[:0]), "video.npy is empty: (0, 48, 64, 3)"),
    "webdataset: segmentations of floats": (sample(video=VIDEO, segmentations=SEGMENTATIONS.astype(float)),
     "segmentations.npy is float64, not integers or bool"),
    "webdataset: Python objects": (sample(video=VIDEO, segmentations=np.array([{}, None])),
     "segmentations.npy holds Python objects, which are never unpickled"),
    "webdataset: Fortran's order": (sample(video=np.asfortranarray(VIDEO + np.arange(3, dtype=np.uint8))),
     "video.npy is in Fortran's order"),
    "webdataset: fewer segmentations": (sample(video=VIDEO, segmentations=SEGMENTATIONS[:2]),
     "has 3 frames but segmentations of 2"),
    "webdataset: segmentations of another size": (sample(video=VIDEO, segmentations=SEGMENTATIONS[:, :40]),
     "mask segmentations.npy is 64x40, its frame 0 64x48 pixels"),
    "webdataset: segmentations of two axes": (sample(video=VIDEO, segmentations=SEGMENTATIONS[0, ..., 0]),
     "segmentations.npy has the shape (48, 64)"),
    "webdataset: a negative label": (sample(video=VIDEO, segmentations=SEGMENTATIONS.astype(np.int16) - 1),
     "segmentations.npy has labels from -1 to -1"),
    "webdataset: a cut array": (sample(video=npy_bytes(VIDEO)[:-5]), "video.npy has 27771 bytes"),
    "webdataset: no array": (sample(video=b"no array at all"), "video.npy is no array"),
    "webdataset: an empty member": (sample(video=b""), "video.npy is no array"),
    "webdataset: no video": (sample(segmentations=SEGMENTATIONS),
     "has no video.npy or image.npy, only segmentations.npy"),
    "webdataset: a cut tar": (lambda f: cut(f / "movi_e-train-000000.tar", 0.9),
     "movi_e-train-000000.tar: the tar ends within 1.video.npy"),
}  # fmt: skip


def ytvis_folder(folder):
    content = json.loads((folder / "train/instances.json").read_text())
    entry = next(v for v in content["videos"] if v["id"] == 10)
    return (folder / "train/JPEGImages" / entry["file_names"][0]).parent


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_broken_is_set_aside_by_name(name, tmp_path):
    kind, (damage, reason) = name.split(":")[0], DAMAGES[name]
    truth = of_split(WRITERS[kind](tmp_path / "data"), training_split(kind))
    whole = find(kind, tmp_path / "data")
    damage(tmp_path / "data")
    videos = find(kind, tmp_path / "data")
    clips, report = clip_set(videos, tmp_path)
    (bad,) = report.bad
    assert bad.video.startswith(BROKEN[kind])
    assert reason in bad.reason
    assert "\n" not in bad.reason
    assert "<_io" not in bad.reason
    survivors = {k: t for k, t in truth.items() if k != list(truth)[1]}
    assert len(survivors) == 2
    assert_holds(clips, survivors)
    assert [v.content for v in videos] != [v.content for v in whole], "else the old clip set would be found"


JSONS = {
    "ytvis": ("train/instances.json", "videos", "video_id"),
    "coco": ("annotations/instances_train2017.json", "images", "image_id"),
}


@pytest.mark.parametrize("kind", JSONS)
def test_annotations_of_videos_that_are_not_there(kind, tmp_path):
    """As videos they would shift the slices."""
    file, videos, owner = JSONS[kind]
    WRITERS[kind](tmp_path)
    edit_json(tmp_path / file, lambda c: c["annotations"].extend({owner: n} for n in (900, 99, 99)))
    split = training_split(kind)
    for part in (split, f"{split}[:-1]", f"{split}[-1:]"):
        with pytest.raises(ValueError, match=rf"{file}: 2 {videos} have annotations, .*\({owner} 99, 900\)"):
            find(kind, tmp_path, part)


@pytest.mark.parametrize("kind", JSONS)
@pytest.mark.parametrize("entry", [None, "text", {}, {"video_id": [1], "image_id": [1]}])
def test_an_annotation_that_is_none(entry, kind, tmp_path):
    file, _, owner = JSONS[kind]
    WRITERS[kind](tmp_path)
    edit_json(tmp_path / file, lambda c: c["annotations"].insert(1, entry))
    with pytest.raises(ValueError, match=rf"{file}: annotations\[1\] is no entry with '{owner}', but "):
        find(kind, tmp_path)


@pytest.mark.parametrize("content", ["text", {}, 7])
def test_annotations_that_are_no_list(content, tmp_path):
    WRITERS["ytvis"](tmp_path)
    edit_json(tmp_path / "train/instances.json", lambda c: c.update(annotations=content))
    with pytest.raises(ValueError, match=r"train/instances\.json: has no list 'annotations'"):
        find("ytvis", tmp_path)


@pytest.mark.parametrize(("position", "bad"), [(9, "0000"), (-1, "0001")])
def test_a_damaged_checksum_hides_no_other_file(position, bad, tmp_path):
    """That of the first length hides the rest of its file, that of the last record's data only itself."""
    truth = of_split(WRITERS["movi"](tmp_path / "data"), "train")
    path = tmp_path / "data/movi_e-train.tfrecord-00000-of-00002"
    content = path.read_bytes()
    path.write_bytes(flip(content, position % len(content)))
    clips, report = clip_set(find("movi", tmp_path / "data"), tmp_path)
    assert [b.video for b in report.bad] == [f"movi_e-train-00000/{bad}"]
    lost = [k for k in truth if f"movi_e-train-00000/{bad}" <= k < "movi_e-train-00001"]
    assert_holds(clips, {k: t for k, t in truth.items() if k not in lost})


@pytest.mark.parametrize(
    ("kind", "name", "missing"),
    [
        ("movi", "movi_e-train.tfrecord-{:05d}-of-00006", [1]),
        ("movi", "movi_e-train.tfrecord-{:05d}-of-00006", [0, 2, 4, 5]),
        ("webdataset", "movi_e-train-{:06d}.tar", [1]),
        ("webdataset", "movi_e-train-{:06d}.tar", [0, 1, 2, 3]),
    ],
)
def test_missing_files_are_an_error(kind, name, missing, tmp_path):
    """Half a data set is not one bad video."""
    WRITERS[kind](tmp_path, videos=12)
    for number in missing:
        (tmp_path / name.format(number)).unlink()
    with pytest.raises(FileNotFoundError) as error:
        find(kind, tmp_path)
    text = str(error.value)
    names = ", ".join(name.format(number) for number in missing[:3])
    names += ", …" if len(missing) > 3 else ""
    assert text.startswith(f"{tmp_path}: {len(missing)} of 6 files are missing ({names}); download them")


def test_records_of_movi_without_masks_are_not_annotated(tmp_path):
    path = tmp_path / "movi_c-test.tfrecord-00000-of-00001"
    path.write_bytes(tfrecord(example({"video": [PNG, PNG]})))
    clips, _ = clip_set(find("movi", tmp_path, "test"), tmp_path)
    assert (clips.videos[0].frames, clips.videos[0].annotated) == (2, False)


def test_checksums_are_those_of_the_specification():
    """The check value of CRC-32C, and TensorFlow's mask of it."""
    (masked,) = struct.unpack("<I", masked_crc(b"123456789"))
    assert masked == ((0xE3069283 >> 15 | 0xE3069283 << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


@pytest.mark.parametrize(
    ("damage", "bad", "reason"),
    [
        # the header of the second sample's first member, so that the first sample is whole
        (lambda c, at: flip(c, at[3] + 148), "movi_e-train-000000/after 0", "header at byte"),
        # the header of the first sample's last member: video.npy is lost, and with it the sample
        (lambda c, at: flip(c, at[2] + 148), "movi_e-train-000000/0", "header at byte"),
        (lambda c, at: c[: at[3]], "movi_e-train-000000/after 0", "ends without its end mark"),
        (lambda c, at: flip(c, 148), "movi_e-train-000000/start", "the tar is damaged or cut"),
        (lambda c, at: b"", "movi_e-train-000000/start", "the tar"),
    ],
)
def test_damaged_headers_of_a_tar(damage, bad, reason, tmp_path):
    """tarfile takes a damaged header for the end, and what follows would be missing without a word."""
    truth = of_split(WRITERS["webdataset"](tmp_path / "data"), "train")
    path = tmp_path / "data/movi_e-train-000000.tar"
    write_tar(path, plain := [(m.name, c) for m, c in tar_members(path)])
    with tarfile.open(path) as tar:
        headers = [m.offset for m in tar.getmembers()]
    assert [n for n, _ in plain[:3]] == ["0.forward_flow.npy", "0.segmentations.npy", "0.video.npy"]
    path.write_bytes(damage(path.read_bytes(), headers))
    clips, report = clip_set(find("webdataset", tmp_path / "data"), tmp_path)
    assert [b.video for b in report.bad] == [bad]
    assert reason in report.bad[0].reason
    names = list(truth)[2:] if not bad.endswith("after 0") else [n for n in truth if n != list(truth)[1]]
    assert_holds(clips, {n: truth[n] for n in names})


def test_a_sample_that_is_there_twice(tmp_path):
    write_tar(tmp_path / "a-train-000000.tar", [("0.video.npy", npy_bytes(VIDEO))] * 2)
    _, report = clip_set(find("webdataset", tmp_path), tmp_path)
    assert report.bad[0].reason == "the tar has 0.video.npy twice"


def test_images_without_a_video_axis(tmp_path):
    images = {"5.image": VIDEO[0], "6.image": VIDEO, "7.image": VIDEO[0], "7.segmentations": SEGMENTATIONS[0]}
    write_tar(tmp_path / "coco-train-000000.tar", [(f"{n}.npy", npy_bytes(a)) for n, a in images.items()])
    clips, report = clip_set(find("webdataset", tmp_path), tmp_path, clip_frames=1)
    assert [(v.video_id, v.frames, v.annotated) for v in clips.videos] == [("coco-train-000000/5", 1, False)]
    assert [b.reason for b in report.bad] == [
        "image.npy is uint8 (3, 48, 64, 3), not uint8 (H, W, 3)",
        "mask segmentations.npy is 1x64, its frame 0 64x48 pixels",
    ]
