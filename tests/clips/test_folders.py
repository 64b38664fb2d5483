"""Which files of a folder are its videos, and what is said of the others."""

import os

import numpy as np
import pytest
from layout_sets import write_images
from video_files import picture, write_video

from pipeline import storage
from pipeline.clips.sources.videos import list_videos


def write(root, *names):
    for name in names:
        storage.write_bytes(storage.join(str(root), name), b"x")


def ids(root, **settings):
    return [video.video_id for video in list_videos(str(root), "masks", **settings)]


def left_out(root, capsys):
    capsys.readouterr()
    list_videos(str(root), "masks")
    err = capsys.readouterr().err
    assert err.count("\n") <= 1
    return err.partition("left out ")[2].strip()


SUFFIXES = (
    "mp4 m4v mov qt avi divx mkv webm ts mts m2ts mpg mpeg m2v vob wmv asf flv f4v gif 3gp 3g2 ogv mxf y4m dv"
)
SUFFIXES += " h264 hevc mjpeg ivf nut MTS WMV rm wtv gxf mk3d"


def test_every_suffix_of_videos_is_read(place):
    names = [f"{number}.{suffix}" for number, suffix in enumerate(SUFFIXES.split())]
    write(place, *names)
    assert sorted(ids(place), key=int) == [str(number) for number in range(len(names))]


def test_what_is_no_video_is_named_with_the_reason(place, capsys):
    write(place, "a.mp4", "notes.txt", "song.mp3", "raw/IMG_1.HEIC", "archive.zip", ".hidden")
    assert left_out(place, capsys) == (
        "4 files: archive.zip (no video by its name), notes.txt (text), song.mp3 (sound alone), "
        "raw/IMG_1.HEIC (a picture of a format that is not read; save it as PNG or JPEG)"
    )
    storage.delete(storage.join(place, "a.mp4"))
    with pytest.raises(FileNotFoundError, match=r"no video in .*left out 4 files: archive\.zip \(no video"):
        ids(place)


def test_nothing_is_said_where_nothing_is_left_out(place, capsys):
    write(place, "a.mp4", "frames/1.png", "frames/2.png", "masks/a/0.png")
    storage.publish(str(place), {"kind": "generated"})
    assert left_out(place, capsys) == ""
    assert ids(place) == ["a", "frames"]


def test_many_are_counted_and_the_first_are_named(tmp_path, capsys):
    write(tmp_path, "a.mp4", *[f"{number}.txt" for number in range(12)])
    said = left_out(tmp_path, capsys)
    assert said.startswith("12 files: 0.txt (text), ")
    assert said.endswith(" and 7 more")


def test_posters_and_sidecars_are_no_videos(place, capsys):
    write(place, "a.mp4", "a.jpg", "b.MOV", "b.HEIC", "b.THM", "b.LRV", "b.srt", "cover.png")
    assert ids(place) == ["a", "b"]
    said = left_out(place, capsys)
    assert said.startswith("6 files: a.jpg (a picture beside videos), b.HEIC (a picture of a format")
    assert "b.LRV (a camera's preview)" in said


@pytest.mark.parametrize("names", [("a.jpg", "b.jpg"), ("a.mp4.jpg", "b.png"), ("b.webp",)])
def test_a_folder_of_posters_is_no_video_of_frames(place, capsys, names):
    write(place, "films/a.mp4", "films/b.mts", *[f"posters/{name}" for name in names])
    assert ids(place) == ["films/a", "films/b"]
    assert f"posters/{names[0]} (a picture that has a video's name)" in left_out(place, capsys)
    write(place, "posters/c.png")  # of no video: then they are frames
    assert ids(place) == ["films/a", "films/b", "posters"]


def test_a_gif_beside_frames_or_another_video(place, capsys):
    write(place, "frames/1.png", "frames/2.png", "frames/preview.gif", "a.mp4", "a.gif", "b.gif", "b.jpg")
    assert ids(place) == ["a", "b", "frames", "frames/preview"]
    said = left_out(place, capsys)
    assert said == "2 files: a.gif (a preview of the video of its name), b.jpg (a picture beside videos)"


def test_frames_that_have_the_names_of_gifs_elsewhere_stay_frames(place, capsys):
    write(place, "of gifs/0.gif", "of gifs/1.gif", "frames/0.png", "frames/1.png")
    assert ids(place) == ["frames", "of gifs/0", "of gifs/1"]
    assert not left_out(place, capsys)


def test_two_files_of_one_name_are_an_error_whatever_their_suffixes(place):
    write(place, "a.mp4", "a.ts")
    with pytest.raises(ValueError, match="would both be the video 'a'; rename one"):
        ids(place)


# --- links ------------------------------------------------------------------------------------------------


def test_links_to_folders_are_followed_once(tmp_path):
    root, elsewhere = tmp_path / "videos", tmp_path / "elsewhere"
    write(root, "a.mp4", "deep/b.mp4")
    write(elsewhere, "c.mp4", "deeper/d.mp4")
    write_images(elsewhere / "frames", [picture(4, 6)])
    os.symlink(elsewhere, root / "link")
    os.symlink(elsewhere, root / "again")
    os.symlink(root, root / "deep" / "up")
    os.symlink("deep", root / "beside")
    os.symlink(elsewhere, elsewhere / "deeper" / "loop")
    os.symlink(tmp_path / "gone", root / "gone")
    assert ids(root) == ["a", "again/c", "again/deeper/d", "again/frames", "deep/b"]


def test_links_do_not_lead_to_masks_or_held_out_videos(tmp_path):
    write(tmp_path, "a.mp4", "val/b.mp4", "masks/a/0.png")
    os.symlink(tmp_path / "val", tmp_path / "more")
    os.symlink(tmp_path / "masks" / "a", tmp_path / "labels")
    assert ids(tmp_path, exclude="val") == ["a"]
    assert ids(tmp_path) == ["a", "val/b"]


def test_a_link_to_a_folder_outside_that_is_called_masks(tmp_path):
    write_video(tmp_path / "a.mp4", [np.zeros((32, 32, 3), np.uint8)])
    write(tmp_path / "masks", "b.mp4")
    (tmp_path / "videos").mkdir()
    os.symlink(tmp_path / "masks", tmp_path / "videos" / "link")
    assert ids(tmp_path / "videos") == ["link/b"]
