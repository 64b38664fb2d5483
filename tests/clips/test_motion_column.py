"""Motion segments as a column of a clip set: of flow, of masks, or of files."""

import sys
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from layout_sets import clip_set, write_images
from PIL import Image

from pipeline import storage
from pipeline.artifacts.identity import CLIPS_FORMAT
from pipeline.artifacts.manifests import ClipManifest
from pipeline.clips import flow as flow_module
from pipeline.clips import stage
from pipeline.clips.flow import flow_library, flowing, with_column, with_flow_segments
from pipeline.clips.motion import motion_segments
from pipeline.clips.sources import list_videos
from pipeline.clips.sources.base import BadVideo, Frame
from pipeline.clips.views import View, apply_view, labels_in_view
from pipeline.config import ConfigError, Dataset, resolve_config

SIZE = 32, 48
assert CLIPS_FORMAT == 1, "clip sets without the column are as they were"


def write_labels(folder, labels):
    folder.mkdir(parents=True)
    for t, label in enumerate(labels):
        Image.fromarray(label).save(folder / f"{t:05d}.png")


def rows(labels):
    """As `read_motion` numbers them, from 1 in each frame."""
    return np.stack(
        [np.unique(np.append(0, label), return_inverse=True)[1][1:].reshape(SIZE) for label in labels]
    )


def videos(tmp_path, *names):
    rng = np.random.default_rng(0)
    for name in names:
        write_images(tmp_path / "videos" / name, rng.integers(0, 256, (5, *SIZE, 3), dtype=np.uint8))
    return str(tmp_path / "videos")


def test_segments_of_files(tmp_path):
    """What their numbers are means nothing; a video without any is set aside, and new ones are another clip set."""
    path, motion = videos(tmp_path, "a", "b"), tmp_path / "motion"
    labels = np.random.default_rng(1).choice([0, 3, 9], (5, *SIZE)).astype(np.uint8)
    labels[2] = 0
    write_labels(motion / "a", labels)
    found = list_videos(Dataset(path=path, motion=str(motion)), "")
    assert "b has no motion" not in found[0].problem
    assert found[1].problem.startswith("has no motion segments")
    clips, report = clip_set(found, tmp_path, clip_frames=4, motion="files")
    assert [entry.video for entry in report.bad] == ["b"]
    shard = clips.shards[0]
    read = np.concatenate([clips.read_motion(shard, row) for row in range(2)])
    np.testing.assert_array_equal(read, rows(labels))
    np.testing.assert_array_equal(clips.read_clip(shard, 1).frames.shape, (1, *SIZE, 3))
    (motion / "a" / "00004.png").write_bytes((motion / "a" / "00003.png").read_bytes())
    again = list_videos(Dataset(path=path, motion=str(motion)), "")
    assert again[0].content != found[0].content != list_videos(Dataset(path=path), "")[0].content
    with pytest.raises(FileNotFoundError, match=r"^dataset.motion: no motion segments in .*a/00000.png"):
        list_videos(Dataset(path=path, motion=str(tmp_path / "elsewhere")), "")


def test_segments_that_do_not_fit_the_video(tmp_path):
    path = videos(tmp_path, "a", "b")
    write_labels(tmp_path / "motion" / "a", np.ones((4, *SIZE), np.uint8))
    write_labels(tmp_path / "motion" / "b", np.ones((5, *SIZE), np.uint8))
    found = list_videos(Dataset(path=path, motion=str(tmp_path / "motion")), "")
    _, report = clip_set(found, tmp_path, clip_frames=4, motion="files")
    assert [(entry.video, entry.reason) for entry in report.bad] == [
        ("a", "has more frames than motion segments (4)")
    ]


def test_without_the_setting_there_is_no_column(tmp_path):
    clips, _ = clip_set(list_videos(Dataset(path=videos(tmp_path, "a")), ""), tmp_path, clip_frames=4)
    assert "motion" not in pq.read_schema(f"{clips.uri}/data/{clips.shards[0]}").names
    with pytest.raises(ValueError, match=r"have no motion segments; make some that do: clips.motion=flow"):
        clips.read_motion(clips.shards[0], 0)


def test_segments_of_masks():
    mask = np.zeros(SIZE, bool)
    mask[4:9, 5:12] = True
    pixels = np.zeros((*SIZE, 3), np.uint8)
    (frame,) = with_column(iter([Frame(pixels, 0.0, {7: mask})]), "masks")
    assert frame.motion == {7: mask}
    with pytest.raises(BadVideo, match=r"^has no masks, .*clips.motion=masks"):
        list(with_column(iter([Frame(pixels, 0.0, None)]), "masks"))


