"""Data sets in their public layouts: what is in the files comes out of the clip table."""

import json
import shutil

import numpy as np
import pytest
from layout_sets import clip_set, find
from layouts import (
    EVALUATION_SPLITS,
    SHIPPED,
    WRITERS,
    assert_holds,
    edit_json,
    npy_bytes,
    of_split,
    training_split,
    write_tar,
)
from PIL import Image

from pipeline import storage
from pipeline.clips.library import ClipLibrary
from pipeline.clips.sources import list_videos, read_video
from pipeline.config import ConfigError, Dataset, load_config, resolve_config
from pipeline.report.tables import COCO, DAVIS, MOVI_E, OVIS, YTVIS

KINDS = list(WRITERS)


# --- what is in the files comes out --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_split_comes_back_exactly(kind, tmp_path):
    truth = WRITERS[kind](tmp_path / "data")
    for split in (training_split(kind), EVALUATION_SPLITS[kind]):
        clips, report = clip_set(find(kind, tmp_path / "data", split), tmp_path)
        assert report.bad == []
        assert_holds(clips, of_split(truth, split))
    ids = [v.video_id for v in find(kind, tmp_path / "data")]
    assert len(ids) == 3


def test_the_fixtures_have_what_is_difficult(tmp_path):
    """Overlapping objects, frames without any, grey images, polygons and both kinds of run lengths."""
    truth = WRITERS["ytvis"](tmp_path / "ytvis")
    masks = [m for t in truth.values() if t.masks for m in t.masks]
    assert any(len(m) == 2 and (m[1] & m[2]).any() for m in masks)
    assert {} in masks
    entries = json.loads((tmp_path / "ytvis/train/instances.json").read_text())["annotations"]
    segmentations = [s for e in entries for s in e["segmentations"]]
    assert any(isinstance(s, list) for s in segmentations)
    assert None in segmentations
    assert {type(s["counts"]) for s in segmentations if isinstance(s, dict)} == {str, list}
    WRITERS["coco"](tmp_path / "coco")
    modes = {Image.open(p).mode for p in (tmp_path / "coco/train2017").iterdir()}
    assert modes == {"L", "RGB"}


def test_davis_without_masks_is_not_annotated(tmp_path):
    truth = WRITERS["davis"](tmp_path / "data")
    clips, _ = clip_set(find("davis", tmp_path / "data", "test-dev"), tmp_path)
    assert_holds(clips, of_split(truth, "test-dev"))
    assert not clips.videos[0].annotated


