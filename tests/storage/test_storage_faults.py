"""What storage promises while the network and the server fail, on a real S3 server behind a proxy that makes them."""

import os
import time

import botocore.session
import numpy as np
import pyarrow.parquet as pq
import pytest
from clip_sets import make_clip_set
from fault_proxy import FAULTS, PART

from pipeline import storage
from pipeline.clips.table import SHARD_FOLDER, ShardReader
from pipeline.storage import client as s3_client
from pipeline.storage import join, s3

FAULT = "S3: 503, 429, 500, stalls, cut connections, no permission"
CHECKED = "bounded retries, whole objects or none; at once with bucket and identity where it can't help"
pytestmark = pytest.mark.fault(FAULT, "storage", CHECKED)
# What differs most between servers: listings, uploads in parts, what is not there.
both_servers = pytest.mark.parametrize("faulty_s3", ["rclone", "moto"], indirect=True, scope="module")
BIG = os.urandom(2 * PART + 1000)  # three parts of an upload, three blocks of a read
SMALL = b"some bytes"


@pytest.fixture
def root(proxy, tmp_path):
    """A folder on the server, into which `small` and `big` have been put without faults."""
    uri = join("s3://bucket", tmp_path.name)
    storage.write_bytes(join(uri, "small"), SMALL)
    storage.write_bytes(join(uri, "big"), BIG)
    proxy.reset()
    yield uri
    proxy.calm()
    storage.delete(uri)


# --- what may pass is tried again -------------------------------------------------------------------------


def read_file(root):
    assert storage.read_bytes(join(root, "small")) == SMALL


def read_range(root):
    assert storage.read_range(join(root, "big"), 1000, PART) == BIG[1000:PART]


def read_in_order(root):
    with storage.local_copy(join(root, "big")) as path, open(path, "rb") as file:
        assert file.read() == BIG


def write_small(root):
    storage.write_bytes(join(root, "new"), SMALL)
    assert storage.read_bytes(join(root, "new")) == SMALL


