"""What goes wrong with storage. All of it but IncompleteError is an OSError, as of any file."""

from __future__ import annotations


class IncompleteError(RuntimeError):
    """A folder that has no manifest: nothing was published there, or its job has not ended."""


class StorageError(OSError):
    """Object storage refused or failed; the message names the object, the operation and the server.

    It says nothing of what is stored: never take it for a damaged file.
    """


class AccessError(StorageError, PermissionError):
    """No permission, or credentials that the server does not take. The message names those that were used."""


class MissingBucketError(StorageError, FileNotFoundError):
    """There is no such bucket."""


class UnavailableError(StorageError):
    """A request failed as often as it may be tried."""
