import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from places import python

from pipeline import storage
from pipeline.artifacts import once as lease_module
from pipeline.artifacts.once import LEASE_FILE, lease
from pipeline.storage import client as s3_client


def held(folder):
    return storage.exists(storage.join(folder, LEASE_FILE))


def hold(folder, **changes):
    """What another job's lease looks like."""
    holder = {"id": "other", "host": socket.gethostname(), "pid": os.getpid(), "since": "now", **changes}
    storage.write_json(storage.join(folder, LEASE_FILE), holder)
    return holder


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


def test_who_was_taken_over_says_so_and_leaves_the_lease_alone(place, monkeypatch, capfd):
    monkeypatch.setattr(lease_module, "RENEWED_EVERY", 0.1)
    with lease(place, "slow"):
        hold(place)
        time.sleep(0.5)
    assert storage.read_json(storage.join(place, LEASE_FILE))["id"] == "other"
    assert "slow: another job took this over" in capfd.readouterr().err


# A job that holds the lease makes a file that nobody else may find. Every second turn ends as if it had been killed.
RACER = """
import json, os, sys, threading, time
from pipeline import storage
from pipeline.artifacts import once

once.SECONDS_BETWEEN_LOOKS = 0.03
folder, inside, dead = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])

def job(number):
    for turn in range(4):
        with once.lease(folder, f"job {number}"):
            try:
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                print("overlap")
            time.sleep(0.01)
            os.unlink(inside)
            print("turn")
            if turn % 2:
                storage.write_json(storage.join(folder, once.LEASE_FILE), {**dead, "by": [number, turn]})

jobs = [threading.Thread(target=job, args=(number,)) for number in range(4)]
for one in jobs:
    one.start()
for one in jobs:
    one.join()
"""


@pytest.mark.fault(
    fault="8 jobs at once, half of which are killed at work",
    stage="all that fill a folder",
    checked="one at a time, on a disk and where S3 heeds conditions",
)
@pytest.mark.parametrize("place", ["local", "moto"], indirect=True)
def test_of_jobs_that_come_at_once_one_has_it_at_a_time(place, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead = hold(place, pid=ended.pid)
    words = ["-c", RACER, place, tmp_path / "inside", json.dumps(dead)]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: python(*words), range(2)))
    assert [out.split() for out, _ in done] == [["turn"] * 16] * 2


@pytest.mark.parametrize("faulty_s3", ["moto"], indirect=True)
def test_an_answer_that_is_lost_is_no_other_job(faulty_s3, monkeypatch, capfd):
    monkeypatch.setattr(lease_module, "RENEWED_EVERY", 0.2)
    monkeypatch.setattr(s3_client, "FIRST_WAIT", 0.01)
    folder = "s3://bucket/lost"
    faulty_s3.fail("answer lost", method="PUT")
    with lease(folder, "job"):  # was there when it was written again
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        faulty_s3.fail("answer lost", method="PUT")
        time.sleep(1)
    assert not held(folder)
    said = capfd.readouterr().err
    assert "job: the lease could not be renewed" in said
    assert "another job" not in said
