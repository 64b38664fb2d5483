"""Videos through a model: what is written, and what is said when it can't be."""

import os
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from tiny_models import tiny_model
from video_files import write_noise

from pipeline import storage
from pipeline.clips.sources import BadVideo, VideoRef
from pipeline.segment.stage import segment


@pytest.fixture
def model():
    return tiny_model().eval()


def test_overlay_labels_and_sheet(model, tmp_path):
    write_noise(tmp_path / "a.mp4", 21, (48, 80), codec="mpeg4")
    done = segment(model, tmp_path / "a.mp4", tmp_path / "out", chunk_frames=4)
    assert done["frames"] == 21
    with av.open(done["overlay"]) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert float(container.streams.video[0].average_rate) == 10
        assert sum(1 for _ in container.decode(video=0)) == 21
    labels = [np.asarray(Image.open(p)) for p in sorted((tmp_path / "out" / "a_labels").glob("*.png"))]
    assert len(labels) == 21
    assert all(x.shape == (48, 80) and x.max() < 3 for x in labels)


def test_how_the_video_is_cut_changes_nothing(model, tmp_path):
    write_noise(tmp_path / "a.mp4", 9, (32, 48), codec="mpeg4")
    for size in (2, 9):
        segment(model, tmp_path / "a.mp4", tmp_path / f"out{size}", chunk_frames=size)
    for path in sorted((tmp_path / "out2" / "a_labels").glob("*.png")):
        twin = tmp_path / "out9" / "a_labels" / path.name
        assert (np.asarray(Image.open(path)) == np.asarray(Image.open(twin))).mean() > 0.999


def test_large_and_odd_videos_are_scaled_down(model, tmp_path):
    write_noise(tmp_path / "wide.avi", 3, (98, 202), codec="mpeg4")
    done = segment(model, tmp_path / "wide.avi", tmp_path / "out", max_side=101)
    with av.open(done["overlay"]) as container:
        context = container.streams.video[0].codec_context
        assert max(context.width, context.height) <= 101


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (1, 1)])
def test_a_single_row_or_column_has_an_overlay(model, tmp_path, size):
    """Of which H.264 needs two; scaling down makes them too, of a long strip."""
    write_noise(tmp_path / "a.avi", 3, size, codec="rawvideo", pix_fmt="bgr24")
    done = segment(model, tmp_path / "a.avi", tmp_path / "out")
    with av.open(done["overlay"]) as container:
        frames = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    assert [frame.shape for frame in frames] == [tuple(max(2, side) for side in size)] * 3
    assert Image.open(Path(done["labels"]) / "000000.png").size == size[::-1]


def test_a_remote_video_to_a_remote_folder(model, tmp_path, s3):
    write_noise(tmp_path / "a.mp4", 5, (48, 80), codec="mpeg4")
    root = storage.join(s3, tmp_path.name)
    storage.upload_file(tmp_path / "a.mp4", f"{root}/a.mp4")
    storage.write_bytes(f"{root}/out/a_labels/000009.png", b"of a longer video")
    done = segment(model, f"{root}/a.mp4", f"{root}/out")
    assert done["overlay"] == f"{root}/out/a_overlay.mp4"
    assert storage.list_names(done["labels"]) == [f"{i:06d}.png" for i in range(5)]
    assert storage.list_names(f"{root}/out") == ["a_labels", "a_overlay.mp4", "a_sheet.png"]
    with storage.local_copy(done["overlay"]) as path, av.open(path) as container:
        assert float(container.streams.video[0].average_rate) == 10
    with pytest.raises(FileNotFoundError, match=f"there is no video '{root}/b.mp4'"):
        segment(model, f"{root}/b.mp4", f"{root}/out")


def test_a_remote_folder_of_frames(model, tmp_path, s3):
    for index in range(3):
        Image.new("RGB", (48, 32), (index, 0, 0)).save(tmp_path / f"{index}.png")
    storage.upload_tree(tmp_path, storage.join(s3, tmp_path.name, "dance"))
    done = segment(model, storage.join(s3, tmp_path.name, "dance"), tmp_path / "out")
    assert done["frames"] == 3
    assert done["overlay"] == str(tmp_path / "out" / "dance_overlay.mp4")


def test_a_broken_video_leaves_no_overlay(model, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"nonsense")
    with pytest.raises(BadVideo):
        segment(model, tmp_path / "a.mp4", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.mp4"))
    with pytest.raises(FileNotFoundError, match="gone"):
        segment(model, tmp_path / "gone.mp4", tmp_path / "out")


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "..", "a\0b", "..\\x", "a\n/../b"])
def test_an_id_of_a_data_set_names_files_in_the_folder_only(model, tmp_path, name):
    write_noise(tmp_path / "a.mp4", 4, (32, 32), codec="mpeg4")
    before = set(tmp_path.rglob("*"))
    out = tmp_path / "deep" / "deeper" / "out"
    done = segment(model, VideoRef(name, str(tmp_path / "a.mp4")), out)
    assert set(out.iterdir()) == {out / Path(done[kind]).name for kind in ("overlay", "labels", "sheet")}
    outside = {path for path in tmp_path.rglob("*") if out not in [path, *path.parents]}
    assert outside - before == {tmp_path / "deep", tmp_path / "deep" / "deeper"}


@pytest.mark.fault(
    "a video's name with a colon, =, a dash or bytes that are no UTF-8", "segment", "it is opened"
)
@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("12:30.mp4", "12:30"),
        ("clip=1.mp4", "clip=1"),
        ("-dash.mp4", "-dash"),
        ("~tilde.mp4", "~tilde"),
        ("at 3.14\u202fPM.mov", "at 3.14\u202fPM"),
        ("caf\udce9.mp4", "caf_xe9"),
        ("two\nlines.mp4", "two_x0alines"),
    ],
)
def test_a_video_of_any_name(model, tmp_path, monkeypatch, name, written):
    """As it is typed in its folder."""
    monkeypatch.chdir(tmp_path)
    write_noise("plain.mp4", 2, (32, 48), codec="mpeg4")
    os.rename("plain.mp4", name)
    done = segment(model, name, "out")
    assert done["frames"] == 2
    assert sorted(os.listdir("out")) == sorted(
        f"{written}_{kind}" for kind in ("labels", "overlay.mp4", "sheet.png")
    )
    with av.open(os.path.abspath(done["overlay"])) as container:
        assert sum(1 for _ in container.decode(video=0)) == 2


@pytest.mark.fault("a video's name of 250 bytes", "segment", "outputs are named shorter, and stay distinct")
def test_long_names_are_cut_and_stay_distinct(model, tmp_path):
    """Both are of 250 bytes and differ in the last."""
    names = []
    for last in "ab":
        name = f"{'é' * 122}x{last}.mp4"
        assert len(name.encode()) == 250
        write_noise(tmp_path / name, 1, (32, 48), codec="mpeg4")
        done = segment(model, tmp_path / name, tmp_path / "out")
        names += [Path(done[kind]).name for kind in ("overlay", "labels", "sheet")]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(names)
    assert len(set(names)) == 6
    assert max(len(name.encode()) for name in names) <= 255
    assert all(name.startswith("é" * 100) for name in names)
