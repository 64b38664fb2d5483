"""What is written into a shard comes back out of it: no Ray here, only files."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from layout_sets import clip_set, write_folders, write_images
from PIL import Image

from pipeline import storage
from pipeline.clips.schema import clip_schema, encode_frame, encode_masks, stack_masks
from pipeline.clips.sources.videos import list_videos
from pipeline.clips.table import ClipSet, ShardReader, to_clip
from pipeline.clips.write import write_shard
from pipeline.config import Clips


def shard(folder, tmp_path, **settings):
    return clip_set(list_videos(str(folder), "masks"), tmp_path, **settings)


@pytest.mark.parametrize("codec", ["png", "raw"])
def test_frames_come_back_exactly(tmp_path, codec):
    pixels = write_folders(tmp_path / "videos", {"a": 10, "b": 4, "c": 3})
    clips, report = shard(tmp_path / "videos", tmp_path, codec=codec, clip_frames=4)
    assert [v.video_id for v in clips.videos] == ["a", "b", "c"]
    assert [(v.clips, v.full_clips, v.frames) for v in clips.videos] == [(3, 2, 10), (1, 1, 4), (1, 0, 3)]
    assert report.rows == 5
    for video in clips.videos:
        read = list(clips.iter_video(video))
        assert [c.clip_index for c in read] == list(range(video.clips))
        np.testing.assert_array_equal(np.concatenate([c.frames for c in read]), pixels[video.video_id])


def test_tails_are_kept_and_marked(tmp_path):
    write_folders(tmp_path / "videos", {"a": 10, "b": 2})
    clips, _ = shard(tmp_path / "videos", tmp_path, clip_frames=4)
    read = list(clips.iter_shard(clips.shards[0]))
    cut = [("a", 4, True), ("a", 4, True), ("a", 2, False), ("b", 2, False)]
    assert [(c.video_id, len(c.frames), c.full) for c in read] == cut
    table = pq.read_table(f"{clips.uri}/data/shard-00000.parquet")
    assert table["start_frame"].to_pylist() == [0, 4, 8, 0]
    assert table["timestamps"].to_pylist()[1] == [4, 5, 6, 7]


def test_jpeg_frames_are_close(tmp_path):
    ramp = np.linspace(0, 200, 64)[:, None] + 5 * np.arange(4)[:, None, None, None]
    pixels = np.broadcast_to(ramp, (4, 48, 64, 3)).astype(np.uint8)
    write_images(tmp_path / "videos" / "a", pixels)
    clips, _ = shard(tmp_path / "videos", tmp_path, codec="jpeg", quality=95)
    frames = clips.read_clip(clips.shards[0], 0).frames
    assert np.abs(frames.astype(int) - pixels).max() <= 6


def write_labels(folder, length):
    """Three objects, but none in frame 1."""
    labels = np.random.default_rng(1).integers(0, 4, (length, 12, 16)).astype(np.uint8)
    labels[1] = 0
    write_images(folder, labels, "{}.png")
    return labels


def test_masks_come_back_exactly(tmp_path):
    write_folders(tmp_path / "videos", {"a": 6, "b": 4})
    truth = write_labels(tmp_path / "videos" / "masks" / "a", 6)
    clips, _ = shard(tmp_path / "videos", tmp_path, clip_frames=4)
    annotated, plain = clips.videos
    assert (annotated.annotated, plain.annotated) == (True, False)
    masks = [m for clip in clips.iter_video(annotated, masks=True) for m in clip.masks]
    assert len(masks) == 6
    assert masks[1] == {}
    for labels, objects in zip(truth, masks, strict=True):
        assert sorted(objects) == sorted(set(np.unique(labels)) - {0})
        for object_id, mask in objects.items():
            np.testing.assert_array_equal(mask, labels == object_id)
    assert next(clips.iter_video(plain, masks=True)).masks is None
    assert next(clips.iter_video(annotated)).masks is None, "masks are read where they are asked for"


def test_overlapping_objects_survive():
    """Label maps can't hold them, the table can: every object has a mask of its own."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 9, 7, 3), np.uint8)
    first, second = np.zeros((9, 7), bool), np.zeros((9, 7), bool)
    first[2:6, 1:5], second[4:9, 3:7] = True, True
    masks = [{5: first, 300: second}, {}, {300: second, 5: np.zeros((9, 7), bool)}]
    row = {
        **{"video_id": "v", "clip_index": 2, "start_frame": 8, "full": False, "height": 9, "width": 7},
        "timestamps": [0.0, 1.0, 2.0],
        "frames": [encode_frame(f, "raw", 95) for f in frames],
        "masks": [encode_masks(m) for m in masks],
    }
    clip = to_clip(pa.Table.from_pylist([row], clip_schema("raw")), masks=True)
    assert (clip.video_id, clip.clip_index, clip.full) == ("v", 2, False)
    np.testing.assert_array_equal(clip.frames, frames)
    assert [sorted(m) for m in clip.masks] == [[5, 300], [], [300]]  # nothing of 5 in the last frame
    np.testing.assert_array_equal(clip.masks[0][5], first)
    np.testing.assert_array_equal(clip.masks[0][300], second)
    stacked = stack_masks(clip.masks, [5, 300], (9, 7))
    assert stacked.shape == (3, 2, 9, 7)
    np.testing.assert_array_equal(stacked[0], [first, second])
    np.testing.assert_array_equal(stacked[2], [np.zeros_like(first), second])
    assert not stacked[1].any()


