import gc
import os
import time
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from places import python

from pipeline import storage
from pipeline.storage import IncompleteError, join
from pipeline.storage import s3 as s3_module

MULTIPART = 12 << 20  # bytes; more than 8 MiB is sent in parts


class Interrupted(Exception):
    pass


def write_interrupted(uri, content):
    def write():
        with storage.atomic_write(uri) as file:
            file.write(content)
            raise Interrupted

    with pytest.raises(Interrupted):
        write()


# --- the same promises, on a folder and on real S3 servers ---------------------------------------


def test_write_and_read(place):
    uri = join(place, "deep", "er", "file.bin")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"some bytes")
    assert storage.exists(uri)
    assert storage.size(uri) == 10
    assert storage.read_bytes(uri) == b"some bytes"
    with storage.open_read(uri) as file:
        file.seek(5)
        assert file.read() == b"bytes"
    storage.write_bytes(uri, b"")
    assert storage.read_bytes(uri) == b""


def test_list_names(place):
    assert storage.list_names(place) == []
    assert storage.list_names(join(place, "nowhere")) == []
    for name in ("b.txt", "a.txt", "folder/c.txt"):
        storage.write_bytes(join(place, name), b"x")
    assert storage.list_names(place) == ["a.txt", "b.txt", "folder"]
    storage.delete(join(place, "a.txt"))
    assert storage.list_names(place) == ["b.txt", "folder"]


def test_delete(place):
    for name in ("folder/a", "folder/deep/b", "kept"):
        storage.write_bytes(join(place, name), b"x")
    storage.delete(join(place, "folder"))
    assert storage.list_names(place) == ["kept"]
    storage.delete(join(place, "folder"))  # nothing there is no error
    storage.delete(join(place, "kept"))
    assert not storage.exists(join(place, "kept"))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("length", [10, MULTIPART])
def test_an_interrupted_write_publishes_nothing(place, length):
    uri = join(place, "file.bin")
    write_interrupted(uri, b"n" * length)
    gc.collect()  # nor may the forgotten handle complain, or worse upload, when it is collected
    assert not storage.exists(uri)
    assert storage.list_names(place) == []


@pytest.mark.parametrize("length", [10, MULTIPART])
def test_an_interrupted_write_keeps_the_old_file(place, length):
    uri = join(place, "file.bin")
    storage.write_bytes(uri, b"old")
    write_interrupted(uri, b"n" * length)
    gc.collect()
    assert storage.read_bytes(uri) == b"old"
    storage.write_bytes(uri, b"n" * length)
    assert storage.size(uri) == length


def test_publish_makes_a_folder_complete(place):
    folder = join(place, "set")
    storage.write_bytes(join(folder, "data"), b"x")
    assert not storage.is_complete(folder)
    with pytest.raises(IncompleteError, match=r"set has no manifest\.json"):
        storage.read_manifest(folder)
    storage.publish(folder, {"kind": "test", "rows": [1, 2]})
    assert storage.is_complete(folder)
    assert storage.read_manifest(folder) == {"kind": "test", "rows": [1, 2]}


def test_read_manifest_of_a_missing_folder(place):
    with pytest.raises(IncompleteError, match="does not exist"):
        storage.read_manifest(join(place, "nowhere"))


def test_read_json_names_the_file_that_is_not_json(place):
    uri = join(place, "broken.json")
    storage.write_bytes(uri, b'{"half": ')
    with pytest.raises(ValueError, match=r"broken\.json: not JSON"):
        storage.read_json(uri)


def test_upload_folder_and_local_copy(place, tmp_path_factory):
    local = tmp_path_factory.mktemp("local")
    content = {"a.bin": b"a" * 100, "manifest.json": b"{}", "z.bin": os.urandom(6 << 20)}
    for name, value in content.items():
        (local / name).write_bytes(value)
    storage.upload_folder(local, join(place, "up"))
    assert storage.list_names(join(place, "up")) == sorted(content)
    with storage.local_copy(join(place, "up")) as folder:
        assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == content
    with storage.local_copy(join(place, "up", "a.bin")) as path:
        assert os.path.basename(path) == "a.bin"
        assert Path(path).read_bytes() == content["a.bin"]