def write_parts(root):
    with storage.atomic_write(join(root, "new")) as file:
        for start in range(0, len(BIG), PART // 2):
            file.write(BIG[start : start + PART // 2])
    assert storage.read_bytes(join(root, "new")) == BIG


def list_folder(root):
    assert storage.list_names(root) == ["big", "small"]
    assert [(f.name, f.size) for f in storage.list_files(root)] == [("big", len(BIG)), ("small", len(SMALL))]


def ask(root):
    assert storage.exists(join(root, "small"))
    assert not storage.exists(join(root, "nothing"))
    assert storage.size(join(root, "big")) == len(BIG)


def delete_folder(root):
    storage.delete(root)
    assert storage.list_names(root) == []


def publish_folder(root):
    assert not storage.is_complete(root)
    storage.publish(root, {"kind": "test", "rows": 3})
    assert storage.read_manifest(root) == {"kind": "test", "rows": 3}


OPERATIONS = [(read_file, "GET"), (read_range, "GET"), (read_in_order, "GET"), (list_folder, "GET")]
OPERATIONS += [(write_small, "PUT"), (write_parts, "PUT"), (publish_folder, "PUT")]
OPERATIONS += [(ask, "HEAD"), (delete_folder, "POST")]


def suffers(fault, method):
    """Whether there is a body in which this could happen."""
    if fault == "cut in upload":
        return method in ("PUT", "POST")
    return not fault.endswith("in answer") or method == "GET"


@pytest.mark.parametrize(
    ("operation", "method", "fault"),
    [
        pytest.param(operation, method, fault, id=f"{operation.__name__}-{fault}")
        for operation, method in OPERATIONS
        for fault in FAULTS
        if suffers(fault, method)
    ],
)
def test_what_may_pass_is_tried_again(root, proxy, operation, method, fault):
    proxy.fail(fault, times=1 if "stall" in fault else 3, method=method)
    operation(root)
    assert proxy.injected[fault] >= 1


@both_servers
def test_parts_grow_with_their_number(root, proxy, monkeypatch):
    monkeypatch.setattr(s3, "PARTS_OF_A_SIZE", 2)
    content = os.urandom(9 * PART)
    with storage.atomic_write(join(root, "new")) as file:
        file.write(content)
    assert storage.read_bytes(join(root, "new")) == content
    assert proxy.count("PUT", "partNumber") == 5  # of 1, 1, 2, 2 and 3 of at most 4


@both_servers
@pytest.mark.parametrize("query", ["uploads", "partNumber=2", "uploadId"])
@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("fault", ["503", "answer lost", "cut in upload"])
def test_every_request_of_an_upload_in_parts_is_tried_again(root, proxy, method, query, fault):
    proxy.fail(fault, times=2, method=method, query=query)
    write_parts(root)
    assert storage.size(join(root, "new")) == len(BIG)


@both_servers
def test_many_faults_at_once(root, proxy, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "12")  # six in a row come now and then
    proxy.rates = {fault: 0.02 if "stall" in fault else 0.06 for fault in FAULTS}
    for _ in range(3):
        for operation in (read_file, read_range, read_in_order, list_folder, ask):
            operation(root)
        for operation in (write_small, write_parts, publish_folder):
            operation(root)
            storage.delete(join(root, storage.MANIFEST if operation is publish_folder else "new"))
    assert proxy.injected.total() > 10


# --- but not for ever -------------------------------------------------------------------------------------


def failures(root):
    """Operations, what a message calls them, and their objects."""
    return {
        "read": (lambda: storage.read_bytes(join(root, "small")), join(root, "small")),
        "write": (lambda: storage.write_bytes(join(root, "new"), SMALL), join(root, "new")),
        "list": (lambda: storage.list_names(root), root),
        "delete": (lambda: storage.delete(root), root),
    }


METHODS = {"read": "GET", "write": "PUT", "list": "GET", "delete": "POST"}


@pytest.mark.parametrize("operation", METHODS)
def test_the_last_failure_says_what_where_how_often_and_why(root, proxy, operation, capsys):
    act, uri = failures(root)[operation]
    proxy.fail("503", times=1000, method=METHODS[operation])
    with pytest.raises(storage.UnavailableError) as error:
        act()
    assert proxy.injected["503"] == s3_client.TRIES
    message = str(error.value)
    how_often = f"failed {s3_client.TRIES} times at {proxy.url}"
    assert message.startswith(f"{uri}: {operation} {how_often}, last with: 503")
    assert "SlowDown (Please reduce your request rate.)" in message
    lines = [line for line in capsys.readouterr().err.splitlines() if "storage:" in line]
    assert len(lines) == s3_client.TRIES - 2, "from the second failure to the last but one"
    assert f"storage: {operation} {uri}: 503 SlowDown" in lines[0]
    assert "; try 3 of 6 in " in lines[0]


def test_one_failure_is_not_worth_a_line(root, proxy, capsys):
    proxy.fail("503")
    read_file(root)
    assert "storage:" not in capsys.readouterr().err


def test_aws_max_attempts_says_how_often(root, proxy, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    proxy.fail("cut", times=1000)
    with pytest.raises(storage.UnavailableError, match="read failed 2 times"):
        read_file(root)
    assert proxy.injected["cut"] == 2


def test_a_server_that_is_not_there(proxy, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    message = r"s3://bucket/x: read failed 2 times at http://127\.0\.0\.1:9"
    with pytest.raises(storage.UnavailableError, match=message):
        storage.read_bytes("s3://bucket/x")


@both_servers
def test_an_object_that_is_replaced_while_it_is_read(root):
    with storage.open_read(join(root, "big")) as file:
        assert file.read(100) == BIG[:100]
        storage.write_bytes(join(root, "big"), BIG[::-1])
        with pytest.raises(storage.StorageError, match="replaced while it was being read"):
            file.read(100)


# --- what is written is whole or not there ----------------------------------------------------------------


def unfinished_uploads(root):
    """Keys below a folder of which parts are left on the server."""
    found = botocore.session.get_session().create_client("s3").list_multipart_uploads(Bucket="bucket")
    return [u["Key"] for u in found.get("Uploads", ()) if join("s3://bucket", u["Key"]).startswith(root)]


@both_servers
@pytest.mark.parametrize("fault", ["503", "cut in upload"])
@pytest.mark.parametrize("old", [True, False])
def test_an_upload_that_fails_leaves_no_parts_and_what_was_there(root, proxy, tmp_path, old, fault):
    uri = join(root, "file")
    if old:
        storage.write_bytes(uri, b"old")
    (tmp_path / "file").write_bytes(BIG)
    proxy.fail(fault, times=1000, method="PUT", query="partNumber=2")
    with pytest.raises(storage.UnavailableError, match="write failed 6 times"):
        storage.upload_file(tmp_path / "file", uri)
    assert proxy.count("DELETE", "uploadId") == 1
    proxy.calm()
    assert unfinished_uploads(root) == []
    assert storage.exists(uri) == old
    if old:
        assert storage.read_bytes(uri) == b"old"


@both_servers
def test_parts_that_cannot_be_removed_are_said(root, proxy, capsys):
    proxy.fail("503", times=1000, query="uploadId")
    with pytest.raises(storage.UnavailableError, match=r"new: write failed 6 times"):
        write_parts(root)
    assert "parts of an unfinished upload are left behind" in capsys.readouterr().err


@both_servers
def test_a_folder_whose_upload_fails_is_not_complete(root, proxy, tmp_path):
    for name in ("a.bin", "b.bin", storage.MANIFEST):
        (tmp_path / name).write_bytes(b"{}")
    proxy.denied = ["b.bin"]
    with pytest.raises(storage.AccessError, match=r"b\.bin"):
        storage.upload_folder(tmp_path, join(root, "up"))
    proxy.calm()
    assert storage.list_names(join(root, "up")) == ["a.bin"]
    assert not storage.is_complete(join(root, "up"))


# --- what can't pass fails at once, and says as whom ------------------------------------------------------

AS_TESTKEY = r"as access key …tkey \(AWS_ACCESS_KEY_ID\)"


@both_servers
@pytest.mark.parametrize("operation", METHODS)
def test_no_permission(root, proxy, operation):
    act, uri = failures(root)[operation]
    # Everything below the folder; what is deleted is in the body of a request to the bucket.
    proxy.denied = [uri.removeprefix("s3://bucket/"), "?delete"]
    with pytest.raises(storage.AccessError, match=AS_TESTKEY) as error:
        act()
    # The answer to a HEAD says nothing, so a listing is asked for the reason.
    assert len(proxy.requests) == (2 if operation == "delete" else 1)
    assert isinstance(error.value, PermissionError)
    wanted = "read" if operation == "delete" else operation  # it looks before it deletes
    assert str(error.value).startswith(f"{uri}: {wanted} refused by {proxy.url} with 403")
    assert "testsecret" not in str(error.value)
    assert "testkey" not in str(error.value)


@both_servers
@pytest.mark.parametrize("operation", METHODS)
def test_no_such_bucket(proxy, operation):
    act, uri = failures("s3://no-such-bucket/runs")[operation]
    with pytest.raises(storage.MissingBucketError, match=AS_TESTKEY) as error:
        act()
    assert len(proxy.requests) <= 2
    assert isinstance(error.value, FileNotFoundError)
    assert f"there is no bucket 'no-such-bucket' at {proxy.url}" in str(error.value)
    assert str(error.value).startswith(uri)


@both_servers
@pytest.mark.parametrize("ask_for", ["read_manifest", "is_complete", "list_files", "size", "open_read"])
def test_no_such_bucket_is_not_an_unfinished_folder(proxy, ask_for):
    with pytest.raises(storage.MissingBucketError):
        getattr(storage, ask_for)("s3://no-such-bucket/clips")


@pytest.mark.parametrize(
    ("name", "value", "identity"),
    [("AWS_SECRET_ACCESS_KEY", "wrongsecret", "…tkey"), ("AWS_ACCESS_KEY_ID", "strangerskey", "…skey")],
)
def test_wrong_credentials(root, proxy, monkeypatch, name, value, identity):
    monkeypatch.setenv(name, value)
    with pytest.raises(
        storage.AccessError, match=rf"small: read refused .* as access key {identity}"
    ) as error:
        storage.read_bytes(join(root, "small"))
    assert len(proxy.requests) == 1
    assert "secret" not in str(error.value).replace("AWS_SECRET", "")
    monkeypatch.undo()


@pytest.mark.parametrize("operation", [storage.is_complete, storage.size, storage.read_bytes])
def test_credentials_that_have_expired(root, proxy, operation):
    proxy.denied, proxy.refusal = [""], (400, "ExpiredToken", "The provided token has expired.")
    with pytest.raises(storage.AccessError, match=rf"400 ExpiredToken .*, {AS_TESTKEY}"):
        operation(root)


@pytest.fixture
def no_credentials(proxy, monkeypatch, tmp_path):
    """None in the environment, none in files, and no machine that could be asked."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    return tmp_path


def test_no_credentials(proxy, no_credentials):
    with pytest.raises(storage.AccessError, match="no credentials: set AWS_ACCESS_KEY_ID") as error:
        storage.write_bytes("s3://bucket/x", b"x")
    assert str(error.value).startswith(f"s3://bucket/x: write failed at {proxy.url}")
    assert proxy.requests == []


def test_a_profile_is_named(proxy, no_credentials, monkeypatch):
    text = "[lab]\naws_access_key_id = labsownkey\naws_secret_access_key = hidden\n"
    (no_credentials / "credentials").write_text(text)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    with pytest.raises(storage.AccessError, match=r"as access key …nkey \(profile lab\)") as error:
        storage.list_names("s3://bucket/x")
    assert "hidden" not in str(error.value)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(storage.AccessError, match=r"profile \(nobody\) could not be found"):
        storage.list_names("s3://bucket/x")


# --- how much it asks for ---------------------------------------------------------------------------------


@pytest.fixture
def clips(root, proxy):
    """A clip set of noise, whose frames don't compress: eight row groups of two clips, 100 kB each."""
    rng = np.random.default_rng(0)
    masks = [{1: np.ones((64, 64), bool)}] * 16
    videos = {v: (rng.integers(0, 256, (16, 64, 64, 3), dtype=np.uint8), masks) for v in "abcd"}
    clips = make_clip_set(join(root, "clips"), videos, videos_per_shard=4)
    proxy.reset()
    return clips


def group_bytes(clips, shard, group):
    file = pq.ParquetFile(storage.open_read(join(clips.uri, SHARD_FOLDER, shard)))
    row_group = file.metadata.row_group(group)
    return sum(row_group.column(i).total_compressed_size for i in range(row_group.num_columns))


def test_a_clip_costs_one_request_of_its_row_group(clips, proxy):
    clips.read_clip(clips.shards[0], 0)
    assert proxy.count("HEAD") == 1
    assert proxy.count("GET") <= 3, "the footer, the row group"
    size = group_bytes(clips, clips.shards[0], 3)
    proxy.reset()
    clips.read_clip(clips.shards[0], 6)
    assert proxy.count("HEAD") == 0
    assert proxy.count("GET") == 1
    assert proxy.sent <= 1.05 * size
    clips.read_clip(clips.shards[0], 7)
    assert proxy.count("GET") == 1, "its row group is in memory"


def test_a_whole_shard_costs_a_request_a_row_group(clips, proxy):
    size = storage.size(join(clips.uri, SHARD_FOLDER, clips.shards[0]))
    proxy.reset()
    assert len(list(clips.iter_shard(clips.shards[0], masks=True))) == 16
    assert len(proxy.requests) <= 8 + 3, "its row groups, and the footer"
    assert proxy.sent <= 1.05 * size + (64 << 10)  # what Arrow reads for a footer


def test_the_next_row_group_is_read_ahead(clips, proxy):
    rows = clips.iter_shard(clips.shards[0])
    next(rows)
    deadline = time.monotonic() + 30
    while len(proxy.requests) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(proxy.requests) == 4, "size, footer, this row group and the next one; no more"
    rows.close()


def test_reading_in_order_asks_for_large_blocks(root, proxy):
    storage.hash_file(join(root, "big"))
    assert proxy.count("HEAD") == 1
    assert proxy.count("GET") == 3
    assert proxy.sent == len(BIG)


def test_a_small_file_is_one_request(root, proxy):
    storage.write_bytes(join(root, "new"), SMALL)
    assert [method for method, _ in proxy.requests] == ["PUT"]
    proxy.reset()
    storage.read_bytes(join(root, "new"))
    assert [method for method, _ in proxy.requests] == ["GET"]


def test_storage_that_fails_is_not_a_damaged_shard(clips, proxy):
    reader = ShardReader(join(clips.uri, SHARD_FOLDER))
    reader.file(clips.shards[0])
    proxy.denied = [clips.shards[0]]
    for read in (lambda: list(reader.rows(clips.shards[0])), lambda: reader.row(clips.shards[0], 0)):
        with pytest.raises(storage.AccessError, match=r"shard-00000\.parquet: read refused"):
            read()
