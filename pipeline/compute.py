"""The machines: Ray sessions and their resources, tasks on Ray Data, the best device, memory, Arrow's file system."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from pipeline import storage
from pipeline.config import Config
from pipeline.log import log, traceback_text

WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"  # a variable that Ray Train hands on to its workers
GPUS_WITHIN = 1800.0  # seconds; a cloud takes minutes for a node
SECONDS_BETWEEN_LINES = 60.0


@contextlib.contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Connects to `ray.address` (or `$RAY_ADDRESS`), else starts a local Ray; ends that afterwards.

    Does nothing where this process is connected already; within `one_ray` what it starts stays.
    """
    # Before Ray is imported, which reads some of them then.
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "Set ray log level|Reporting training result")
    # Lines of progress are alike but for their numbers, which Ray would take for repetition.
    os.environ.setdefault("RAY_DEDUP_LOGS_ALLOW_REGEX", r"steps/s|steps in")
    if _kept is not None:
        _kept.start(config)
        yield
        return
    import ray

    if ray.is_initialized():
        yield
        return
    with _connected(config):
        yield


@contextlib.contextmanager
def one_ray() -> Iterator[OneRay]:
    """Makes the Ray sessions in the block one, which begins with the first of them and ends with the block.

    So a line of several stages starts Ray once, and not at all where there is nothing to compute. Within another
    such block it is that one.
    """
    global _kept
    if _kept is not None:
        yield _kept
        return
    _kept = OneRay()
    try:
        yield _kept
    finally:
        _kept.end()
        _kept = None


class OneRay:
    """The session of `one_ray`.

    Attributes:
        ours: whether it has begun, and this process was not connected before.
        ended: whether `end` was called.
    """

    def __init__(self) -> None:
        self.ours = self.ended = False
        self._lock, self._open = threading.Lock(), contextlib.ExitStack()

    def start(self, config: Config) -> None:
        """Begins, unless this process is connected already. Raises KeyboardInterrupt after `end`."""
        import ray

        with self._lock:
            if self.ended:
                raise KeyboardInterrupt
            if not ray.is_initialized():
                self._open.enter_context(_connected(config))
                self.ours = True

    def end(self) -> None:
        """Ends it. Other threads that begin something on Ray, or wait for training there, get KeyboardInterrupt."""
        with self._lock:
            self.ended = True
            self._open.close()


_kept: OneRay | None = None


def one_ray_has_ended() -> bool:
    """Whether the session of `one_ray` was ended within its block."""
    return _kept is not None and _kept.ended


