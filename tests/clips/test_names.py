"""File names as people have them: all that a file system holds is read, or set aside under a name that is printable."""

import codecs
import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from layouts import WRITERS
from PIL import Image
from test_videos import picture, write_video

from pipeline import storage
from pipeline.clips import stage
from pipeline.clips.sources import list_videos
from pipeline.clips.sources.files import read_lines
from pipeline.clips.table import ClipSet
from pipeline.config import ConfigError, Dataset, resolve_config
from pipeline.config.sections import Storage
from pipeline.log import is_storable, log, printable, redact

ORDINARY = [
    "Screen Recording 2024-05-01 at 3.14.15\u202fPM",
    "動画\u3000テスト",
    "family 👨\u200d👩\u200d👧",
    "\ufeffmarked",
    "right\u202eleft",
    "12:30",
    "clip=1",
    "-dash",
    "~home",
    "100%03d",
    "what?#&'\"",
    "é" * 125,  # 250 bytes, 254 with the suffix
]
REFUSED = {
    b"caf\xe9": ("caf\\xe9", "it has bytes that are no UTF-8"),
    b"two\nlines": ("two\\x0alines", "it has a control character"),
    b"a\\b": ("a\\b", "it has a backslash"),
}


@pytest.fixture
def folder(tmp_path):
    """Videos of one bytes, under ordinary names and others, in a folder of an unusual name."""
    folder = tmp_path / "my: \u3000=videos"
    folder.mkdir()
    content = write_video(tmp_path / "one.mp4", [picture(shade=s) for s in (0, 10, 20)]).read_bytes()
    names = [*map(os.fsencode, ORDINARY), *REFUSED]
    for name in names:
        with open(os.fsencode(folder) + b"/" + name + b".mp4", "wb") as file:
            file.write(content)
    return folder


def config_of(folder, tmp_path):
    return resolve_config(
        {
            "dataset": {"path": str(folder)},
            "clips": {"videos_per_shard": 4, "max_bad_fraction": 0.5, "codec": "png"},
            "storage": {"root": str(tmp_path / "runs")},
        }
    )


@pytest.fixture
def in_this_process(monkeypatch):
    """What tasks are given and return is JSON, as on Ray."""

    def run(config, task, rows, *, arguments=()):
        return [json.loads(json.dumps(task(json.loads(json.dumps(row)), *arguments))) for row in rows]

    monkeypatch.setattr(stage, "map_tasks", run)


@pytest.mark.fault(
    "names with unusual spaces, joiners, colons, 254 bytes", "shard", "read under their own names"
)
@pytest.mark.fault(
    "a name with bytes that are no UTF-8", "shard", "set aside under a printable name, the rest is published"
)
def test_every_name_is_read_or_set_aside_and_the_job_ends_well(folder, tmp_path, in_this_process):
    config = config_of(folder, tmp_path)
    summary = stage.shard(config)
    clips = ClipSet(summary["uri"])
    assert {v.video_id for v in clips.videos} == set(ORDINARY)
    assert {v.frames for v in clips.videos} == {3}
    bad = {entry.video.removesuffix(".mp4"): entry for entry in clips.manifest.bad}
    assert set(bad) == {shown for shown, _ in REFUSED.values()}
    for shown, reason in REFUSED.values():
        assert f"'{shown}' can't be used: {reason}" in bad[shown].reason
        assert bad[shown].path == f"{folder}/{shown}.mp4"
    sources = pq.read_table(f"{summary['uri']}/sources.parquet").to_pylist()
    assert {row["video_id"] for row in sources} == set(ORDINARY) | set(bad)
    assert len(summary["bad"]) == 3
    # What was remembered of the files is found again, under the same fingerprint.
    assert stage.shard(config)["uri"] == summary["uri"]


def test_a_data_set_in_a_folder_whose_name_is_no_text(tmp_path, in_this_process):
    place = tmp_path / "caf\udce9"
    place.mkdir()
    write_video(tmp_path / "a.mp4", [picture()]).rename(place / "a.mp4")
    (place / "frames").mkdir()
    Image.fromarray(picture()).save(place / "frames" / "0.png")
    summary = stage.shard(config_of(place, tmp_path))
    assert (summary["videos"], summary["bad"]) == (2, [])
    sources = pq.read_table(f"{summary['uri']}/sources.parquet").to_pylist()
    assert sources[0]["path"] == f"{tmp_path}/caf\\xe9/a.mp4"


