"""What tests that hurt jobs have in common: ending them, and looking at what they left."""

import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from places import GOLDEN

# A teacher that needs no training, and tells its number of slots and their size itself.
GOLDEN_TEACHER = [f"teacher.checkpoint={GOLDEN / 'slotcontrast_tiny.ckpt'}", "teacher.num_heads=3"]
GOLDEN_TEACHER += ["teacher.num_slots=null", "teacher.slot_size=null"]


def is_alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # not every init process collects its orphans
    except psutil.NoSuchProcess:
        return False


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    pytest.fail(f"{condition} did not come true in {seconds} s")


def kill_with_family(process):
    """SIGKILL of the driver, and the end of all that worked for it.

    Ray's agents, which do no work, have been seen to outlive their node by minutes.
    """
    family = psutil.Process(process.popen.pid).children(recursive=True)
    family = [p for p in family if "agent" not in command_line(p).lower()]
    process.popen.send_signal(signal.SIGKILL)
    process.popen.wait()
    wait_for(lambda: not any(is_alive(member) for member in family), 60)


def command_line(process):
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def resumed_from(text):
    """The steps that "going on from step" lines name."""
    return [int(step) for step in re.findall(r"going on from step (\d+)", text)]


def published_shards(uri):
    folder = Path(uri) / "data"
    return {p: p.stat().st_mtime_ns for p in folder.glob("shard-*.parquet")} if folder.is_dir() else {}


def assert_kept(before, uri):
    """What was published then was not made again."""
    after = published_shards(uri)
    assert {path: after[path] for path in before} == before
