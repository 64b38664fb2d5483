"""What is made ahead and what is left behind: in order, in bounds, and errors are those of the work itself."""

import threading

import pytest

from pipeline.storage.threads import behind, made_ahead


class Broken(Exception):
    pass


def fails_at(bad):
    def make(item):
        if item == bad:
            raise Broken(item)
        return 2 * item

    return make


def test_made_ahead_is_in_order_and_a_few_items_ahead():
    taken = []

    def items():
        for n in range(20):
            taken.append(n)
            yield n

    for n, made in enumerate(made_ahead(fails_at(None), items(), 3)):
        assert made == 2 * n
        assert len(taken) <= n + 4
    assert len(taken) == 20


def test_an_error_ahead_comes_in_its_place():
    made = made_ahead(fails_at(2), iter(range(9)), 2)
    assert [next(made), next(made)] == [0, 2]
    with pytest.raises(Broken, match="2"):
        next(made)


def test_calls_are_made_behind_in_order_by_one_thread_and_two_at_most_wait():
    done, go = [], threading.Event()

    def work(n):
        go.wait(10)
        done.append((n, threading.get_ident()))
        return n

    with behind() as later:
        first, _ = later(work, 0), later(work, 1)
        assert not done
        go.set()
        later(work, 2)
        assert first.done()
    assert first.result() == 0
    assert [n for n, _ in done] == [0, 1, 2]
    (thread,) = {thread for _, thread in done}
    assert thread != threading.get_ident()


@pytest.mark.parametrize("calls", [1, 5])
def test_an_error_behind_ends_the_block(calls):
    with pytest.raises(Broken), behind() as later:  # noqa: PT012
        for n in range(calls):
            later(fails_at(0), n)


def test_the_blocks_own_error_is_the_one_that_is_raised():
    with pytest.raises(KeyboardInterrupt), behind() as later:  # noqa: PT012
        later(fails_at(0), 0)
        raise KeyboardInterrupt
