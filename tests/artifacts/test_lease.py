import os
import socket
import threading
import time

import pytest
from places import python

from pipeline import storage
from pipeline.artifacts import once as lease_module
from pipeline.artifacts.once import LEASE_FILE, lease


def held(folder):
    return storage.exists(storage.join(folder, LEASE_FILE))


def hold(folder, **changes):
    """What another job's lease looks like."""
    holder = {"id": "other", "host": socket.gethostname(), "pid": os.getpid(), "since": "now", **changes}
    storage.write_json(storage.join(folder, LEASE_FILE), holder)


def test_the_second_job_waits_for_the_first(place, capfd):
    order = []

    def second():
        with lease(place, "second"):
            order.append("second")

    with lease(place, "first"):
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(1.5)
        order.append("first")
    waiting.join(30)
    assert order == ["first", "second"]
    assert not held(place)
    assert "second: another job is at this already" in capfd.readouterr().err


def test_an_error_in_the_block_gives_the_lease_back(place):
    def work():
        with lease(place, "job"):
            assert held(place)
            raise RuntimeError("of the block")

    with pytest.raises(RuntimeError, match="of the block"):
        work()
    assert not held(place)


@pytest.mark.parametrize("left", ["killed", "damaged"])
def test_what_a_killed_job_of_this_machine_left_is_not_waited_for(tmp_path, monkeypatch, left):
    monkeypatch.setattr(lease_module, "ABANDONED_AFTER", 1e9)
    killed = f"with lease({str(tmp_path)!r}, 'killed'): os.kill(os.getpid(), signal.SIGKILL)"
    python("-c", f"import os, signal; from pipeline.artifacts.once import lease\n{killed}", ends=None)
    if left == "damaged":
        (tmp_path / LEASE_FILE).write_bytes(b"\0half")
    assert held(str(tmp_path))
    with lease(str(tmp_path), "next"):
        pass
    assert not held(str(tmp_path))


def test_a_job_of_another_machine_is_waited_for_until_it_goes_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "ABANDONED_AFTER", 2.0)
    hold(str(tmp_path), host="elsewhere")
    began = time.monotonic()
    with lease(str(tmp_path), "next"):
        assert time.monotonic() - began > 2.0


def test_a_renewed_lease_is_not_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "ABANDONED_AFTER", 1.5)
    monkeypatch.setattr(lease_module, "RENEWED_EVERY", 0.3)
    entered = threading.Event()

    def other():
        with lease(str(tmp_path), "other"):
            entered.set()

    with lease(str(tmp_path), "long"):
        threading.Thread(target=other).start()
        assert not entered.wait(4)
    assert entered.wait(10)


def test_who_was_taken_over_says_so_and_leaves_the_lease_alone(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(lease_module, "RENEWED_EVERY", 0.2)
    with lease(str(tmp_path), "slow"):
        hold(str(tmp_path))
        time.sleep(1)
    assert held(str(tmp_path))
    assert "slow: another job took this over" in capfd.readouterr().err
