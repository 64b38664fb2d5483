"""Annotations in another form: read where their meaning is clear, else named; never scored as empty."""

import shutil

import numpy as np
import pytest
from layout_sets import clip_set, find
from layouts import (
    WRITERS,
    Truth,
    assert_holds,
    edit_json,
    example,
    jpeg,
    npy_bytes,
    of_split,
    png_bytes,
    tfrecord,
    training_split,
    upload,
    write_json,
    write_tar,
)
from pycocotools import mask as coco_mask

from pipeline import storage

SIZE = (48, 64)


def binary_labels():
    """Three frames of 0 and 255, the first with nothing."""
    labels = np.zeros((3, *SIZE), np.uint8)
    labels[1, 5:20, 10:30], labels[2, 8:23, 12:32] = 255, 255
    return labels


def one_object(labels):
    return [{1: label == 255} if label.any() else {} for label in labels]


def with_another_label(labels):
    labels = labels.copy()
    labels[2, 40:, 50:] = 3
    return labels


def frames_of(count=3):
    return np.random.default_rng(0).integers(0, 256, (count, *SIZE, 3), np.uint8)


# --- masks of 0 and 255 ----------------------------------------------------------------------------------


def write_folders(folder, videos):
    for name, labels in videos.items():
        for t, frame in enumerate(frames_of()):
            storage.write_bytes(str(folder / f"train/{name}/{t}.png"), png_bytes(frame))
            storage.write_bytes(str(folder / f"train/masks/{name}/{t}.png"), png_bytes(labels[t]))
    return list(videos)


def write_davis_masks(folder, videos):
    for name, labels in videos.items():
        for t, frame in enumerate(frames_of()):
            storage.write_bytes(str(folder / f"JPEGImages/480p/{name}/{t}.png"), png_bytes(frame))
            place = folder / f"Annotations_unsupervised/480p/{name}/{t}.png"
            storage.write_bytes(str(place), png_bytes(labels[t], palette=True))
    storage.write_bytes(str(folder / "ImageSets/2017/train.txt"), "\n".join(videos).encode())
    return list(videos)


def write_records(folder, videos):
    records = [
        tfrecord(
            example({"video": [*map(png_bytes, frames_of())], "segmentations": [*map(png_bytes, labels)]})
        )
        for labels in videos.values()
    ]
    storage.write_bytes(str(folder / "movi_x-train.tfrecord-00000-of-00001"), b"".join(records))
    return [f"movi_x-train-00000/{i:04d}" for i in range(len(videos))]


def write_samples(folder, videos):
    arrays = {k: [("segmentations", labels), ("video", frames_of())] for k, labels in videos.items()}
    write_tar(
        folder / "x-train-000000.tar",
        [(f"{k}.{name}.npy", npy_bytes(array)) for k, members in arrays.items() for name, array in members],
    )
    return [f"x-train-000000/{k}" for k in videos]


MASK_WRITERS = {
    "videos": write_folders,
    "davis": write_davis_masks,
    "movi": write_records,
    "webdataset": write_samples,
}


@pytest.mark.fault(
    "masks of 0 and 255", "shard, videos davis movi webdataset", "one object, unless there are others"
)
@pytest.mark.parametrize("kind", MASK_WRITERS)
def test_255_is_an_object_where_a_video_has_no_other_label(kind, tmp_path):
    labels = binary_labels()
    mixed = with_another_label(labels)
    videos = {"a": labels, "b": mixed, "c": np.zeros_like(labels)}
    if kind == "webdataset":
        videos |= {"d": labels[..., None], "e": (labels > 0), "f": labels.astype(np.int64)}
    names = MASK_WRITERS[kind](tmp_path / "data", videos)
    other = [{}, {}, {3: mixed[2] == 3}]
    masks = [one_object(labels), other, [{}, {}, {}], *[one_object(labels)] * 3]
    truth = {name: Truth("train", frames_of(), own) for name, own in zip(names, masks, strict=False)}
    listed = find(kind, tmp_path / "data")
    clips, report = clip_set(listed, tmp_path)
    assert report.bad == []
    assert_holds(clips, truth)


@pytest.mark.parametrize("kind", MASK_WRITERS)
def test_only_the_video_that_is_read_otherwise_gets_another_content(kind, tmp_path, monkeypatch):
    videos = {"a": binary_labels(), "b": with_another_label(binary_labels())}
    MASK_WRITERS[kind](tmp_path, videos)
    now = [v.content for v in find(kind, tmp_path)]
    module = {"videos": "frames", "davis": "frames"}.get(kind, kind)
    monkeypatch.setattr(f"pipeline.clips.sources.{module}.is_one_object", lambda kinds: False)
    then = [v.content for v in find(kind, tmp_path)]
    assert [a == b for a, b in zip(now, then, strict=True)] == [False, True]


def test_masks_in_s3_are_read_as_local_ones(s3, tmp_path):
    MASK_WRITERS["davis"](tmp_path / "data", {"a": binary_labels()})
    upload(tmp_path / "data", storage.join(s3, "binary"))
    clips, _ = clip_set(find("davis", storage.join(s3, "binary")), tmp_path)
    assert_holds(clips, {"a": Truth("train", frames_of(), one_object(binary_labels()))})


