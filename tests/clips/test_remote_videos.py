"""Folders of videos in S3: what is listed and decoded is what a local copy gives."""

import numpy as np
import pytest
from layout_sets import write_images
from video_files import picture, write_noise

from pipeline import storage
from pipeline.clips.library import ClipLibrary, artifacts_of
from pipeline.clips.sources import BadVideo, container, read_video
from pipeline.clips.sources.videos import list_videos
from pipeline.clips.write import write_shard
from pipeline.config import Clips, resolve_config
from pipeline.storage import client, join


@pytest.fixture
def proxy(faulty_s3):
    faulty_s3.reset()
    yield faulty_s3
    faulty_s3.calm()


@pytest.fixture
def folders(proxy, tmp_path):
    """The same videos in a local folder and in S3."""
    local = tmp_path / "videos"
    (local / "deep").mkdir(parents=True)
    write_noise(local / "a.mp4", 30)
    write_noise(local / "deep" / "b.mkv", 60)
    shades = (0, 2, 10)
    labels = [np.full((64, 96), shade % 3, np.uint8) for shade in shades]
    write_images(local / "frames", [picture(shade=shade) for shade in shades], "{}.png")
    write_images(local / "masks" / "frames", labels, "{}.png")
    for name in (".hidden.mp4", "notes.txt", "held/c.mp4"):
        storage.write_bytes(str(local / name), b"nothing to read")
    uri = join("s3://bucket", tmp_path.name)
    storage.upload_tree(local, uri)
    proxy.reset()
    return str(local), uri


def test_a_remote_folder_has_the_videos_of_its_local_copy(folders, proxy):
    local, uri = folders
    expected, found = (list_videos(root, "masks", exclude="held") for root in folders)
    assert [v.video_id for v in found] == [v.video_id for v in expected] == ["a", "deep/b", "frames"]
    assert [v.bytes for v in found] == [v.bytes for v in expected]
    assert [v.path.removeprefix(uri) for v in found] == [v.path.removeprefix(local) for v in expected]
    assert [v.content for v in found] == [v.content for v in list_videos(uri, "masks", exclude="held")]
    assert [v.video_id for v in list_videos(uri, "masks")] == ["a", "deep/b", "frames", "held/c"]


def test_remote_frames_and_masks_equal_local_ones(folders, proxy):
    expected, found = (list_videos(root, "masks", exclude="held") for root in folders)
    for one, two in zip(expected, found, strict=True):
        assert_equal(read_video(one, short_side=32), read_video(two, short_side=32))


def assert_equal(one, two):
    """All frames, times and masks."""
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.pixels, b.pixels)
        assert (a.seconds, a.masks is None) == (b.seconds, b.masks is None)
        assert (a.masks or {}).keys() == (b.masks or {}).keys()
        for number in a.masks or {}:
            np.testing.assert_array_equal(a.masks[number], b.masks[number])


def test_a_video_is_read_in_few_requests(folders, proxy):
    video = list_videos(folders[1], "masks", exclude="held")[0]
    proxy.reset()
    assert len(list(read_video(video))) == 30
    assert len(proxy.requests) <= 3
    assert proxy.sent <= 2 * video.bytes


def test_the_content_follows_what_is_stored(folders):
    before = {v.video_id: v.content for v in list_videos(folders[1], "masks")}
    assert {v.video_id: v.content for v in list_videos(folders[1], "masks")} == before
    storage.write_bytes(join(folders[1], "a.mp4"), b"another")
    storage.write_bytes(join(folders[1], "masks/frames/1.png"), b"another")
    after = {v.video_id: v.content for v in list_videos(folders[1], "masks")}
    assert {v for v in after if after[v] != before[v]} == {"a", "frames"}


def test_nothing_there(proxy):
    with pytest.raises(FileNotFoundError, match="no video in 's3://bucket/nowhere'"):
        list_videos("s3://bucket/nowhere", "masks")
    with pytest.raises(storage.MissingBucketError, match="no-such-bucket"):
        list_videos("s3://no-such-bucket/videos", "masks")


