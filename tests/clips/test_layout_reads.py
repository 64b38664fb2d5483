"""What is read of a data set when, locally and from S3."""

import shutil
import tracemalloc

import numpy as np
import pytest
from layout_sets import clip_set, find
from layouts import WRITERS, assert_holds, edit_json, npy_bytes, of_split, training_split, upload, write_tar

from pipeline import storage
from pipeline.clips.sources import read_video
from pipeline.storage import s3 as s3_objects

KINDS = list(WRITERS)


# --- what is read, and how much of it ---------------------------------------------------------------------------


def test_contents_follow_annotations(tmp_path):
    """Equal frames with other masks are another clip set."""
    for kind, path in (("ytvis", "train/instances.json"), ("coco", "annotations/instances_train2017.json")):
        WRITERS[kind](tmp_path / kind)
        before = [v.content for v in find(kind, tmp_path / kind)]
        assert before == [v.content for v in find(kind, tmp_path / kind)]
        edit_json(tmp_path / kind / path, lambda c: c["annotations"].pop(-2))
        assert before != [v.content for v in find(kind, tmp_path / kind)]


def test_a_video_in_a_tar_is_streamed(tmp_path):
    frames = np.zeros((100, 200, 300, 3), np.uint8)
    members = [("0.video.npy", npy_bytes(frames)), ("0.segmentations.npy", npy_bytes(frames[..., :1]))]
    write_tar(tmp_path / "a-train-000000.tar", members)
    del members
    (video,) = find("webdataset", tmp_path)
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_video(video))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 100
    assert peak < 10 * frames[0].nbytes < frames.nbytes / 5


@pytest.fixture
def downloads(monkeypatch):
    """The bytes of each download from S3."""
    sizes = []
    original = s3_objects.get

    def counted(*arguments):
        content = original(*arguments)
        sizes.append(len(content.data))
        return content

    monkeypatch.setattr(s3_objects, "get", counted)
    return sizes


@pytest.mark.parametrize("kind", KINDS)
def test_from_s3_as_from_a_folder(kind, s3, tmp_path, downloads):
    truth = of_split(WRITERS[kind](tmp_path / "small"), training_split(kind))
    WRITERS[kind](tmp_path / "large", size=(192, 256))
    listing = {}
    for name in ("small", "large"):
        uri = storage.join(s3, "layouts", kind, name)
        upload(tmp_path / name, uri)
        downloads.clear()
        videos = find(kind, uri)
        listing[name] = (len(downloads), sum(downloads))
        if name == "small":
            clips, report = clip_set(videos, tmp_path)
            assert report.bad == []
            assert_holds(clips, truth)
            again = [v.content for v in find(kind, uri)]
            assert again == [v.content for v in videos]
    if kind in ("ytvis", "ovis", "coco"):  # their JSON has masks, it is read whole; nothing else is
        assert listing["large"][0] == listing["small"][0] == 1
    elif kind == "davis":
        assert listing["large"] == listing["small"] == (1, sum(len(n) + 1 for n in truth))
    elif kind == "movi":  # a header a record
        assert listing["large"] == listing["small"] == (3, 36)
    else:  # a small block a header
        headers = 2 * (3 * 3 + 2)  # of each member and of its times, and the end of each tar
        assert listing["large"][0] <= headers
        assert listing["large"][1] <= headers * 4096 < 9 * 192 * 256 * 3


@pytest.mark.parametrize("kind", ["movi", "webdataset"])
def test_headers_are_read_once(kind, s3, tmp_path, downloads):
    WRITERS[kind](tmp_path / "data")
    uri, memo = storage.join(s3, "memo", kind), tmp_path / "memo"
    upload(tmp_path / "data", uri)
    first = find(kind, uri, memo=memo)
    downloads.clear()
    assert find(kind, uri, memo=memo) == first
    assert downloads == []
    shutil.rmtree(tmp_path / "data")
    WRITERS[kind](tmp_path / "data", seed=1, videos=4)
    upload(tmp_path / "data", uri)
    if kind == "movi":  # the last file has two records now
        assert len(find(kind, uri, memo=memo)) == 4
    assert find(kind, uri, memo=memo)[0].content != first[0].content
    assert downloads


def test_an_object_that_is_missing_in_s3_is_a_bad_video_of_that_name(s3, tmp_path):
    truth = of_split(WRITERS["davis"](tmp_path / "data"), "train")
    uri = storage.join(s3, "layouts-missing")
    upload(tmp_path / "data", uri)
    videos = find("davis", uri)
    storage.delete(storage.join(uri, "JPEGImages/480p/train-video10/00002.jpg"))
    clips, report = clip_set(videos, tmp_path)
    assert report.bad[0].video == "train-video10"
    assert report.bad[0].reason.startswith("frame 00002.jpg can't be read")
    assert [v.video_id for v in clips.videos] == [n for n in truth if n != "train-video10"]
