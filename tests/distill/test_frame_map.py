"""Frames that were decoded once: what training sees from the map is what it sees without, whatever befalls the file."""

import errno
import fcntl
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from clip_sets import random_clips
from places import ROOT

from pipeline.clips.table import ClipSet
from pipeline.config import Targets
from pipeline.config.sections import Storage
from pipeline.distill import frame_map
from pipeline.distill.data import Loader, Sampler
from pipeline.distill.frame_map import FrameMap, open_frame_map

LENGTHS = {"a": 9, "b": 4, "c": 13, "d": 8}  # 8 full clips
PLACE = 12288  # bytes of a clip's place: its pixels and mark in blocks of 4096


@pytest.fixture(autouse=True)
def _any_disk(monkeypatch):
    monkeypatch.setattr(frame_map, "KEEP_FREE", 0.0)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return random_clips(tmp_path_factory.mktemp("clips"), LENGTHS)


@pytest.fixture
def decoded(monkeypatch):
    """How often each clip is read from the clip set."""
    count, real = Counter(), ClipSet.read_clip

    def read_clip(self, shard, row, **options):
        count[shard, row] += 1
        return real(self, shard, row, **options)

    monkeypatch.setattr(ClipSet, "read_clip", read_clip)
    return count


def load(clips, folder, *, stop=12, recipe=None, views=3, rank=0, world_size=1, gb=1.0):
    """Batches by way of the map in a folder; without one where the folder is None."""
    recipe = recipe or Targets(views=3, crop="random", min_scale=0.5)
    sampler = Sampler(clips.videos, seed=0, batch_size=4, views=views)
    kept = open_frame_map(Storage(cache=str(folder), cache_gb=gb), clips) if folder else None
    options = {"recipe": recipe, "dataset_seed": 5, "pixels": True, "rank": rank, "world_size": world_size}
    with Loader(clips.uri, None, sampler, stop=stop, frame_map=kept, **options) as loader:
        return [batch for batch, _ in loader]


def assert_same(batches, expected):
    for one, other in zip(batches, expected, strict=True):
        assert (one.samples, one.views) == (other.samples, other.views)
        for pixels, true in zip(one.pixels, other.pixels, strict=True):
            assert pixels.dtype == torch.uint8
            torch.testing.assert_close(pixels, true, rtol=0, atol=0)


def the_file(folder):
    (path,) = folder.glob("*.frames")
    return path


@pytest.mark.parametrize("views", [1, 3, None], ids=["centre", "three", "fresh"])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_batches_are_those_of_decoding_and_each_clip_is_decoded_once(clips, tmp_path, decoded, views, crop):
    recipe = Targets(views=3, crop=crop, min_scale=0.5)
    options = {"recipe": recipe, "views": views}
    expected = load(clips, None, **options)
    decoded.clear()
    first = load(clips, tmp_path, **options)
    visited = {(s.video.shard, s.row) for batch in first for s in batch.samples}
    assert set(decoded) == visited
    before = decoded.copy()
    again = load(clips, tmp_path, **options)
    assert decoded == before, "a clip that had been written was decoded"
    assert_same(first, expected)
    assert_same(again, expected)


def test_workers_and_other_views_share_the_map(clips, tmp_path, decoded):
    load(clips, tmp_path, stop=40)  # visits all
    decoded.clear()
    centred = {"recipe": Targets(), "views": 1}
    shares = [load(clips, tmp_path, rank=rank, world_size=2, **centred) for rank in range(2)]
    assert not decoded
    for rank, share in enumerate(shares):
        expected = load(clips, None, rank=rank, world_size=2, **centred)
        assert_same(share, expected)
    the_file(tmp_path)  # is one