@pytest.mark.parametrize("place", ["moto"], indirect=True)  # whose names may be as long as on S3
@pytest.mark.parametrize("long", ["动" * 100 + ".mp4", "a." + "b" * 300])
def test_local_copy_of_a_name_that_is_too_long_for_a_local_file(place, long):
    storage.write_bytes(join(place, long), b"content")
    with storage.local_copy(join(place, long)) as path:
        assert Path(path).read_bytes() == b"content"
        assert path.endswith(".mp4") == long.endswith(".mp4")
    with storage.local_copy(place) as folder:
        assert [path.read_bytes() for path in Path(folder).iterdir()] == [b"content"]


def test_upload_folder_that_fails_midway_is_incomplete(place, tmp_path_factory):
    """The manifest comes last even though its name does not."""
    local = tmp_path_factory.mktemp("local")
    (local / "a.bin").write_bytes(b"a")
    (local / "manifest.json").write_bytes(b"{}")
    (local / "z.bin").mkdir()  # can't be read as a file
    with pytest.raises(OSError, match=r"z\.bin"):
        storage.upload_folder(local, join(place, "up"))
    assert storage.list_names(join(place, "up")) == ["a.bin"]
    with pytest.raises(IncompleteError):
        storage.read_manifest(join(place, "up"))


def test_hash_file_follows_the_content(place):
    big = os.urandom(3 << 20)
    for name, content in (("one", big), ("two", big), ("three", big[:-1] + b"\0\0")):
        storage.write_bytes(join(place, name), content)
    one, two, three = (storage.hash_file(join(place, name)) for name in ("one", "two", "three"))
    assert one == two != three


def test_a_condition_says_who_writes(place, request):
    uri = join(place, "note")
    first = storage.write_if(uri, b"first", None)
    assert storage.read_versioned(uri) == (b"first", first)
    if heeded := request.node.callspec.params["place"] != "rclone":
        assert storage.write_if(uri, b"late", None) is None
        second = storage.write_if(uri, b"second", first)
        assert storage.write_if(uri, b"late", first) is None
        assert storage.read_versioned(uri) == (b"second", second)
        assert storage.write_if(join(place, "nothing", "there"), b"late", first) is None
        assert storage.list_names(place) == ["note"]
    assert storage.heeds_conditions(uri, storage.read_bytes(uri)) == heeded


def test_a_server_that_knows_no_conditions_is_written_to_all_the_same(monkeypatch):
    class Client:
        content = None

        def put_object(self, Body, IfNoneMatch=None, IfMatch=None, **_):
            if IfNoneMatch or IfMatch:
                answer = {"Error": {"Code": "NotImplemented"}, "ResponseMetadata": {"HTTPStatusCode": 501}}
                raise ClientError(answer, "PutObject")
            Client.content = Body
            return {"ETag": '"1"'}

    monkeypatch.setattr(s3_module, "request", lambda operation, uri, call: call(Client()))
    assert storage.write_if("s3://elsewhere/x", b"new", None) == '"1"'
    assert Client.content == b"new"
    assert not storage.heeds_conditions("s3://elsewhere/x", b"new")


def test_local_copy_of_nothing(s3):
    with pytest.raises(FileNotFoundError, match="nowhere"), storage.local_copy(join(s3, "nowhere")):
        pass


def test_a_missing_bucket_is_said_at_once(s3):
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("s3://no-such-bucket/file")
    with pytest.raises(FileNotFoundError):
        storage.write_bytes("s3://no-such-bucket/file", b"x")


def test_another_process_sees_what_was_just_published(s3, tmp_path):
    """Listings must not be cached: stages run in processes of their own."""
    folder = join(s3, tmp_path.name)
    assert storage.list_names(folder) == []
    code = f"from pipeline import storage; storage.write_bytes({join(folder, 'new')!r}, b'from elsewhere')"
    python("-c", code)
    assert storage.list_names(folder) == ["new"]
    assert storage.read_bytes(join(folder, "new")) == b"from elsewhere"
    storage.delete(folder)