def test_broken_videos_are_set_aside_by_name(folders):
    _, uri = folders
    storage.write_bytes(join(uri, "cut.mp4"), storage.read_bytes(join(uri, "a.mp4"))[:-9000])
    storage.write_bytes(join(uri, "empty.mp4"), b"")
    storage.write_bytes(join(uri, "text.mp4"), b"no video" * 1000)
    storage.write_bytes(join(uri, "frames/3.png"), b"no picture")
    videos = list_videos(uri, "masks", exclude="held")
    report = write_shard(videos, join(uri, "shard.parquet"), Clips())
    assert [v.video_id for v in report.videos] == ["a", "deep/b"]
    bad = {entry.video: entry.reason for entry in report.bad}
    assert bad["empty.mp4"] == "the file is empty"
    assert "can't be decoded" in bad["text.mp4"]
    assert bad["frames"] == "frame 3.png can't be decoded (cannot identify image file)"
    assert "can't be decoded" in bad["cut.mp4"]


@pytest.mark.parametrize("video_id", ["a", "deep/b", "frames"])
@pytest.mark.parametrize("after", [0, 1])
def test_storage_that_fails_is_no_bad_video(folders, proxy, monkeypatch, video_id, after):
    """FFmpeg would take a failed read for the end of the file, so that the video looked truncated."""
    monkeypatch.setattr(container, "AHEAD", 4096)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    video = next(v for v in list_videos(folders[1], "masks") if v.video_id == video_id)
    frames = read_video(video)
    for _ in range(after):
        next(frames)
    proxy.fail("503", times=1000)
    with pytest.raises(storage.UnavailableError, match=f"{video_id}.* failed 1 times"):
        list(frames)


def test_a_video_that_is_gone_is_set_aside(folders):
    videos = list_videos(folders[1], "masks")
    storage.delete(videos[0].path)
    with pytest.raises(BadVideo, match="can't be decoded"):
        list(read_video(videos[0]))


def test_a_shard_of_remote_videos_survives_faults(folders, proxy, monkeypatch):
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    _, uri = folders
    videos = list_videos(uri, "masks", exclude="held")
    clips = Clips(codec="png")
    write_shard(videos, join(uri, "calm", "shard.parquet"), clips)
    proxy.rates = {"503": 0.2, "cut": 0.1, "cut in answer": 0.1, "answer lost": 0.1}
    report = write_shard(videos, join(uri, "faulty", "shard.parquet"), clips)
    assert not report.bad
    assert proxy.injected.total() > 0
    proxy.calm()
    calm, faulty = (storage.read_bytes(join(uri, name, "shard.parquet")) for name in ("calm", "faulty"))
    assert faulty == calm


def generated(root, videos=3):
    made = {"videos": videos, "frames": 5, "size": 32}
    return resolve_config(
        {"dataset": {"kind": "synthetic", "synthetic": made}, "storage": {"root": str(root)}}
    )


def test_generated_videos_are_published_where_every_node_sees_them(proxy, tmp_path):
    remote, local = (generated(root) for root in (join("s3://bucket", tmp_path.name), tmp_path / "local"))
    videos = ClipLibrary().videos(remote, "")
    assert all(v.path.startswith("s3://bucket/") for v in videos)
    folder = videos[0].path.rsplit("/", 1)[0]
    assert storage.is_complete(folder)
    expected = ClipLibrary().videos(local, "")
    assert [(v.video_id, v.content) for v in videos] == [(v.video_id, v.content) for v in expected]
    assert artifacts_of(remote).clips.fingerprint == artifacts_of(local).clips.fingerprint
    for one, two in zip(expected, videos, strict=True):
        assert_equal(read_video(one), read_video(two))
    proxy.reset()
    assert ClipLibrary().videos(remote, "[:2]") == videos[:2]
    assert proxy.count("PUT") == 0, "they are found, not made again"


def test_generated_videos_are_not_complete_before_all_are_there(proxy, tmp_path):
    config = generated(join("s3://bucket", tmp_path.name), videos=2)
    proxy.denied = ["video_00001/00002.png"]
    with pytest.raises(storage.AccessError, match=r"video_00001/00002\.png: write refused"):
        ClipLibrary().videos(config, "")
    proxy.calm()
    root = join(config.storage.root, "generated")
    (name,) = storage.list_names(root)
    assert not storage.is_complete(join(root, name))
    assert len(ClipLibrary().videos(config, "")) == 2