def cut(path):
    os.truncate(path, path.stat().st_size // 3)


def spoil(path):
    content = bytearray(path.read_bytes())
    for place in range(0, len(content), PLACE):
        content[place + 5000] ^= 4
    path.write_bytes(content)


def lose_blocks(path):
    """As after a power cut: the marks are there, some of the pixels are zeros."""
    content = bytearray(path.read_bytes())
    for place in range(0, len(content), PLACE):
        content[place + 4096 : place + 8192] = bytes(4096)
    path.write_bytes(content)


def swap(path):
    """Each clip is where another one should be."""
    content = path.read_bytes().ljust(-(-path.stat().st_size // PLACE) * PLACE, b"\0")
    places = [content[i : i + PLACE] for i in range(0, len(content), PLACE)]
    path.write_bytes(b"".join(places[1:] + places[:1]))


@pytest.mark.parametrize("damage", [cut, spoil, lose_blocks, swap, os.unlink], ids=lambda f: f.__name__)
def test_what_is_damaged_or_lost_is_made_again(clips, tmp_path, decoded, damage):
    expected = load(clips, None)
    load(clips, tmp_path)
    damage(the_file(tmp_path))
    decoded.clear()
    assert_same(load(clips, tmp_path), expected)
    assert decoded, "the damage was not seen"
    decoded.clear()
    assert_same(load(clips, tmp_path), expected)
    assert not decoded, "the file was not mended"


def test_the_file_may_be_cut_or_deleted_while_it_is_used(clips, tmp_path):
    kept = FrameMap(tmp_path, clips, limit=10**9)
    video = clips.videos[0]
    frames = clips.read_clip(video.shard, video.first_row).frames
    kept.write(video, 0, frames)
    np.testing.assert_array_equal(kept.read(video, 0), frames)
    os.truncate(kept.path, 100)
    assert kept.read(video, 0) is None
    kept.path.unlink()
    kept.write(video, 0, frames)
    np.testing.assert_array_equal(kept.read(video, 0), frames)
    kept.close()


FILL = """
import sys
from pathlib import Path
import numpy as np
from pipeline.clips.table import ClipSet
from pipeline.distill import frame_map
frame_map.KEEP_FREE = 0.0
clips = ClipSet(sys.argv[1])
kept = frame_map.FrameMap(Path(sys.argv[2]), clips, limit=10**9)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(30):
    for video in clips.videos:
        for index in range(video.full_clips):
            true = clips.read_clip(video.shard, video.first_row + index).frames
            there = kept.read(video, index)
            assert there is None or np.array_equal(there, true)
            kept.write(video, index, true)
"""


def test_processes_fill_one_map_at_once(clips, tmp_path, decoded):
    fillers = [
        subprocess.Popen(
            [sys.executable, "-c", FILL, clips.uri, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for filler in fillers:
        assert filler.stdout.readline() == "ready\n"
    for filler in fillers:
        filler.communicate("go\n", timeout=120)
        assert filler.returncode == 0
    batches = load(clips, tmp_path)
    assert not decoded
    assert_same(batches, load(clips, None))


# --- room ------------------------------------------------------------------------------------------------------------


def used(folder):
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


def test_the_bound_holds_and_what_does_not_fit_is_decoded(clips, tmp_path, decoded, capsys):
    expected = load(clips, None)
    capsys.readouterr()
    for _ in range(2):
        decoded.clear()
        assert_same(load(clips, tmp_path, gb=3 * PLACE / 1e9), expected)
        assert 0 < used(tmp_path) <= 3 * PLACE
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert "no more decoded frames are kept (storage.cache_gb=3.6864e-05 is reached)" in said[0]
    assert 0 < len(decoded) < 8, "what fits is read from the map"


def test_maps_that_nobody_uses_make_room_the_oldest_first(tmp_path):
    sets = [random_clips(tmp_path / f"clips-{i}", {"a": 16}) for i in range(4)]
    folder, limit = tmp_path / "maps", 12 * PLACE  # three maps of four clips

    def opened(number):
        return FrameMap(folder, sets[number], limit=limit)

    def filled(number):
        kept = opened(number)
        (video,) = sets[number].videos
        for index in range(4):
            kept.write(video, index, sets[number].read_clip(video.shard, index).frames)
        return kept

    paths = []
    for number in (0, 1, 2):
        kept = filled(number)
        paths.append(kept.path)
        kept.close()
        os.utime(kept.path, (1000 + number, 1000 + number))
    used_again = opened(0)
    os.utime(used_again.path, (1, 1))  # in use, whatever its age
    fourth = filled(3)
    assert [path.exists() for path in (*paths, fourth.path)] == [True, False, True, True]
    assert all(fourth.read(sets[3].videos[0], index) is not None for index in range(4))
    assert all(used_again.read(sets[0].videos[0], index) is not None for index in range(4))
    assert used(folder) <= limit
    used_again.close()
    fourth.close()


def test_opening_a_map_that_is_being_deleted_makes_a_new_one(clips, tmp_path, monkeypatch):
    """Between the opening of the file and its lock, another process makes room."""
    real, deleted = fcntl.flock, []

    def flock(file, operation):
        if not deleted:
            deleted.append(the_file(tmp_path))
            deleted[0].unlink()
        real(file, operation)

    monkeypatch.setattr(frame_map.fcntl, "flock", flock)
    kept = FrameMap(tmp_path, clips, limit=10**9)
    assert kept.path.exists()
    assert os.path.sameopenfile(kept._file, os.open(kept.path, os.O_RDONLY))
    kept.close()


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written(file, parts, offset):
    return os.pwrite(file, bytes(parts[0]) + bytes(parts[1])[:100], offset)


@pytest.mark.parametrize("write", [no_space, half_written])
def test_on_a_full_disk_training_goes_on_by_decoding(clips, tmp_path, monkeypatch, capsys, write):
    expected = load(clips, None)
    capsys.readouterr()
    monkeypatch.setattr(frame_map.os, "pwritev", write)
    assert_same(load(clips, tmp_path), expected)
    (said,) = capsys.readouterr().err.splitlines()
    assert "no more decoded frames are kept (No space left on device)" in said
    monkeypatch.undo()
    monkeypatch.setattr(frame_map, "KEEP_FREE", 1.0)
    assert_same(load(clips, tmp_path / "other"), expected)
    assert "less than 100% of the disk is free" in capsys.readouterr().err
    assert used(tmp_path / "other") == 0


def test_without_a_folder_training_goes_on_by_decoding(clips, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    expected = load(clips, None)
    capsys.readouterr()
    assert_same(load(clips, tmp_path / "file" / "maps"), expected)
    (said,) = capsys.readouterr().err.splitlines()
    assert "decoded frames can't be kept here (" in said


def test_where_the_map_is(clips, tmp_path, monkeypatch):
    monkeypatch.setenv("SLOTMATCH_CACHE", str(tmp_path / "of the node"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for settings, folder in (
        (Storage(cache=str(tmp_path / "set")), "set"),
        (Storage(), "of the node"),
        (Storage(), ".cache/slotmatch"),
    ):
        if folder.startswith("."):
            monkeypatch.delenv("SLOTMATCH_CACHE")
        kept = open_frame_map(settings, clips)
        assert kept.path == the_file(tmp_path / folder)
        kept.close()
    assert open_frame_map(Storage(cache=str(tmp_path / "none"), cache_gb=0), clips) is None
    assert not (tmp_path / "none").exists()