# --- local alone ------------------------------------------------------------------------------------


def test_temporary_files_are_not_listed(tmp_path):
    with storage.atomic_write(str(tmp_path / "file")) as file:
        file.write(b"x")
        file.flush()
        assert os.listdir(tmp_path)
        assert storage.list_names(str(tmp_path)) == []
    assert os.listdir(tmp_path) == ["file"]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")
    code = (
        "import os, signal; from pipeline import storage\n"
        f"with storage.atomic_write({str(target)!r}) as file:\n"
        "    file.write(b'half of the new'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    python("-c", code, ends=None)
    assert target.read_bytes() == b"old"
    assert storage.list_names(str(tmp_path)) == ["file"]


@pytest.mark.parametrize("uri", ["gs://bucket/x", "http://host/x", "hdfs://x"])
def test_unsupported_scheme(uri):
    for operation in (storage.exists, storage.list_names, storage.read_bytes, storage.delete):
        with pytest.raises(ValueError, match=r"only local paths and s3:// are supported") as error:
            operation(uri)
        assert uri in str(error.value)


@pytest.mark.parametrize(
    "operation", [storage.exists, storage.list_names, storage.read_bytes, storage.delete]
)
def test_a_name_that_cannot_be_on_s3(operation):
    with pytest.raises(ValueError, match=r"'s3://bucket/caf\\xe9': it has bytes that are no UTF-8"):
        operation("s3://bucket/caf\udce9")


def test_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs") == str(tmp_path / "runs")
    assert storage.absolute("~/runs") == os.path.expanduser("~/runs")
    assert storage.absolute("s3://bucket/runs") == "s3://bucket/runs"


# --- fingerprints -----------------------------------------------------------------------------------


def test_fingerprint_follows_from_content_alone():
    content = {"b": [1, 2.5, None, "ü"], "a": {"y": True, "x": "text"}}
    reordered = {"a": {"x": "text", "y": True}, "b": [1, 2.5, None, "ü"]}
    assert storage.fingerprint(content) == storage.fingerprint(reordered)
    assert len(storage.fingerprint(content)) == 16


@pytest.mark.parametrize("other", [{"a": [2, 1]}, {"a": [1, 2, 3]}, {"b": [1, 2]}, {"a": ["1", 2]}, [1, 2]])
def test_fingerprint_sees_every_change(other):
    assert storage.fingerprint({"a": [1, 2]}) != storage.fingerprint(other)


def test_fingerprint_is_the_same_in_another_process():
    """Published folders are named by it, so it must not change with the hash seed or the release."""
    code = "from pipeline import storage; print(storage.fingerprint({'a': [1, 'x'], 'b': None}))"
    outputs = {python("-c", code, PYTHONHASHSEED=seed)[0].strip() for seed in ("1", "2")}
    assert outputs == {storage.fingerprint({"a": [1, "x"], "b": None})}


def test_a_listing_says_when_each_file_was_written_and_age_how_long_ago(place):
    before = time.time()
    storage.write_bytes(storage.join(place, "below", "a"), b"x")
    (found,) = storage.list_files(place)
    assert before - 2 < found.changed < time.time() + 2
    assert -2 < storage.age(storage.join(place, "below", "a")) < 60
    with pytest.raises(FileNotFoundError):
        storage.age(storage.join(place, "b"))


def test_a_folder_is_emptied_but_for_one_file(place, tmp_path):
    for name in ("a", "keep", "below/keep", "below/deeper/b"):
        storage.write_bytes(storage.join(place, name), b"x")
    other = tmp_path / "other"
    other.mkdir()
    (other / "c").write_bytes(b"x")
    if not storage.is_remote(place):
        os.symlink(other, os.path.join(place, "below", "link"))
    storage.empty_folder(place, but="keep")
    assert [file.name for file in storage.list_files(place)] == ["keep"]
    assert storage.list_names(place) == ["keep"]
    assert (other / "c").exists()
    storage.remove_if_empty(place)
    assert storage.exists(storage.join(place, "keep"))
