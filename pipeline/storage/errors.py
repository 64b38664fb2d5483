"""What goes wrong with storage. All of it but IncompleteError is an OSError, as of any file."""

from __future__ import annotations


class IncompleteError(RuntimeError):
    """A folder that has no manifest: nothing was published there, or its job has not ended."""


class StorageError(OSError):
    """Object storage or the Hugging Face Hub refused or failed; the message names the object and the server.

    It says nothing of what is stored: never take it for a damaged file.
    """


class AccessError(StorageError, PermissionError):
    """No permission, or credentials that the server does not take. The message names those that were used."""


class MissingBucketError(StorageError, FileNotFoundError):
    """There is no such bucket."""


class HubError(StorageError):
    """The Hugging Face Hub has no such repository or revision, or did not answer as it should."""


class UnavailableError(StorageError):
    """A request failed as often as it may be tried."""