# --- DAVIS's other folders ---------------------------------------------------------------------------------


def write_davis_2016(folder, lists="480p"):
    """Masks of 0 and 255 in Annotations, and a list of frames with their masks."""
    labels, truth, lines = binary_labels(), {}, []
    for name in ("bear", "camel"):
        frames = []
        for t in range(3):
            frame, mask = f"JPEGImages/480p/{name}/{t:05d}.jpg", f"Annotations/480p/{name}/{t:05d}.png"
            frames.append(jpeg(folder / frame, frames_of()[t]))
            storage.write_bytes(str(folder / mask), png_bytes(labels[t]))
            lines.append(f"/{frame} /{mask}")
        truth[name] = Truth("train", np.stack(frames), one_object(labels))
    storage.write_bytes(str(folder / f"ImageSets/{lists}/train.txt"), ("\n".join(lines) + "\n").encode())
    return truth


@pytest.mark.fault("DAVIS 2016: Annotations/ of 0 and 255", "shard, davis", "one object a video")
@pytest.mark.parametrize("lists", ["480p", "2016", "2017"])
def test_davis_2016(lists, tmp_path):
    truth = write_davis_2016(tmp_path / "data", lists)
    clips, report = clip_set(find("davis", tmp_path / "data"), tmp_path)
    assert report.bad == []
    assert_holds(clips, truth)


@pytest.mark.fault("DAVIS 2017: Annotations/ alone (semi-supervised)", "shard, davis", "every object's masks")
def test_davis_with_its_semi_supervised_masks(tmp_path):
    truth = WRITERS["davis"](tmp_path / "data")
    before = [v.content for v in find("davis", tmp_path / "data")]
    (tmp_path / "data/Annotations_unsupervised").rename(tmp_path / "data/Annotations")
    clips, report = clip_set(find("davis", tmp_path / "data"), tmp_path)
    assert report.bad == []
    assert_holds(clips, of_split(truth, "train"))
    assert before == [v.content for v in find("davis", tmp_path / "data")], "the same masks"


def test_davis_with_both(tmp_path):
    """The unsupervised ones, as ever; and where a split has them in neither, it is not annotated."""
    truth = WRITERS["davis"](tmp_path / "data")
    shutil.copytree(tmp_path / "data/Annotations_unsupervised", tmp_path / "data/Annotations")
    for path in (tmp_path / "data/Annotations").rglob("*.png"):
        path.write_bytes(png_bytes(np.full(SIZE, 9, np.uint8)))
    clips, _ = clip_set(find("davis", tmp_path / "data"), tmp_path)
    assert_holds(clips, of_split(truth, "train"))


@pytest.mark.fault(
    "DAVIS test-dev: a mask of the first frame alone", "shard, davis", "not annotated, and said"
)
def test_davis_with_the_first_mask_alone(tmp_path, capfd):
    truth = WRITERS["davis"](tmp_path / "data")
    place = tmp_path / "data/Annotations/480p/test-dev-video9/00000.png"
    storage.write_bytes(str(place), png_bytes(np.ones(SIZE, np.uint8)))
    clips, report = clip_set(find("davis", tmp_path / "data", "test-dev"), tmp_path)
    assert report.bad == []
    assert_holds(clips, of_split(truth, "test-dev"))
    assert "1 videos have a mask of one frame alone in" in capfd.readouterr().err


def test_davis_with_masks_of_another_resolution_alone(tmp_path, capfd):
    WRITERS["davis"](tmp_path)
    labels = tmp_path / "Annotations_unsupervised"
    (labels / "480p").rename(labels / "Full-Resolution")
    find("davis", tmp_path)
    said = "read as not annotated, there are masks in Annotations_unsupervised/Full-Resolution alone"
    assert said in capfd.readouterr().err


# --- boxes and panoptic segments ---------------------------------------------------------------------------

JSONS = {
    "coco": ("annotations/instances_train2017.json", "segmentation", "bbox"),
    "ytvis": ("train/instances.json", "segmentations", "bboxes"),
    "ovis": ("annotations_train.json", "segmentations", "bboxes"),
}
BOX = [10.0, 5.0, 20.0, 15.0]


def make_boxes(entry, kind, form):
    """Takes the masks out of an annotation, and leaves its boxes."""
    _, masks, boxes = JSONS[kind]
    count = len(entry["segmentations"]) if kind != "coco" else 0
    entry[boxes] = [BOX] * count if count else BOX
    one = {"null": None, "empty": [], "box": BOX, "boxes": [BOX], "missing": None}[form]
    entry[masks] = [one] * count if count else one
    if form == "missing":
        del entry[masks]


