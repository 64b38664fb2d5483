"""Listings and ranged reads, on a folder and on a real S3 server."""

import io
import tarfile

import pytest

from pipeline import storage
from pipeline.clips.sources.base import BadVideo
from pipeline.clips.sources.files import HashMemo, read_part, read_whole
from pipeline.clips.sources.movi import walk_records
from pipeline.storage import RangeFile, join, reading


def test_listings_are_sorted_and_stay_below_the_folder(place):
    for name in ("train/b.jpg", "train/deep/er/a.jpg", "train2/c.jpg", "train.json"):
        storage.write_bytes(join(place, name), name.encode())
    files = storage.list_files(join(place, "train"))
    assert [(f.name, f.size) for f in files] == [("b.jpg", 11), ("deep/er/a.jpg", 19)]
    assert storage.list_files(join(place, "nowhere")) == []
    assert storage.list_files(join(place, "train.json")) == []
    assert len(storage.list_files(place)) == 4


def test_versions_follow_the_content(place):
    storage.write_bytes(join(place, "a"), b"one")
    (first,) = storage.list_files(place)
    assert storage.list_files(place) == [first]
    storage.write_bytes(join(place, "a"), b"two")
    (second,) = storage.list_files(place)
    assert second.version != first.version
    storage.write_bytes(join(place, "a"), b"one")
    again = HashMemo(None).content(place, storage.list_files(place)[0])
    storage.write_bytes(join(place, "a"), b"two")
    assert HashMemo(None).content(place, second) != again


def test_a_link_that_leads_nowhere_is_not_listed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jpg").write_bytes(b"x")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "here" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    assert [f.name for f in storage.list_files(str(tmp_path / "here"))] == ["linked/a.jpg"]


def test_ranges(place):
    uri = join(place, "file")
    storage.write_bytes(uri, bytes(range(100)))
    assert storage.read_range(uri, 10, 13) == b"\x0a\x0b\x0c"
    assert storage.read_range(uri, 10, 10) == b""
    assert read_part(uri, 98, 2, "it") == b"\x62\x63"
    with pytest.raises(BadVideo, match="it is truncated: 2 of 9 bytes are there"):
        read_part(uri, 98, 9, "it")
    with pytest.raises(BadVideo, match="it can't be read"):
        read_whole(join(place, "nowhere"), "it")


def test_a_network_that_fails_is_no_fault_of_the_video(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testkey")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testsecret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(storage.UnavailableError, match=r"^s3://bucket/a\.tar: read failed"):
        read_part("s3://bucket/a.tar", 0, 5, "it")
    with pytest.raises(BadVideo, match="it can't be read"):
        read_part(str(tmp_path / "a.tar"), 0, 5, "it")


def test_credentials_that_expire_are_no_fault_of_the_video(s3, monkeypatch):
    uri = join(s3, "credentials", "a.tar")
    storage.write_bytes(uri, b"content")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "expired")
    reads = (
        lambda: read_whole(uri, "it"),
        lambda: read_part(uri, 0, 5, "it"),
        lambda: RangeFile(uri, 0, 5).read(),
        lambda: walk_records(uri, 7),
    )
    for read in reads:
        with pytest.raises(storage.AccessError, match=r"credentials/a\.tar: read refused by .+ key …tkey"):
            read()


@pytest.mark.parametrize("ahead", [1, 16, 1000])
def test_a_range_file_reads_as_a_file(tmp_path, ahead):
    content = bytes(i * 7 % 256 for i in range(300))
    (tmp_path / "file").write_bytes(content)
    ours, real = RangeFile(str(tmp_path / "file"), 20, 200, ahead=ahead), io.BytesIO(content[20:220])
    for offset, whence, size in ((0, 0, 5), (3, 1, 7), (-20, 2, 50), (190, 0, 4), (500, 0, 3), (10, 0, -1)):
        assert ours.seek(offset, whence) == real.seek(offset, whence)
        assert ours.read(size) == real.read(size)
        assert ours.tell() == real.tell()


def test_a_range_file_reads_little(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("one", "two"):
            info = tarfile.TarInfo(name)
            info.size = 10**6
            tar.addfile(info, io.BytesIO(bytes(10**6)))
    reads = []
    real = reading._read_range
    monkeypatch.setattr(reading, "_read_range", lambda u, a, b: reads.append(b - a) or real(u, a, b))
    path = tmp_path / "a.tar"
    with tarfile.open(fileobj=RangeFile(str(path), 0, path.stat().st_size), mode="r:") as tar:
        assert tar.getnames() == ["one", "two"]
    assert len(reads) == 3
    assert max(reads) == 4096
