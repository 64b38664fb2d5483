"""A data set of many shards: no open files, and no more bytes read than a clip needs."""

import shutil
from pathlib import Path

import psutil
import pytest
from clip_sets import random_clips

from pipeline.clips import table
from pipeline.clips.table import ClipSet, ShardReader, VideoEntry


@pytest.fixture
def clips(tmp_path):
    lengths = {f"video-{i}": 24 for i in range(6)}
    return random_clips(tmp_path / "clips", lengths, videos_per_shard=6, size=(48, 64))


def test_no_file_stays_open(clips, tmp_path, monkeypatch):
    source = Path(clips.uri) / "data" / clips.shards[0]
    footer = clips.reader.file(clips.shards[0]).metadata.serialized_size
    monkeypatch.setattr(table, "_FOOTER_BYTES", 5 * footer)
    names = [f"copy-{i:02d}.parquet" for i in range(40)]
    for name in names:
        shutil.copyfile(source, tmp_path / name)
    reader = ShardReader(str(tmp_path))
    process = psutil.Process()
    expected = reader.row(names[0], 30).to_pylist()
    rows = reader.rows(names[0])
    first = next(rows)
    for name in names:
        assert reader.row(name, 30).to_pylist() == expected

    def ours():
        return [f.path for f in process.open_files() if f.path.startswith(str(tmp_path / "copy-"))]

    assert ours() == [str(tmp_path / names[0])]  # which is still read in order
    assert len(reader._footers) == 5
    assert len([first, *rows]) == 36  # goes on though its footer was forgotten meanwhile
    assert ours() == []


def test_rows_are_found_in_any_row_group(clips):
    shard = clips.shards[0]
    in_order = [clip.clip_index for clip in clips.iter_shard(shard)]
    assert len(in_order) == 36
    assert [clips.read_clip(shard, row).clip_index for row in range(36)] == in_order


def test_videos_keep_their_order_and_share_their_shards_name(clips):
    videos = ClipSet(clips.uri).videos
    assert [video.video_id for video in videos] == [f"video-{i}" for i in range(6)]
    assert [video.first_row for video in videos] == [6 * i for i in range(6)]
    assert len({id(video.shard) for video in videos}) == 1
    assert isinstance(videos[0], VideoEntry)
