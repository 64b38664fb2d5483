"""What fails in a task on Ray Data is raised as it was there, in a function's task and in a class's."""

import errno
import os

import pytest

from pipeline.compute import map_tasks


@pytest.mark.fault("an error in a task on Ray Data", "shard, cache, evaluate", "raised as it was there")
def test_a_function_that_fails(tiny, tmp_path, local_ray):
    def fails_on_three(row, folder):  # workers can't import the tests, so that Ray sends what is defined here
        if row["n"] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        open(f"{folder}/{row['n']}", "w").close()
        return row

    rows = [{"n": n} for n in range(6)]
    with pytest.raises(OSError, match="No space left on device") as caught:
        list(map_tasks(tiny(), fails_on_three, rows, arguments=(str(tmp_path),)))
    assert type(caught.value) is OSError
    assert caught.value.errno == errno.ENOSPC
    assert "in fails_on_three" in caught.value.__notes__[0]
    # The same Ray goes on to be used.
    made = list(map_tasks(tiny(), fails_on_three, rows[:3], arguments=(str(tmp_path),)))
    assert sorted(row["n"] for row in made) == [0, 1, 2]
    assert {"0", "1", "2"} <= set(os.listdir(tmp_path))


def test_a_class_that_fails(tiny, local_ray):
    class FailsWhenMade:
        def __init__(self, words):
            raise PermissionError(errno.EACCES, words)

    class Fails:
        def __init__(self, words):
            self.words = words

        def __call__(self, row):
            raise ValueError(f"{self.words}: {row['n']}")

    rows = [{"n": 1}, {"n": 1}]
    # Two processes; one that would do all by itself is this one.
    for config, words in ((tiny("ray.teacher_cpus=0.8"), "In the worker"), (tiny(), "")):
        with pytest.raises(PermissionError, match="not yours") as caught:
            list(map_tasks(config, FailsWhenMade, rows, arguments=("not yours",)))
        assert caught.value.errno == errno.EACCES
        assert words in "".join(getattr(caught.value, "__notes__", ()))
        with pytest.raises(ValueError, match="no number: 1"):
            list(map_tasks(config, Fails, rows, arguments=("no number",)))
