"""One job at a time decides about a registered model, wherever the jobs run: a lock in the registry itself.

Jobs on different machines, with storage of their own, share nothing but the MLflow server. Names of registered models
are unique in its database, so creating one tests and sets: `<name>.lock` is there while a job holds it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.log import log
from pipeline.tracking.client import PatientClient, ServerUnavailable, error_code

SECONDS_UNTIL_BROKEN = (
    60.0  # that a waiting job sees one and the same holder, before it takes the holder for dead
)
SECONDS_BETWEEN_LOOKS = 0.5
# Before the holder's name in the description, and not in a tag: a server that is just deleting the lock has been seen
# to return it without its tags.
_NOTE = "A lock of the SlotMatch pipeline and no model, held by: "


@contextlib.contextmanager
def registry_lock(client: PatientClient, name: str) -> Iterator[PatientClient]:
    """Waits until no other job holds the lock of a registered model, and holds it for the block.

    Yields a client whose calls fail before others would take this job for dead and its place.

    Raises:
        ServerUnavailable, AccessDenied: as the calls of a client do.
        ValueError: a model is registered under the lock's name.
    """
    lock, me = f"{name}.lock", f"{socket.gethostname()}, pid {os.getpid()}, {uuid.uuid4().hex[:8]}"
    _acquire(client, lock, me)
    try:
        yield client.within(SECONDS_UNTIL_BROKEN / 2)
    finally:
        _release(client, lock, me)


def _acquire(client: PatientClient, lock: str, me: str) -> None:
    seen, looks = "", 0
    while not _create(client, lock, me):
        holder = _holder(client, lock)
        if holder == me:
            return  # the answer to our request had been lost
        if holder is not None and holder != seen:
            seen, looks = holder, 0
            log(f"register: waiting for another job that is registering ({holder})")
        # Looks that were answered count, not time: while the server is away, the holder can't go on either.
        looks += 1
        if holder is not None and looks * SECONDS_BETWEEN_LOOKS > SECONDS_UNTIL_BROKEN:
            log(f"register: {holder} has not gone on for {SECONDS_UNTIL_BROKEN:g} s, taking its place")
            _break(client, lock, holder)
            seen = ""
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _release(client: PatientClient, lock: str, me: str) -> None:
    """Deletes the lock while it is ours: where the answer is lost, another job may have it by now.

    One that can't be deleted is taken from us by whoever waits for it.
    """
    for _ in range(3):
        if _holder(client, lock) != me:
            return
        with contextlib.suppress(ServerUnavailable):
            _ignoring(client.delete_registered_model, lock, code="RESOURCE_DOES_NOT_EXIST")
            return


def _create(client: PatientClient, lock: str, me: str) -> bool:
    # A server that finds the name taken looks for its owner, and may find it gone.
    codes = ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")
    return _ignoring(client.create_registered_model, lock, description=_NOTE + me, code=codes)


def _holder(client: PatientClient, lock: str) -> str | None:
    """Who holds the lock; None for nobody."""
    try:
        description = client.get_registered_model(lock).description or ""
    except Exception as error:
        if error_code(error) == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    if not description.startswith(_NOTE):
        raise ValueError(
            f"mlflow.model_name: {lock!r} is a registered model, and the name that its lock would have; "
            "choose another mlflow.model_name"
        )
    return str(description.removeprefix(_NOTE))


def _break(client: PatientClient, lock: str, holder: str) -> None:
    """Takes a dead job's lock out of the way, by renaming: of several that try, only one can.

    The name that it gets is the holder's own and stays, so that nobody who is late renames the lock of a later holder.
    """
    if _holder(client, lock) == holder:
        codes = ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")
        _ignoring(client.rename_registered_model, lock, f"{lock}.{holder.rpartition(', ')[2]}", code=codes)


def _ignoring(call: Callable[..., Any], *arguments: str, code: str | tuple[str, ...], **options: str) -> bool:
    """Whether a call went well; an error of another code is raised."""
    try:
        call(*arguments, **options)
    except Exception as error:
        if error_code(error) not in ((code,) if isinstance(code, str) else code):
            raise
        return False
    return True
