"""Which tasks need Ray; and what its workers do with memory: freed blocks are used again."""

import os
import platform
import sys
from types import SimpleNamespace

import pytest
import torch
from places import python

from pipeline.compute import WATCHER, _connected, _run_kept, map_tasks, one_ray, ray_session
from pipeline.config import resolve_config

COUNT = """
import resource, sys
import numpy as np
from pipeline.models.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def use():
    return [np.ones(megabytes << 17) for megabytes in (1, 3, 9, 20, 40)]

use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how):
    return int(python("-c", COUNT, how)[0])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_large_blocks_are_used_again():
    assert page_faults("keep") < 0.2 * page_faults("leave")


class Doubles:
    def __init__(self, by):
        self.by = by

    def __call__(self, row):
        return {"n": self.by * row["n"], "threads": torch.get_num_threads(), "shape": (1, 2)}


def doubles(row, by):
    return Doubles(by)(row)


class RayStarts(Exception):
    pass


@pytest.fixture
def needs_ray(monkeypatch):
    """Whether `map_tasks` of so many rows begins a session of Ray."""

    def begin(config):
        raise RayStarts

    monkeypatch.setattr("pipeline.compute._connected", begin)
    monkeypatch.setitem(sys.modules, "ray", None)  # as before it was imported
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def ask(task, count, **settings):
        rows = [{"n": n} for n in range(count)]
        try:
            assert [
                row["n"] for row in map_tasks(resolve_config({"ray": settings}), task, rows, arguments=(2,))
            ] == [2 * n for n in range(count)]
        except (RayStarts, ImportError):
            return True
        return False

    return ask


def test_what_one_process_would_do_needs_no_ray(needs_ray, monkeypatch):
    assert not needs_ray(Doubles, 1, num_cpus=8)
    assert needs_ray(Doubles, 2, num_cpus=2)
    assert not needs_ray(Doubles, 5, num_cpus=2, teacher_cpus=1.5), "one actor at a time"
    assert not needs_ray(doubles, 1, num_cpus=8)
    assert not needs_ray(doubles, 5, num_cpus=1)
    assert needs_ray(doubles, 2, num_cpus=2)
    assert needs_ray(Doubles, 1, num_cpus=1, address="auto"), "a cluster may have GPUs"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert needs_ray(Doubles, 1, num_cpus=1)


def test_tasks_in_this_process_have_the_threads_of_an_actor():
    before = torch.get_num_threads()
    config = resolve_config({"ray": {"num_cpus": 4, "teacher_cpus": 3}})
    rows = map_tasks(config, Doubles, [{"n": 1}, {"n": 2}], arguments=(2,))
    assert next(rows) == {"n": 2, "threads": 3, "shape": [1, 2]}, "as JSON has it"
    rows.close()
    assert torch.get_num_threads() == before


def test_sessions_in_one_ray_begin_once_and_end_with_it(monkeypatch):
    said = []

    class Session:
        def __init__(self, config):
            pass

        def __enter__(self):
            said.append("begin")

        def __exit__(self, *_):
            said.append("end")

    class NoRay:
        is_initialized = staticmethod(lambda: False)

    monkeypatch.setitem(sys.modules, "ray", NoRay)
    monkeypatch.setattr("pipeline.compute._connected", Session)
    config = resolve_config({})
    with one_ray() as one:
        assert said == []
        with ray_session(config):
            assert said == ["begin"]
        monkeypatch.setattr(NoRay, "is_initialized", lambda: True)
        with ray_session(config):
            assert one.ours
            assert said == ["begin"]
        one.end()
        assert said == ["begin", "end"]
        with pytest.raises(KeyboardInterrupt), ray_session(config):
            pass
    assert said == ["begin", "end"]
    with one_ray():
        pass
    assert said == ["begin", "end"], "nothing needed it"


def test_a_process_makes_one_of_a_class_for_all_rows_of_a_call():
    made = []

    class Counts(Doubles):
        def __init__(self, by):
            made.append(by)
            super().__init__(by)

    before = torch.get_num_threads()
    rows = [
        _run_kept({"n": n}, call, 3.5, Counts, (by,)) for call, by in (("a", 2), ("b", 5)) for n in (1, 2)
    ]
    assert [row["n"] for row in rows] == [2, 4, 5, 10]
    assert {row["threads"] for row in rows} == {3}, "as an actor of so many CPUs has"
    assert made == [2, 5]
    assert torch.get_num_threads() == before


def test_only_a_ray_of_our_own_goes_without_the_watcher(monkeypatch):
    seen = []
    ray = SimpleNamespace(
        init=lambda **_: seen.append(os.environ.get(WATCHER)),
        shutdown=lambda: None,
        LoggingConfig=lambda **_: None,
    )
    context = SimpleNamespace(get_current=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", SimpleNamespace(DataContext=context))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv(WATCHER, raising=False)
    for settings in ({}, {"address": "auto"}):
        with _connected(resolve_config({"ray": settings})):
            pass
    assert seen == ["0", None]
    monkeypatch.setenv(WATCHER, "1")
    with _connected(resolve_config({})):
        pass
    assert seen[2] == os.environ[WATCHER] == "1"
