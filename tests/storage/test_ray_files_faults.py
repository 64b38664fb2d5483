"""What Ray writes by itself, through the file system that it is given, on a server behind a faulty proxy."""

import os
import pickle
import subprocess
import sys

import pyarrow.fs as arrow
import pytest
from fault_proxy import FAULTS, PART

from pipeline import storage
from pipeline.compute import arrow_filesystem
from pipeline.storage import client as s3_client
from pipeline.storage import join

pytestmark = [
    pytest.mark.slow,  # what they share with all other requests is asked in test_storage_faults
    pytest.mark.fault(
        fault="S3: 503, 429, 500, stalls, cut connections, no permission",
        stage="Ray's own files",
        checked="tried as often as all else, whole objects or none; what can't be read is no empty folder",
    ),
]
BIG = os.urandom(2 * PART + 1000)  # three parts of an upload
SMALL = b"some bytes"


@pytest.fixture
def uri(proxy, tmp_path):
    """A folder with `small` and `below/big`, put there without faults."""
    uri = join("s3://bucket", tmp_path.name)
    storage.write_bytes(join(uri, "small"), SMALL)
    storage.write_bytes(join(uri, "below", "big"), BIG)
    proxy.reset()
    yield uri
    proxy.calm()
    storage.delete(uri)


class Fsspec:
    """What fsspec's users do."""

    def __init__(self, uri):
        self.fs, self.root = storage.filesystem(uri)

    def read(self):
        assert self.fs.cat(f"{self.root}/small") == SMALL
        with self.fs.open(f"{self.root}/below/big") as file:
            file.seek(1000)
            assert file.read() == BIG[1000:]

    def write(self):
        self.fs.pipe(f"{self.root}/new", SMALL)
        with self.fs.open(f"{self.root}/new big", "wb") as file:
            file.write(BIG)
        assert self.fs.cat_file(f"{self.root}/new") == SMALL
        self.fs.mv(f"{self.root}/new big", f"{self.root}/moved")
        assert self.fs.cat_file(f"{self.root}/moved") == BIG

    def list(self):
        assert self.fs.ls(self.root, detail=False) == [f"{self.root}/below", f"{self.root}/small"]
        assert self.fs.find(self.root) == [f"{self.root}/below/big", f"{self.root}/small"]
        assert self.fs.info(f"{self.root}/below/big")["size"] == len(BIG)
        assert self.fs.isdir(f"{self.root}/below")
        assert not self.fs.exists(f"{self.root}/nothing")

    def delete(self):
        self.fs.rm(f"{self.root}/small")
        self.fs.rm(f"{self.root}/below", recursive=True)
        assert storage.list_names(f"s3://{self.root}") == []


class Arrow:
    """What Ray Train and Tune do."""

    def __init__(self, uri):
        self.fs, self.root = arrow_filesystem(uri), uri.removeprefix("s3://")

    def read(self):
        target = arrow._MockFileSystem()
        arrow.copy_files(self.root, "copy", source_filesystem=self.fs, destination_filesystem=target)
        assert target.open_input_stream("copy/small").read() == SMALL
        assert target.open_input_stream("copy/below/big").read() == BIG

    def write(self):
        with self.fs.open_output_stream(f"{self.root}/new") as file:
            file.write(SMALL)
        source = arrow._MockFileSystem()
        source.create_dir("checkpoint")
        with source.open_output_stream("checkpoint/big") as file:
            file.write(BIG)
        self.fs.create_dir(f"{self.root}/checkpoint")
        arrow.copy_files(
            "checkpoint", f"{self.root}/checkpoint", source_filesystem=source, destination_filesystem=self.fs
        )
        assert storage.read_bytes(f"s3://{self.root}/new") == SMALL
        self.fs.copy_file(f"{self.root}/checkpoint/big", f"{self.root}/copy")
        assert storage.read_bytes(f"s3://{self.root}/copy") == BIG

    def list(self):
        found = self.fs.get_file_info(arrow.FileSelector(self.root))
        assert [(f.path, f.type, f.size) for f in found] == [
            (f"{self.root}/below", arrow.FileType.Directory, None),
            (f"{self.root}/small", arrow.FileType.File, len(SMALL)),
        ]
        deep = self.fs.get_file_info(arrow.FileSelector(self.root, recursive=True))
        assert [f.path.removeprefix(self.root) for f in deep] == ["/below", "/below/big", "/small"]
        assert self.fs.get_file_info(f"{self.root}/nothing").type == arrow.FileType.NotFound

    def delete(self):
        self.fs.delete_file(f"{self.root}/small")
        self.fs.delete_dir(f"{self.root}/below")
        assert storage.list_names(f"s3://{self.root}") == []