@pytest.mark.parametrize("kind", KINDS)
def test_frames_and_masks_are_resized_together(kind, tmp_path):
    truth = WRITERS[kind](tmp_path / "data")
    for video in find(kind, tmp_path / "data"):
        expected = truth[video.video_id]
        frames = list(read_video(video, short_side=24))
        for t, frame in enumerate(frames):
            image = Image.fromarray(expected.frames[t]).resize((32, 24), Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(frame.pixels, np.asarray(image))
            assert frame.seconds == t
            for object_id, mask in expected.masks[t].items():
                np.testing.assert_array_equal(frame.masks[object_id], mask[1::2, 1::2])


@pytest.mark.parametrize(
    ("split", "kept"),
    [("train[:-1]", [0, 1]), ("train[-1:]", [2]), ("train[1:2]", [1]), ("train[:99]", [0, 1, 2])],
)
@pytest.mark.parametrize("kind", ["ytvis", "movi", "davis"])
def test_slices_of_a_split(kind, split, kept, tmp_path):
    truth = list(of_split(WRITERS[kind](tmp_path), "train"))
    assert [v.video_id for v in find(kind, tmp_path, split)] == [truth[i] for i in kept]


def test_a_slice_of_a_folder_of_videos(tmp_path):
    for name in ("a", "b", "c"):
        storage.write_bytes(str(tmp_path / "train" / f"{name}.mp4"), b"x")
    assert [v.video_id for v in find("videos", tmp_path, "train[1:]")] == ["b", "c"]
    assert [v.video_id for v in find("videos", tmp_path, "[:2]")] == ["train/a", "train/b"]


def test_slices_of_generated_videos(tmp_path):
    made = {"videos": 3, "validation_videos": 2, "frames": 2}
    settings = ["evaluate.split=validation[:1]", f"storage.root={tmp_path}"]
    config = resolve_config({"dataset": {"kind": "synthetic", "synthetic": made}}, settings)
    assert len(ClipLibrary().videos(config, "")) == 3
    assert len(ClipLibrary().videos(config, "[:2]")) == 2
    assert [v.video_id for v in ClipLibrary().videos(config, "validation[:1]")] == ["video_00000"]


def test_an_empty_slice_is_an_error(tmp_path):
    WRITERS["ytvis"](tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'train\[:-300\]' is empty, .*/train has 3"):
        find("ytvis", tmp_path, "train[:-300]")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_is_of_a_data_set_of_the_report(name):
    parts = (MOVI_E, YTVIS, DAVIS, OVIS, COCO)
    title = load_config(f"configs/{name}.yaml").dataset.title
    assert title in {part.dataset for part in parts}
    if name in ("movi_e", "webdataset"):
        assert title == MOVI_E.dataset


@pytest.mark.parametrize("key", ["dataset.split", "evaluate.split"])
@pytest.mark.parametrize("split", ["train[:-300", "train[3]", "train[:10%]", "train[a:b]", "train[1:2]x"])
def test_a_slice_that_is_none_is_refused(key, split):
    with pytest.raises(ConfigError) as error:
        resolve_config({}, [f"{key}={split}"])
    assert str(error.value).startswith(f"{key}: {split!r}")
    assert "train[:-300]" in str(error.value)


def test_coco_has_clips_of_one_frame():
    with pytest.raises(ConfigError, match=r"clips\.clip_frames: 4 .* nearest valid: 1"):
        resolve_config({"dataset": {"kind": "coco"}})
    values = {"dataset": {"kind": "coco"}, "clips": {"clip_frames": 1}}
    config = resolve_config(values, ["distill.alpha=0", "teacher.train.alpha=0", "dataset.name=COCO"])
    assert config.dataset.title == "COCO"
    assert resolve_config({}).dataset.title == "videos"


# --- other places of the same files -------------------------------------------------------------------------


JSON_PLACES = ("{}/instances.json", "{}.json", "annotations_{}.json", "annotations/instances_{}.json")
IMAGE_PLACES = ("train/JPEGImages", "train", "JPEGImages/train", "JPEGImages")


@pytest.mark.parametrize("json_place", JSON_PLACES)
@pytest.mark.parametrize("image_place", IMAGE_PLACES)
def test_all_places_of_ytvis(json_place, image_place, tmp_path):
    truth = of_split(WRITERS["ytvis"](tmp_path / "a"), "train")
    for here, there in (
        ("train/instances.json", json_place.format("train")),
        ("train/JPEGImages", image_place),
    ):
        (tmp_path / "b" / there).parent.mkdir(parents=True, exist_ok=True)
        if (tmp_path / "a" / here).is_dir():
            shutil.copytree(tmp_path / "a" / here, tmp_path / "b" / there, dirs_exist_ok=True)
        else:
            shutil.copy(tmp_path / "a" / here, tmp_path / "b" / there)
    videos = find("ytvis", tmp_path / "b")
    assert [v.video_id for v in videos] == list(truth)
    assert videos[0].problem == ""


def test_the_other_place_of_coco(tmp_path):
    truth = of_split(WRITERS["coco"](tmp_path / "a"), "train2017")
    (tmp_path / "a/images").mkdir()
    (tmp_path / "a/train2017").rename(tmp_path / "a/images/train2017")
    clips, _ = clip_set(find("coco", tmp_path / "a"), tmp_path)
    assert_holds(clips, truth)


@pytest.mark.fault("frames in WebP, BMP and PNG", "shard, davis ytvis ovis coco", "read pixel by pixel")
@pytest.mark.parametrize("suffix", [".webp", ".bmp", ".png"])
@pytest.mark.parametrize("kind", ["davis", "ytvis", "ovis", "coco"])
def test_frames_in_every_picture_format(kind, suffix, tmp_path):
    truth = of_split(WRITERS[kind](tmp_path / "data"), training_split(kind))
    for path in (tmp_path / "data").rglob("*.jpg"):
        Image.open(path).convert("RGB").save(path.with_suffix(suffix), lossless=True)
        path.unlink()
    for path in (tmp_path / "data").rglob("*.json"):
        path.write_text(path.read_text().replace(".jpg", suffix))
    clips, report = clip_set(find(kind, tmp_path / "data"), tmp_path)
    assert report.bad == []
    assert_holds(clips, truth)


# --- names ----------------------------------------------------------------------------------------------------


def test_names_that_lead_out_of_a_folder_are_set_aside(tmp_path):
    video = np.zeros((3, 48, 64, 3), np.uint8)
    keys = ("../../evil", "/evil", "deep/ok", "a\\b", "a\x01b")
    write_tar(tmp_path / "tars/a-train-000000.tar", [(f"{key}.video.npy", npy_bytes(video)) for key in keys])
    _, report = clip_set(find("webdataset", tmp_path / "tars"), tmp_path)
    assert [v.video_id for v in report.videos] == ["a-train-000000/deep/ok"]
    reasons = [b.reason for b in report.bad]
    assert [r.partition("can't be used: ")[2] for r in reasons] == [
        "it leads out of a folder; rename it",
        "it leads out of a folder; rename it",
        "it has a backslash, which leads out of a folder on some systems; rename it",
        "it has a control character; rename it",
    ]
    assert "a\\x01b" in reasons[3]

    WRITERS["davis"](tmp_path / "davis")
    (tmp_path / "davis/ImageSets/2017/train.txt").write_text("../../../etc\n/etc\ntrain-video9\n")
    _, report = clip_set(find("davis", tmp_path / "davis"), tmp_path)
    assert [v.video_id for v in report.videos] == ["train-video9"]
    assert len(report.bad) == 2

    WRITERS["coco"](tmp_path / "coco")
    path = tmp_path / "coco/annotations/instances_train2017.json"
    edit_json(path, lambda c: c["images"][0].update(file_name="../val2017/000000005000.jpg"))
    _, report = clip_set(find("coco", tmp_path / "coco"), tmp_path)
    assert [b.video for b in report.bad] == ["../val2017/000000005000"]


def test_two_videos_of_one_name(tmp_path):
    WRITERS["davis"](tmp_path / "davis")
    (tmp_path / "davis/ImageSets/2017/train.txt").write_text("train-video9\ntrain-video9\n")
    with pytest.raises(ValueError, match="two videos have the id 'train-video9'"):
        find("davis", tmp_path / "davis")
    WRITERS["ytvis"](tmp_path / "ytvis")
    edit_json(tmp_path / "ytvis/train/instances.json", lambda c: c["videos"].append(c["videos"][0]))
    with pytest.raises(ValueError, match=r"instances.json: two videos have the same id"):
        find("ytvis", tmp_path / "ytvis")


# --- errors that a user causes -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_split_names_those_that_exist(kind, tmp_path):
    WRITERS[kind](tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        find(kind, tmp_path, "trian")
    text = str(error.value)
    assert "'trian'" in text
    for split in (training_split(kind), EVALUATION_SPLITS[kind]):
        assert split in text.split("splits: ")[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_with_nothing_in_it(kind, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}.*splits: none"):
        find(kind, tmp_path)


def test_the_places_looked_in_are_named(tmp_path):
    WRITERS["ytvis"](tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        find("ytvis", tmp_path, "test")
    for place in JSON_PLACES:
        assert f"{tmp_path}/{place.format('test')}" in str(error.value)
    shutil.rmtree(tmp_path / "train/JPEGImages")
    with pytest.raises(FileNotFoundError, match="none of its frames is there") as error:
        find("ytvis", tmp_path)
    for place in IMAGE_PLACES:
        assert f"{tmp_path}/{place}" in str(error.value)
    WRITERS["coco"](tmp_path / "coco")
    shutil.rmtree(tmp_path / "coco/train2017")
    with pytest.raises(FileNotFoundError, match=r"coco/train2017, .*coco/images/train2017"):
        find("coco", tmp_path / "coco")


def test_an_unknown_resolution_names_those_that_exist(tmp_path):
    WRITERS["davis"](tmp_path)
    with pytest.raises(FileNotFoundError, match=r"dataset\.resolution: .*1080p; resolutions: 480p"):
        find("davis", tmp_path, resolution="1080p")


def test_two_data_sets_in_one_folder(tmp_path):
    WRITERS["movi"](tmp_path)
    (tmp_path / "movi_c-train.tfrecord-00000-of-00001").touch()
    with pytest.raises(ValueError, match=r"several data sets: movi_c \(1 files\), movi_e \(2 files\)"):
        find("movi", tmp_path)
    WRITERS["webdataset"](tmp_path)
    (tmp_path / "davis-train-000000.tar").touch()
    with pytest.raises(ValueError, match="several data sets: davis, movi_e"):
        find("webdataset", tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"videos": 3}', '{"videos": [{}]}'])
def test_a_damaged_json_is_named(content, tmp_path):
    WRITERS["ytvis"](tmp_path)
    (tmp_path / "train/instances.json").write_text(content)
    with pytest.raises(ValueError, match=r"train/instances\.json"):
        find("ytvis", tmp_path)


def test_no_path():
    with pytest.raises(ValueError, match=r"dataset\.path: is not set"):
        list_videos(Dataset(kind="movi"), "train", held_out=None)