@pytest.mark.parametrize("root", ["{}/caf\udce9/runs", "s3://bucket/caf\udce9"])
def test_a_root_whose_name_is_no_text_is_refused_before_anything_is_written(tmp_path, root):
    config = config_of(tmp_path, tmp_path).model_copy(update={"storage": Storage(root=root.format(tmp_path))})
    with pytest.raises(ConfigError, match=r"storage\.root: '.*/caf\\xe9.*' .* no UTF-8"):
        stage.shard(config)
    assert os.listdir(tmp_path) == []


def test_a_name_that_earlier_versions_set_aside_makes_another_clip_set(tmp_path):
    """Their sets were published without it."""
    write_video(tmp_path / "a\u3000b.mp4", [picture()])
    write_video(tmp_path / "a b.mp4", [picture()])
    unusual, plain = sorted(list_videos(Dataset(path=str(tmp_path)), ""), key=lambda v: v.video_id == "a b")
    from pipeline.clips.sources.videos import list_videos as listed

    contents = {v.video_id: v.content for v in listed(str(tmp_path), "masks")}
    assert plain.content == contents["a b"]
    assert unusual.content != contents["a\u3000b"]
    assert not unusual.problem


def test_frames_and_reasons_of_any_name(tmp_path, in_this_process):
    """A folder of frames whose frame is damaged, and has bytes in its name that are no UTF-8."""
    broken = os.fsencode(tmp_path / "videos" / "frames") + b"/caf\xe9.png"
    os.makedirs(os.path.dirname(broken))
    with open(broken, "wb") as file:
        file.write(b"no picture")
    write_video(tmp_path / "videos" / "good.mp4", [picture()])
    summary = stage.shard(config_of(tmp_path / "videos", tmp_path))
    assert summary["videos"] == 1
    assert "frame caf\\xe9.png can't be decoded" in summary["bad"][0]["reason"]


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: codecs.BOM_UTF8 + text.encode(),
        lambda text: text.encode("utf-16"),
        lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
        lambda text: text.replace("\n", "\r\n").encode(),
    ],
    ids=["utf-8 with a mark", "utf-16", "utf-16, other order", "CRLF"],
)
def test_a_list_of_names_from_any_editor(tmp_path, encode):
    WRITERS["davis"](tmp_path)
    names = sorted(p.name for p in (tmp_path / "JPEGImages" / "480p").iterdir() if p.name.startswith("train"))
    renamed = ["my first\u3000video", *names[1:]]
    for kind in ("JPEGImages", "Annotations_unsupervised"):
        (tmp_path / kind / "480p" / names[0]).rename(tmp_path / kind / "480p" / renamed[0])
    (tmp_path / "ImageSets/2017/train.txt").write_bytes(encode("\n".join(renamed) + "\n\n"))
    found = list_videos(Dataset(kind="davis", path=str(tmp_path)), "train")
    assert [(v.video_id, v.problem) for v in found] == [(name, "") for name in renamed]


def test_several_names_in_a_line_and_bytes_that_are_no_text(tmp_path):
    WRITERS["davis"](tmp_path)
    (tmp_path / "ImageSets/2017/train.txt").write_bytes(b"train-video9 train-video10\ncaf\xe9\n")
    assert read_lines(f"{tmp_path}/ImageSets/2017/train.txt")[1] == "caf\udce9"
    found = list_videos(Dataset(kind="davis", path=str(tmp_path)), "train")
    assert [v.video_id for v in found] == ["train-video9", "train-video10", "caf\\xe9"]
    assert [bool(v.problem) for v in found][::2] == [False, True]


def test_what_is_printable(capsys):
    assert (
        printable("caf\udce9 \ud83d\x07\u202f\u3000👩\u200d👧")
        == "caf\\xe9 \\ud83d\\x07\u202f\u3000👩\u200d👧"
    )
    assert is_storable("a\u202f\u200d\ufeff\n")
    assert not is_storable("caf\udce9")
    assert redact("caf\udce9\nnext") == "caf\\xe9\nnext"
    log("caf\udce9")
    assert capsys.readouterr().err == "caf\\xe9\n"


def test_a_local_name_that_begins_like_a_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~nobody-of-this-name").write_bytes(b"x")
    assert storage.read_bytes("~nobody-of-this-name") == b"x"
    assert storage.absolute("~/x") == os.path.expanduser("~/x")
    np.testing.assert_equal(storage.absolute("~nobody-of-this-name"), f"{tmp_path}/~nobody-of-this-name")
