"""Objects in S3: reading, writing, listing and deleting them."""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from pipeline.log import log
from pipeline.storage.client import endpoint, request, split, status
from pipeline.storage.errors import MissingBucketError, StorageError

PART_BYTES = 8 << 20  # of a multipart upload, at first; 5 MiB is the least that S3 takes
# Then they are twice as large: S3 takes 10,000 parts, and so 8 TB, which is more than an object may have.
PARTS_OF_A_SIZE = 1000
_T = TypeVar("_T")


def size(uri: str) -> int:
    """Bytes of an object; raises FileNotFoundError, or MissingBucketError where that is why."""
    return int(_head_or_reason(uri)["ContentLength"])


def version(uri: str) -> str:
    """An object's ETag; raises as `size`."""
    return str(_head_or_reason(uri)["ETag"])


def age(uri: str) -> float:
    """Seconds since an object was written, by the server's clock; raises as `size`."""
    from email.utils import parsedate_to_datetime

    head = _head_or_reason(uri)
    now = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
    return float((now - head["LastModified"]).total_seconds())


def _head_or_reason(uri: str) -> dict[str, Any]:
    bucket, key = split(uri)
    try:
        return _head(uri)
    except FileNotFoundError:
        # The answer to HEAD has no body that could say what is missing.
        request("read", uri, lambda c: c.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1))
        raise


def is_object(uri: str) -> bool:
    key = split(uri)[1]
    if not key or key.endswith("/"):
        return False
    try:
        _head(uri)
    except FileNotFoundError:
        return False
    return True


def _head(uri: str) -> dict[str, Any]:
    from botocore.exceptions import ClientError

    bucket, key = split(uri)

    def call(client: Any) -> dict[str, Any]:
        try:
            return client.head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            # Its answer has no body that could say why, such as credentials that have expired.
            if status(error) in (400, 403):
                client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
            raise

    return request("read", uri, call)


def part_bytes(number: int) -> int:
    """Bytes of an upload's part, counted from 0."""
    return PART_BYTES << number // PARTS_OF_A_SIZE


def is_folder(uri: str) -> bool:
    """Whether there are objects below."""
    bucket, key = split(uri)
    prefix = key.rstrip("/") + "/" if key else ""
    page = request("list", uri, lambda c: c.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1))
    return bool(page.get("Contents"))


class Content(NamedTuple):
    """Bytes of an object, and what changes when the object does."""

    data: bytes
    version: str


def get(uri: str, start: int | None = None, stop: int | None = None) -> Content:
    """An object, or its bytes `start` to `stop` (exclusive), fewer where it ends before.

    One request; an answer that ends too early is asked for again.
    """
    from botocore.exceptions import ClientError, IncompleteReadError

    bucket, key = split(uri)
    wanted = {} if start is None or stop is None else {"Range": f"bytes={start}-{stop - 1}"}

    def call(client: Any) -> Content:
        try:
            answer = client.get_object(Bucket=bucket, Key=key, **wanted)
        except ClientError as error:
            if status(error) == 416:  # it ends before `start`
                return Content(b"", "")
            raise
        data = answer["Body"].read()
        sent = re.match(r"bytes (\d+)-(\d+)", answer.get("ContentRange", ""))
        expected = int(sent[2]) - int(sent[1]) + 1 if sent else answer["ContentLength"]
        if len(data) != expected:
            raise IncompleteReadError(actual_bytes=len(data), expected_bytes=expected)
        return Content(data, str(answer.get("ETag", "")))

    return request("read", uri, call)


def put(uri: str, data: bytes) -> None:
    bucket, key = split(uri)
    request("write", uri, lambda c: c.put_object(Bucket=bucket, Key=key, Body=data))


def put_if(uri: str, data: bytes, version: str | None) -> str | None:
    """Writes an object if the one there has this ETag; with None, if there is none.

    Returns:
        The new ETag; None where the condition did not hold.
    """
    from botocore.exceptions import ClientError

    bucket, key = split(uri)
    condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version.removeprefix("W/")}

    def call(client: Any) -> str | None:
        content = {"Bucket": bucket, "Key": key, "Body": data}
        try:
            return str(client.put_object(**content, **condition)["ETag"])
        except ClientError as error:
            if status(error) == 412:
                return None
            if status(error) == 501:  # "a header you provided implies functionality that is not implemented"
                return str(client.put_object(**content)["ETag"])
            raise

    try:
        return request("write", uri, call)
    except MissingBucketError:
        raise
    except FileNotFoundError:  # nothing there that could have the ETag
        return None


_HEEDS: dict[tuple[str, str], bool] = {}  # endpoint, bucket: what `heeds_conditions` has found out


def heeds_conditions(uri: str, data: bytes) -> bool:
    """Whether the server writes only where a condition of `put_if` holds; each is asked once a process.

    Args:
        uri, data: an object that is there, which a server that does not writes again.
    """
    place = (endpoint(), split(uri)[0])
    if place not in _HEEDS:
        of_nothing = f'"{"0" * 32}"'
        _HEEDS[place] = put_if(uri, data, None) is None and put_if(uri, data, of_nothing) is None
    return _HEEDS[place]