CASES = [  # the operation, the method of HTTP that suffers, the fault
    (operation, method, fault)
    for operation, methods in {
        "read": ("HEAD", "GET"),
        "write": ("PUT", "POST"),
        "list": ("HEAD", "GET"),
        "delete": ("DELETE", "POST"),
    }.items()
    for method in methods
    for fault in FAULTS
    if (method == "GET" or not fault.endswith("in answer"))
    and (fault != "cut in upload" or (operation, method) in [("write", "PUT"), ("delete", "POST")])
]


@pytest.mark.parametrize("api", [Fsspec, Arrow])
@pytest.mark.parametrize(("operation", "method", "fault"), CASES)
def test_what_may_pass_is_tried_again(uri, proxy, api, operation, method, fault):
    proxy.fail(fault, times=1 if "stall" in fault else s3_client.TRIES - 1, method=method)
    getattr(api(uri), operation)()
    assert proxy.injected[fault] >= 1


@pytest.mark.parametrize("api", [Fsspec, Arrow])
def test_many_faults_at_once(uri, proxy, api, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "12")  # six in a row come now and then
    proxy.rates = {fault: 0.02 if "stall" in fault else 0.06 for fault in FAULTS}
    for _ in range(3):
        for operation in ("read", "list", "write"):
            getattr(api(uri), operation)()
            for new in ("new", "moved", "checkpoint", "copy"):
                storage.delete(join(uri, new))
    api(uri).delete()
    assert proxy.injected.total() > 10


def test_not_for_ever_and_no_failure_is_taken_for_no(uri, proxy, monkeypatch):
    fs, root = storage.filesystem(uri)
    for ask in (fs.exists, fs.isfile, fs.isdir, fs.ls, fs.find, fs.cat, fs.rm):
        proxy.reset()
        proxy.fail("503", times=1000)
        with pytest.raises(storage.UnavailableError, match=rf"failed {s3_client.TRIES} times .* 503"):
            ask(f"{root}/small")
        assert proxy.injected["503"] == s3_client.TRIES, "no layer multiplies the tries of another"
        proxy.calm()
    proxy.denied = ["small"]
    with pytest.raises(PermissionError, match=r"s3://bucket/.*/small: read refused .* key …tkey"):
        arrow_filesystem(uri).open_input_stream(f"{root}/small")


def test_what_is_not_there(uri):
    fs, root = storage.filesystem(uri)
    for act in (fs.info, fs.ls, fs.cat, fs.rm):
        with pytest.raises(FileNotFoundError, match="nothing"):
            act(f"{root}/nothing")
    assert fs.find(f"{root}/nothing") == []
    with pytest.raises(storage.MissingBucketError, match="no bucket 'nobucket'"):
        fs.cat("nobucket/file")
    with pytest.raises(IsADirectoryError, match="below is a folder"):
        fs.rm(f"{root}/below")


def test_names_are_no_patterns_and_a_file_is_not_the_folder_of_its_name(uri):
    fs, root = storage.filesystem(uri)
    for name in ("lr=[1e-3]*", "lr=1"):
        fs.pipe_file(f"{root}/trials/{name}", SMALL)
    fs.rm(f"{root}/trials/lr=[1e-3]*")
    assert fs.ls(f"{root}/trials", detail=False) == [f"{root}/trials/lr=1"]


def fails_after(file, content):
    with file:
        file.write(content)
        raise ZeroDivisionError


@pytest.mark.parametrize("content", [SMALL, BIG])
def test_what_was_not_written_to_its_end_does_not_appear(uri, content):
    fs, root = storage.filesystem(uri)
    with pytest.raises(ZeroDivisionError):
        fails_after(fs.open(f"{root}/new", "wb"), content)
    forgotten = fs.open(f"{root}/new", "wb")
    forgotten.write(content)
    del forgotten
    assert storage.list_names(uri) == ["below", "small"]


# Ray hands it to its workers pickled.
WORKER = """
import pickle, sys
fs = pickle.load(sys.stdin.buffer)
with fs.open_input_stream(sys.argv[1]) as file:
    sys.stdout.buffer.write(file.read())
"""


@pytest.mark.parametrize(("fault", "times"), [("429", 3), ("cut in answer", 3), ("stall in answer", 1)])
def test_a_worker_tries_again_too(uri, proxy, fault, times):
    fs, root = arrow_filesystem(uri), uri.removeprefix("s3://")
    assert pickle.loads(pickle.dumps(fs)) == fs
    proxy.fail(fault, times=times, method="GET")
    done = subprocess.run(
        [sys.executable, "-c", WORKER, f"{root}/below/big"], input=pickle.dumps(fs), stdout=subprocess.PIPE
    )
    assert done.returncode == 0
    assert done.stdout == BIG
    assert proxy.injected[fault] == times