@pytest.mark.fault("boxes alone", "shard, coco ytvis ovis", "refused, with the way out")
@pytest.mark.parametrize("form", ["missing", "null", "empty", "box", "boxes"])
@pytest.mark.parametrize("kind", JSONS)
def test_boxes_alone_are_no_annotation(kind, form, tmp_path):
    truth = WRITERS[kind](tmp_path / "data")
    file, masks, _ = JSONS[kind]
    edit_json(tmp_path / "data" / file, lambda c: [make_boxes(a, kind, form) for a in c["annotations"]])
    with pytest.raises(
        ValueError, match=rf"{file}: its \d+ objects have no '{masks}', they are boxes alone; take"
    ):
        find(kind, tmp_path / "data")
    edit_json(tmp_path / "data" / file, lambda c: c.pop("annotations"))
    clips, _ = clip_set(find(kind, tmp_path / "data"), tmp_path)
    unannotated = {
        n: Truth(t.split, t.frames, None) for n, t in of_split(truth, training_split(kind)).items()
    }
    assert_holds(clips, unannotated)


@pytest.mark.parametrize("form", ["missing", "null", "empty", "box", "boxes"])
@pytest.mark.parametrize("kind", JSONS)
def test_one_video_of_boxes_alone_is_set_aside(kind, form, tmp_path):
    truth = list(of_split(WRITERS[kind](tmp_path / "data"), training_split(kind)))
    file, masks, _ = JSONS[kind]
    key, number = ("image_id", 146) if kind == "coco" else ("video_id", 10)

    def change(content):
        for entry in content["annotations"]:
            if entry[key] == number:
                make_boxes(entry, kind, form)

    before = [v.content for v in find(kind, tmp_path / "data")]
    edit_json(tmp_path / "data" / file, change)
    videos = find(kind, tmp_path / "data")
    clips, report = clip_set(videos, tmp_path)
    assert [b.video for b in report.bad] == [truth[1]]
    assert f"its 2 objects have boxes, but no {masks}" in report.bad[0].reason or form == "missing"
    assert [v.video_id for v in clips.videos] == [truth[0], truth[2]]
    changed = [a != b.content for a, b in zip(before, videos, strict=True)]
    assert changed == [False, True, False]


@pytest.mark.fault("panoptic annotations", "shard, coco", "refused, with the way out")
def test_panoptic_annotations_are_named(tmp_path):
    WRITERS["coco"](tmp_path)
    place = tmp_path / "annotations/instances_train2017.json"
    panoptic = tmp_path / "annotations/panoptic_train2017.json"
    segments = [{"image_id": 146, "file_name": "146.png", "segments_info": [{"id": 1, "bbox": BOX}]}]
    edit_json(place, lambda c: c.update(annotations=segments))
    with pytest.raises(
        ValueError, match=r"its annotations are panoptic \('segments_info'\), whose PNGs are not read"
    ):
        find("coco", tmp_path)
    place.rename(panoptic)
    with pytest.raises(
        FileNotFoundError, match=r"\(panoptic_train2017.json: not read, objects with masks are\)"
    ):
        find("coco", tmp_path)


# --- rings without an area -----------------------------------------------------------------------------------

RING = [10, 5, 30, 5, 30, 20, 10, 20]
RINGS = {
    "good": [[RING]],
    "two points": [[RING, [40, 40, 41, 41]]],
    "empty": [[RING, []]],
    "only two points": [[RING], [[40, 40, 41, 41]]],
    "first": [[[40, 40], RING]],
    "nothing good": [[[40, 40, 41, 41], []]],
}


def wanted_masks(objects):
    """pycocotools on the good rings alone."""
    good = {k: [r for r in rings if len(r) >= 6] for k, rings in enumerate(objects, 1)}
    return {
        k: coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(rings, *SIZE))) > 0
        for k, rings in good.items()
        if rings
    }


@pytest.mark.fault(
    "polygon rings of fewer than three points", "shard, coco ytvis", "left out, as pycocotools on the rest"
)
@pytest.mark.parametrize("kind", ["coco", "ytvis"])
def test_rings_without_an_area(kind, tmp_path):
    truth, videos, annotations = {}, [], []
    for i, (name, objects) in enumerate(RINGS.items(), 1):
        file = tmp_path / "data" / ("val" if kind == "coco" else "val/JPEGImages") / name / "0.jpg"
        pixels = jpeg(file, np.full((*SIZE, 3), 40 * i, np.uint8))
        entry = {"id": i, "height": SIZE[0], "width": SIZE[1]}
        owner = {"image_id": i} if kind == "coco" else {"video_id": i}
        videos.append(
            entry | ({"file_name": f"{name}/0.jpg"} if kind == "coco" else {"file_names": [f"{name}/0.jpg"]})
        )
        annotations += [
            {**owner, "segmentation": rings} if kind == "coco" else {**owner, "segmentations": [rings]}
            for rings in objects
        ]
        truth[f"{name}/0" if kind == "coco" else f"{i}-{name}"] = Truth(
            "val", pixels[None], [wanted_masks(objects)]
        )
    place = "annotations/instances_val.json"
    key = "images" if kind == "coco" else "videos"
    write_json(tmp_path / "data" / place, {key: videos, "annotations": annotations})
    clips, report = clip_set(find(kind, tmp_path / "data", "val"), tmp_path)
    assert report.bad == []
    assert_holds(clips, truth)
    assert truth[next(iter(truth))].masks[0][1].sum() == 300