class Object(NamedTuple):
    """An object, or a folder (bytes: -1), in a listing of what lies below `prefix`."""

    name: str
    bytes: int
    version: str
    changed: float = 0.0  # seconds since 1970, by the server's clock


def objects(uri: str, *, deep: bool) -> Iterator[Object]:
    """What lies below a folder, at whatever depth or directly, in the order of the keys a page."""
    bucket, key = split(uri)
    prefix = key.rstrip("/") + "/" if key else ""
    options: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, **({} if deep else {"Delimiter": "/"})}
    while True:
        page = request("list", uri, functools.partial(_list_page, dict(options)))
        for folder in page.get("CommonPrefixes", ()):
            yield Object(folder["Prefix"][len(prefix) :].rstrip("/"), -1, "")
        for entry in page.get("Contents", ()):
            relative = entry["Key"][len(prefix) :]
            if relative and not relative.endswith("/"):  # which some tools put where a folder shall be
                version = str(entry.get("ETag") or entry.get("LastModified")).strip('"')
                yield Object(relative, int(entry["Size"]), version, entry["LastModified"].timestamp())
        if not page.get("IsTruncated"):
            return
        options["ContinuationToken"] = page["NextContinuationToken"]


def _list_page(options: dict[str, Any], client: Any) -> dict[str, Any]:
    return client.list_objects_v2(**options)


def delete(uri: str) -> None:
    """Removes an object, and all that lies below a folder of this name; nothing there is no error."""
    bucket, key = split(uri)
    if is_object(uri):
        request("delete", uri, functools.partial(_delete_keys, bucket, [key]))
    delete_objects(uri, [found.name for found in objects(uri, deep=True)])


def delete_objects(uri: str, names: Sequence[str]) -> None:
    """Removes objects by their paths below a folder."""
    bucket, key = split(uri)
    prefix = key.rstrip("/") + "/" if key else ""
    keys = [prefix + name for name in names]
    for start in range(0, len(keys), 1000):  # the most that one request takes
        request("delete", uri, functools.partial(_delete_keys, bucket, keys[start : start + 1000]))


def delete_object(uri: str) -> None:
    """Removes one object; nothing there is no error."""
    bucket, key = split(uri)
    request("delete", uri, lambda c: c.delete_object(Bucket=bucket, Key=key))


def _delete_keys(bucket: str, keys: list[str], client: Any) -> None:
    from botocore.exceptions import ClientError

    body = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
    for error in client.delete_objects(Bucket=bucket, Delete=body).get("Errors", ()):
        if error.get("Code") != "NoSuchKey":
            answer = {"HTTPStatusCode": 403 if error.get("Code") == "AccessDenied" else 0}
            raise ClientError({"Error": error, "ResponseMetadata": answer}, "DeleteObjects")


class Upload(io.RawIOBase):
    """A file to write to that becomes an object when it is committed, and is forgotten otherwise.

    Small content is one request. Larger content goes in parts as it is written, so that little more than one
    part is held in memory.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._bucket, self._key = split(uri)
        self._pending = bytearray()
        self._parts: list[dict[str, Any]] = []
        self._upload_id: str | None = None
        self._bytes = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._bytes

    def write(self, data: Any) -> int:
        length = memoryview(data).nbytes
        self._pending += data
        self._bytes += length
        while len(self._pending) > (size := part_bytes(len(self._parts))):
            self._send_part(bytes(self._pending[:size]))
            del self._pending[:size]
        return length

    def _request(self, call: Callable[[Any, dict[str, Any]], _T]) -> _T:
        place = {"Bucket": self._bucket, "Key": self._key}
        if self._upload_id is not None:
            place["UploadId"] = self._upload_id
        return request("write", self._uri, lambda client: call(client, place))

    def _send_part(self, data: bytes) -> None:
        if self._upload_id is None:
            self._upload_id = self._request(lambda c, at: c.create_multipart_upload(**at))["UploadId"]
        number = len(self._parts) + 1
        answer = self._request(lambda c, at: c.upload_part(**at, PartNumber=number, Body=data))
        self._parts.append({"PartNumber": number, "ETag": answer["ETag"]})

    def commit(self) -> None:
        """Makes the object appear, whole."""
        if self._upload_id is None:
            put(self._uri, bytes(self._pending))
            return
        self._send_part(bytes(self._pending))
        parts = {"Parts": self._parts}
        # Done, though its answer was lost, is "no such upload" at the next try; then the size tells.
        with contextlib.suppress(FileNotFoundError):
            self._request(lambda c, at: c.complete_multipart_upload(**at, MultipartUpload=parts))
        if size(self._uri) != self._bytes:
            raise StorageError(
                f"{self._uri}: write failed at {endpoint()}: {size(self._uri)} of {self._bytes} bytes are there"
            )

    def abort(self) -> None:
        """Leaves nothing behind; what can't be removed now is said."""
        self._pending.clear()
        if self._upload_id is None:
            return
        try:
            self._request(lambda c, at: c.abort_multipart_upload(**at))
        except FileNotFoundError:
            pass  # it is gone, or done
        except OSError as error:
            log(f"storage: parts of an unfinished upload are left behind: {error}")
