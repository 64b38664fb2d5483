"""One bad video among ten thousand: set aside by name, and every other one is there once."""

import os
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.clips.sources.synthetic import SyntheticSettings, write_dataset
from pipeline.clips.stage import shard_split
from pipeline.clips.table import ClipSet
from pipeline.config import resolve_config

VIDEOS = 10_000
BAD = 5_003  # neither the first nor the last of its shard
LENGTHS = (3, 4, 6, 9)  # frames: shorter than a clip, one, one and a rest, two and a rest
CLIP_FRAMES = 4


def video_name(index):
    return f"video-{index:05d}"


def frames_of(index):
    return LENGTHS[index % len(LENGTHS)]


def write_many(folder):
    """Ten thousand names of four real H.264 files, and one file that was cut."""
    videos = folder / "videos"
    videos.mkdir()
    originals = []
    for length in LENGTHS:
        write_dataset(SyntheticSettings(1, frames=length, size=16), folder / f"made-{length}")
        originals += (folder / f"made-{length}").glob("*.mp4")
    for index in range(VIDEOS):
        if index != BAD:
            os.link(originals[index % len(originals)], videos / f"{video_name(index)}.mp4")
    content = originals[BAD % len(originals)].read_bytes()
    (videos / f"{video_name(BAD)}.mp4").write_bytes(content[: len(content) // 2])
    return videos


@pytest.mark.fault(
    "one cut video among 10,000", "shard", "set aside by name; every other video once, with all its frames"
)
@pytest.mark.slow
@pytest.mark.timeout(1800)  # about a minute where nothing else runs
def test_one_bad_video_among_ten_thousand(tmp_path, local_ray):
    places = [f"dataset.path={write_many(tmp_path)}", f"storage.root={tmp_path / 'root'}"]
    config = resolve_config({"clips": {"clip_frames": CLIP_FRAMES}}, places)
    summary = shard_split(config, "")

    (bad,) = summary["bad"]
    assert bad["video"] == f"{video_name(BAD)}.mp4"
    assert Path(bad["path"]).name == bad["video"]
    assert "can't be decoded" in bad["reason"]

    good = [index for index in range(VIDEOS) if index != BAD]
    clips = ClipSet(summary["uri"])
    assert [v.video_id for v in clips.videos] == [video_name(index) for index in good]
    assert [v.frames for v in clips.videos] == [frames_of(index) for index in good]
    assert summary["videos"] == len(good)
    assert summary["frames"] == sum(map(frames_of, good))

    # What the files hold, not what the index says of them.
    stored = Counter()
    for path in (Path(clips.uri) / "data").iterdir():
        rows = pq.read_table(path, columns=["video_id", "clip_index", "frames"]).to_pylist()
        stored.update((row["video_id"], row["clip_index"], len(row["frames"])) for row in rows)
    assert stored == Counter(
        (video_name(index), start // CLIP_FRAMES, min(CLIP_FRAMES, frames_of(index) - start))
        for index in good
        for start in range(0, frames_of(index), CLIP_FRAMES)
    )

    again = shard_split(config, "")
    assert again["uri"] == summary["uri"]
    assert again["bad"] == summary["bad"]
    assert again["computed_shards"] == 0
    assert again["reused_shards"] == len(clips.shards)
