"""Making things in threads: ahead of their use, or behind it."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any, TypeVar

_T = TypeVar("_T")
_Made = TypeVar("_Made")


def ahead(items: Iterator[_T]) -> Generator[_T, None, None]:
    """The same items, each made in a thread while the one before it is being used."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        following = pool.submit(next, items, end)
        while (item := following.result()) is not end:
            following = pool.submit(next, items, end)
            yield item  # type: ignore[misc]


def blocks_ahead(file: IO[bytes], size: int) -> Iterator[bytes]:
    """A file to its end, each block read while the one before it is being used; without a thread where it has one."""
    first = file.read(size)
    yield first
    if len(first) == size:
        yield from ahead(iter(lambda: file.read(size), b""))


def made_ahead(
    make: Callable[[_T], _Made], items: Iterator[_T], threads: int
) -> Generator[_Made, None, None]:
    """What `make` gives of each item, in order; made in threads, so many at once, while those before are used."""
    following: deque[Future[_Made]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="ahead") as pool:
        for item in items:
            following.append(pool.submit(make, item))
            if len(following) > threads:
                yield following.popleft().result()
        while following:
            yield following.popleft().result()


@contextlib.contextmanager
def behind() -> Iterator[Callable[..., Future[Any]]]:
    """A block that hands calls, `later(function, *arguments)`, to a thread, which makes them one after the other.

    At most two of them wait or run: who hands over a third waits too. What one of them raises is raised in the
    block by a later call, or at its end.
    """
    pending: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="behind") as pool:

        def later(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
            if len(pending) == 2:
                pending.popleft().result()
            pending.append(pool.submit(function, *arguments))
            return pending[-1]

        yield later
        while pending:
            pending.popleft().result()