def test_segments_of_flow_are_those_of_the_whole_video():
    """The video is never in memory as a whole, and the camera moves in some frames."""
    flows = np.zeros((16, *SIZE, 2), np.float32)
    flows[:, 8:24, 10:30, 0] = 4
    for moving in (3, 9, 14):
        flows[moving] = 5
    frames = [Frame(np.full((*SIZE, 3), t, np.uint8), float(t), None) for t in range(17)]

    def flow(one, other):
        earlier = min(int(one[0, 0, 0]), int(other[0, 0, 0]))
        return flows[earlier] if other[0, 0, 0] > one[0, 0, 0] else -flows[earlier]

    found = list(with_flow_segments(flowing(frames, flow)))
    assert [frame.seconds for frame in found] == list(range(17))
    expected = motion_segments(np.concatenate([flows, flows[-1:]]))
    assert expected.any((1, 2)).tolist() == [False] * 4 + [True] * 5 + [False] * 8
    for frame, segments in zip(found, expected, strict=True):
        assert len(frame.motion) == segments.max()
        np.testing.assert_array_equal(sum(frame.motion.values(), np.zeros(SIZE, bool)), segments > 0)


def test_opencvs_flow_finds_what_moves():
    pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    ground, thing = (np.kron(rng.integers(0, 256, (24, 24, 3)), np.ones((4, 4, 1))) for _ in range(2))
    frames = []
    for t in range(7):
        picture = ground.copy()
        picture[30:62, 10 + 4 * t : 42 + 4 * t] = thing[:32, :32]
        frames.append(Frame(picture.astype(np.uint8), float(t), None))
    for t, frame in enumerate(with_column(iter(frames), "flow")):
        truth = np.zeros((96, 96), bool)
        truth[30:62, 10 + 4 * t : 42 + 4 * t] = True
        (segment,) = frame.motion.values()
        assert (segment & truth).sum() / (segment | truth).sum() > 0.7


def test_flow_without_opencv(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert flow_library("masks") is None
    with pytest.raises(
        ConfigError, match=r"^clips.motion: flow is OpenCV's, .*pip install opencv-python-headless"
    ):
        flow_library("flow")


def test_clips_say_what_computed_their_flow(tmp_path, monkeypatch, capsys):
    """Its version is no part of what they are: with another one they are found, and it is said."""
    cv2 = pytest.importorskip("cv2")
    config = resolve_config(
        {"clips": {"motion": "flow"}, "dataset": {"path": videos(tmp_path, "a")}},
        [f"storage.root={tmp_path / 'root'}", "evaluate.split=null"],
    )

    def here(config, task, rows, *, arguments):
        return [task(row, *arguments) for row in rows]

    monkeypatch.setattr(stage, "map_tasks", here)
    made = stage.shard_split(config, "")
    assert ClipManifest.read(made["uri"]).flow == f"OpenCV {cv2.__version__}"
    assert "flow was computed" not in capsys.readouterr().err
    monkeypatch.setattr(flow_module, "_opencv", lambda: SimpleNamespace(__version__="1.2"))
    assert stage.shard_split(config, "")["uri"] == made["uri"]
    expected = (
        f"flow was computed by OpenCV {cv2.__version__}; OpenCV 1.2, which is installed, may find other"
    )
    assert expected in capsys.readouterr().err
    values = storage.read_json(f"{made['uri']}/manifest.json")
    assert (
        ClipManifest.model_validate({key: value for key, value in values.items() if key != "flow"}).flow
        is None
    )


@pytest.mark.parametrize("flip", [False, True])
def test_labels_are_shown_as_pixels_are(flip):
    view = View(3, 5, 20, 24, flip, 0)
    pixels = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), dtype=np.uint8)
    np.testing.assert_array_equal(labels_in_view(pixels[..., 0], view), apply_view(pixels, view)[..., 0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["clips.motion=files"], r"^clips.motion: files needs dataset.motion, .* nearest valid: flow$"),
        (["dataset.motion=M"], r"^dataset.motion: is not read with clips.motion=none; .*clips.motion=files$"),
        (
            ["clips.motion=files", "dataset.path=V", "dataset.split=train", "dataset.motion=V/train/motion"],
            r"^dataset.motion: 'V/train/motion' lies among the videos \(V/train\)",
        ),
    ],
)
def test_settings_that_do_not_go_together(overrides, message):
    with pytest.raises(ConfigError, match=message):
        resolve_config({}, overrides)
    resolve_config({}, ["clips.motion=files", "dataset.path=V", "dataset.motion=M"])
