"""Generated videos: the same from the same settings, with masks that fit them."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.clips.sources.synthetic import SyntheticSettings, render_video, write_dataset
from pipeline.evaluate.baselines import colour_kmeans
from pipeline.metrics import fg_ari

SETTINGS = SyntheticSettings(videos=6, frames=12, size=64)


def test_the_same_settings_write_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_dataset(SETTINGS, tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 6 + 6 * 12
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_files_hold_what_was_rendered(tmp_path):
    write_dataset(SETTINGS, tmp_path)
    frames, labels = render_video(SETTINGS, 3)
    with av.open(str(tmp_path / "video_00003.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        decoded = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    # H.264 halves the resolution of colour, so compare brightness.
    assert np.abs(decoded.mean(-1) - frames.mean(-1)).mean() < 8
    masks = [np.asarray(Image.open(p)) for p in sorted((tmp_path / "masks" / "video_00003").iterdir())]
    np.testing.assert_array_equal(np.stack(masks), labels)


def test_videos_differ_by_seed_and_index_and_have_objects():
    first, labels = render_video(SETTINGS, 0)
    assert 3 <= len(np.unique(labels)) - 1 <= 5
    assert (render_video(SETTINGS, 1)[0] != first).any()
    assert (render_video(SyntheticSettings(videos=6, frames=12, size=64, seed=1), 0)[0] != first).any()


def test_colour_does_not_give_the_objects_away():
    """k-means on colour finds little: FG-ARI far below that of the ground truth, which is 1."""
    scores = []
    for index in range(4):
        frames, labels = render_video(SyntheticSettings(videos=4), index)
        guess = next(colour_kmeans(6)(iter([frames]), frames.shape[1:3]))
        objects = np.stack([labels == k for k in range(1, labels.max() + 1)], 1)
        scores.append(fg_ari(torch.from_numpy(objects)[None], torch.from_numpy(guess)[None], level="video"))
    assert np.mean(scores) < 0.35


@pytest.mark.parametrize(
    "bad", [{"size": 95}, {"videos": 0}, {"min_objects": 6, "max_objects": 5}, {"seed": -1}]
)
def test_impossible_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad)).removeprefix("min_").removeprefix("max_")):
        SyntheticSettings(**{"videos": 1, **bad})