@contextlib.contextmanager
def _connected(config: Config) -> Iterator[None]:
    import ray

    address = _address(config)
    # What Ray says of its own work at INFO would bury ours.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    options: dict[str, Any] = {
        "logging_level": logging.WARNING,
        "logging_config": ray.LoggingConfig(log_level="WARNING"),
    }
    # Ray's C++ core reports at ERROR that actors of Ray Data and Train keep their arguments in the
    # object store, for every one of them (ray#53727). Set the variable to see what it says.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # "local" and not None: a stale file of an earlier cluster must not decide where we run.
    # The dashboard stays on: without it, stopped Tune trials have been seen to leak their resources.
    if not address:
        options |= {"address": "local", "num_cpus": config.ray.num_cpus}
    else:
        options |= {"address": address}
    # Nobody takes the node of a Ray of our own away, which Train would watch for in a process of every run.
    unwatched = not address and WATCHER not in os.environ
    if unwatched:
        os.environ[WATCHER] = "0"
    try:
        ray.init(**options)
        from ray.data import DataContext

        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        for name in ("ray.data", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # "progress bars disabled"
        yield
    finally:
        ray.shutdown()
        if unwatched:
            del os.environ[WATCHER]


def _address(config: Config) -> str | None:
    """Of a cluster that is there; None for a Ray of our own."""
    return config.ray.address or os.environ.get("RAY_ADDRESS") or None


def gpus_to_use(config: Config) -> int:
    """GPUs of the connected cluster, once there are `ray.gpus` of them.

    Stages use what is there when they begin, so an autoscaling cluster is asked for as many first, and waited for.

    Raises:
        TimeoutError: they have not come in `GPUS_WITHIN` seconds.
    """
    wanted = config.ray.gpus
    if _cluster_gpus() < wanted:
        # A request that ends with this job, whatever ends it; `request_resources` would outlive it, and there is
        # but one of those in a cluster, which the next job's replaces.
        from ray.util import placement_group, remove_placement_group

        request = placement_group([{"GPU": 1}] * wanted)
        try:
            _await_gpus(wanted)
        finally:
            remove_placement_group(request)
    return _cluster_gpus()


def _await_gpus(count: int) -> None:
    began = said = time.monotonic()
    while (there := _cluster_gpus()) < count:
        now = time.monotonic()
        if now - began > GPUS_WITHIN:
            raise TimeoutError(
                f"ray.gpus: {there} of {count} GPUs are there after {GPUS_WITHIN:.0f} s; nearest valid: {there}"
            )
        if now - said > SECONDS_BETWEEN_LINES or said == began:
            said = now
            log(f"ray: waiting for GPUs, {there} of {count} are there")
        time.sleep(1)


def _cluster_gpus() -> int:
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def actor_options(config: Config, tasks: int) -> dict[str, Any]:
    """Resources and pool of actors that run a model over `tasks` rows: a GPU each where there are any."""
    import ray
    from ray.data import ActorPoolStrategy

    gpus = gpus_to_use(config)
    if gpus:
        return {"num_gpus": 1, "compute": ActorPoolStrategy(size=min(gpus, tasks))}
    cpus = config.ray.teacher_cpus
    most = _places(ray.cluster_resources().get("CPU", 1), cpus)
    return {"num_cpus": cpus, "compute": ActorPoolStrategy(size=min(most, tasks))}


def _places(total: float, cpus: float) -> int:
    """How many actors of `cpus` each may run at a time on `total` CPUs."""
    # Some CPU must stay free, or Ray Data waits for ever without a word.
    return max(1, int((total - 0.2) // cpus))


def _one_at_a_time(config: Config, task: Callable[..., Any] | type, count: int) -> bool:
    """Whether Ray would run `count` rows one by one, on this machine's CPU: then few clips cost no start of it."""
    if torch.cuda.is_available() or _address(config):
        return False
    ray, total = sys.modules.get("ray"), float(config.ray.num_cpus or os.cpu_count() or 1)
    if ray is not None and ray.is_initialized():
        if len(ray.nodes()) > 1 or _cluster_gpus():
            return False
        total = ray.cluster_resources().get("CPU", 1)
    places = _places(total, config.ray.teacher_cpus) if isinstance(task, type) else int(total)
    return min(places, count) <= 1


def map_tasks(
    config: Config,
    task: Callable[..., dict[str, Any]] | type,
    rows: Sequence[dict[str, Any]],
    *,
    arguments: Sequence[Any] = (),
) -> Iterator[dict[str, Any]]:
    """Runs a task over rows on Ray Data, each row by itself; yields what it returns as each is done.

    Where Ray would run one row at a time on this machine, they are run in this process, in their order.
    Ray runs a task again whose answer was lost with its node: a task that writes a file looks first whether it is
    there.

    Args:
        task: a function of a row and `arguments`, run on one CPU; or a class, made of `arguments` once a process, which
            holds a model and is called with each row: an actor (see `actor_options`), or on the CPUs of a local Ray a
            process that functions ran in before.
        rows: plain values, as JSON has them; so is what the task returns.

    Raises what the first task that fails has raised, with the traceback there as a note.
    """
    if not rows:
        return
    if _one_at_a_time(config, task, len(rows)):
        yield from _here(config, task, rows, arguments)
        return
    with ray_session(config):
        import ray

        lines = [{"row": json.dumps(row)} for row in rows]
        dataset = ray.data.from_items(lines, override_num_blocks=len(lines))
        function: Any
        if not isinstance(task, type):
            function = _named(task.__name__, task, arguments)
            done = dataset.map(function, num_cpus=1)
        elif _address(config) or gpus_to_use(config):
            options = actor_options(config, len(lines))
            actor: Any = type(task.__name__, (_Actor,), {})  # Ray's processes and dashboard show the name
            done = dataset.map(actor, fn_constructor_args=(task, arguments), **options)
        else:  # an actor is a new process, which imports again what those of functions have
            cpus = config.ray.teacher_cpus
            function = _named(task.__name__, _run_kept, (uuid.uuid4().hex, cpus, task, arguments))
            done = dataset.map(function, num_cpus=cpus)
        answers: Any = iter(done.iter_rows())
        with contextlib.closing(answers):  # so that an error ends the other tasks as well
            for line in answers:
                if line["error"]:
                    raise _unpacked(line["error"])
                yield json.loads(line["result"])


def _here(
    config: Config, task: Callable[..., Any] | type, rows: Sequence[dict[str, Any]], arguments: Sequence[Any]
) -> Iterator[dict[str, Any]]:
    """`map_tasks` in this process, on as many threads as Ray gives a task, so that the numbers are the same."""
    with _threads(config.ray.teacher_cpus if isinstance(task, type) else 1):
        run = task(*arguments) if isinstance(task, type) else lambda row: task(row, *arguments)
        for row in rows:
            yield json.loads(json.dumps(run(row)))


@contextlib.contextmanager
def _threads(cpus: float) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, int(cpus)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _named(
    name: str, task: Callable[..., Any], arguments: Sequence[Any]
) -> Callable[[dict[str, str]], dict[str, str]]:
    """`_run_task` of a task under a name, which Ray's processes and dashboard show."""

    def run(line: dict[str, str]) -> dict[str, str]:
        return _run_task(line, task, arguments)

    run.__name__ = run.__qualname__ = name
    return run


_kept_task: dict[str, Any] = {}  # in a process of Ray's: what was made of a class, by its call of `map_tasks`


def _run_kept(row: dict[str, Any], call: str, cpus: float, task: type, arguments: Sequence[Any]) -> Any:
    """A row of a task that is a class, of which a process makes one for all rows of a call that it gets."""
    with _threads(cpus):
        if call not in _kept_task:
            _kept_task.clear()
            _kept_task[call] = task(*arguments)
        return _kept_task[call](row)


def _run_task(line: dict[str, str], task: Callable[..., Any], arguments: Sequence[Any]) -> dict[str, str]:
    # An error is a result: one that is raised here comes back as Ray Data's own, which says nothing of its cause.
    try:
        return {"result": json.dumps(task(json.loads(line["row"]), *arguments)), "error": ""}
    except Exception as error:
        return {"result": "", "error": _packed(error)}


class _Actor:
    """What Ray Data runs of a task that is a class."""

    def __init__(self, task: type, arguments: Sequence[Any]) -> None:
        self._made, self._arguments = task, arguments
        self._task: Any = None

    def __call__(self, line: dict[str, str]) -> dict[str, str]:
        return _run_task(line, self._run, ())

    def _run(self, row: dict[str, Any]) -> Any:
        if self._task is None:  # made here, so that what fails in it is an error of the task
            self._task = self._made(*self._arguments)
        return self._task(row)


def _packed(error: Exception) -> str:
    """An error as text, in the form that Ray sends errors in; one that does not survive it becomes a RuntimeError."""
    note = f"In the worker:\n{traceback_text(error).rstrip()}"
    plain = RuntimeError(f"{type(error).__name__}: {error}")
    for sent in (error, plain):
        getattr(sent, "add_note", print)(note)  # Python 3.10 has no notes: it goes to the log
    text = _as_ray_sends(error)
    try:
        whole = str(_unpacked(text)) == str(error) and type(_unpacked(text)) is type(error)
    except Exception:  # whatever a library's own errors raise when they are made again
        whole = False
    return text if whole else _as_ray_sends(plain)


def _as_ray_sends(error: Exception) -> str:
    from ray.exceptions import RayTaskError

    return base64.b64encode(RayTaskError("task", "", error, "task", os.getpid(), "here").to_bytes()).decode()


def _unpacked(text: str) -> Exception:
    from ray.exceptions import RayError

    return RayError.from_bytes(base64.b64decode(text)).cause


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def arrow_filesystem(uri: str) -> Any:
    """What Ray Train and Tune take as `storage_filesystem`; None, which they understand, for a local path."""
    if not storage.is_remote(uri):
        return None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return PyFileSystem(FSSpecHandler(storage.filesystem(uri)[0]))