def test_row_groups_are_bounded_and_a_row_is_read_without_the_rest(tmp_path):
    pixels = write_folders(tmp_path / "videos", {"a": 40, "b": 21}, size=(32, 32))  # 12 kB a clip
    clips, _ = shard(tmp_path / "videos", tmp_path, codec="raw", row_group_mb=0.05)
    metadata = pq.read_metadata(f"{clips.uri}/data/shard-00000.parquet")
    assert metadata.num_rows == 16
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    assert max(sizes) < 0.1 * 2**20
    assert len(sizes) >= 3
    order = np.random.default_rng(0).permutation(16)
    for row in order:
        clip = clips.read_clip(clips.shards[0], int(row))
        start = 4 * clip.clip_index
        np.testing.assert_array_equal(clip.frames, pixels[clip.video_id][start : start + 4])


def test_a_bad_video_leaves_nothing_of_itself_in_the_shard(tmp_path):
    pixels = write_folders(tmp_path / "videos", {"a": 5, "b": 9, "c": 6})
    (tmp_path / "videos" / "b" / "8.png").write_bytes(b"broken")  # after two clips have been read
    clips, report = shard(tmp_path / "videos", tmp_path, clip_frames=4, row_group_mb=0.0001)
    (bad,) = report.bad
    assert bad.video == "b"
    assert "8.png" in bad.reason
    assert [v.video_id for v in clips.videos] == ["a", "c"]
    for video in clips.videos:
        read = np.concatenate([c.frames for c in clips.iter_video(video)])
        np.testing.assert_array_equal(read, pixels[video.video_id])


def test_a_shard_of_bad_videos_alone_is_empty(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").touch()
    clips, report = shard(tmp_path / "videos", tmp_path)
    assert report.rows == 0
    assert [(b.video, b.path, b.reason) for b in report.bad] == [
        ("a.mp4", str(tmp_path / "videos" / "a.mp4"), "the file is empty")
    ]
    assert list(clips.iter_shard(clips.shards[0])) == []


def test_a_shard_is_the_same_bytes_every_time(tmp_path):
    write_folders(tmp_path / "videos", {"a": 10, "b": 4})
    write_labels(tmp_path / "videos" / "masks" / "b", 4)
    videos = list_videos(str(tmp_path / "videos"), "masks")
    for name in ("one", "two"):
        write_shard(videos, str(tmp_path / name / "shard-00000.parquet"), Clips())
    one, two = ((tmp_path / name / "shard-00000.parquet").read_bytes() for name in ("one", "two"))
    assert one == two


def test_shards_are_readable_without_our_code(tmp_path):
    """Plain Arrow types: whoever has pyarrow and Pillow can look at the frames."""
    pixels = write_folders(tmp_path / "videos", {"a": 4})
    clips, _ = shard(tmp_path / "videos", tmp_path)
    row = pq.read_table(f"{clips.uri}/data/shard-00000.parquet").to_pylist()[0]
    image = Image.open(pa.BufferReader(row["frames"][2]))
    np.testing.assert_array_equal(np.asarray(image), pixels["a"][2])


def assert_damaged(clips, message):
    for read in (
        lambda: clips.read_clip("shard-00000.parquet", 0),
        lambda: list(clips.iter_shard(clips.shards[0])),
    ):
        with pytest.raises(ValueError, match=message):
            read()


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_a_truncated_shard_is_named(tmp_path, share):
    write_folders(tmp_path / "videos", {"a": 8})
    clips, _ = shard(tmp_path / "videos", tmp_path)
    path = Path(clips.uri) / "data" / "shard-00000.parquet"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert_damaged(clips, r"data/shard-00000\.parquet: the shard is damaged")


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"shard-00001\.parquet: the shard is missing"):
        ShardReader(str(tmp_path)).row("shard-00001.parquet", 0)


def test_damage_inside_a_shard_is_an_error_that_names_it(tmp_path):
    """Even a single wrong byte of raw pixels, which nothing but a checksum could tell."""
    write_folders(tmp_path / "videos", {"a": 8}, size=(64, 64))
    clips, _ = shard(tmp_path / "videos", tmp_path, codec="raw")
    path = Path(clips.uri) / "data" / "shard-00000.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert_damaged(clips, r"shard-00000\.parquet: row group 0 is damaged")


def test_an_unpublished_folder_is_refused(tmp_path):
    with pytest.raises(storage.IncompleteError, match="run the job again"):
        ClipSet(str(tmp_path))
