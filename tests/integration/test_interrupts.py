"""Ctrl-C ends every stage within seconds, with a line that says how to go on, and leaves no MLflow run open."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers import GOLDEN_TEACHER, command_line, is_alive, wait_for

from pipeline import tracking
from pipeline.distill.students import NO_KD, SLOTMATCH

# Making the clips and a student takes a minute, and several where the machine is busy.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ENDLESS = ["distill.steps=100000", "teacher.train.steps=100000", "ray.num_cpus=3"]
SWEEP = [*ENDLESS, "distill.method=no_kd", "sweep.grid={distill.learning_rate: [0.001]}", "sweep.seeds=[1]"]
ENDED = "ends in seconds, says how to go on, no MLflow run stays open"
# Several tasks at a time, as one alone runs in the driver.
TASKS = ["clips.videos_per_shard=1", "ray.teacher_cpus=0.8"]
STUDENT = ["distill.method=no_kd", "evaluate.teacher=false", "ray.num_cpus=3"]


def heed_interrupts():
    """As at a terminal; what a script runs in the background ignores them, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Running:
    """A job as a terminal starts it: the leader of a process group of its own."""

    def __init__(self, stage, config, folder, settings):
        self.stage, self._errors, path = stage, folder / "errors.log", folder / "config.yaml"
        path.write_text(config.to_yaml())
        with open(self._errors, "wb") as errors:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", f"jobs.{stage}", str(path), *settings],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
                preexec_fn=heed_interrupts,
            )

    def errors(self):
        return self._errors.read_text()

    def says(self, text):
        assert self.popen.poll() is None, self.errors()
        return text in self.errors()

    def works(self):
        """Whether a task of Ray Data is at work."""
        assert self.popen.poll() is None, self.errors()
        return any("ray::Map" in command_line(p) for p in self.family())

    def family(self):
        return psutil.Process(self.popen.pid).children(recursive=True)


@pytest.fixture(scope="module")
def clips(shared_tiny, tmp_path_factory):
    """The config of a root that has its clips and a finished student."""
    config = shared_tiny(*TASKS)
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(config.to_yaml())
    for stage in ("shard", "distill"):
        command = [sys.executable, "-m", f"jobs.{stage}", str(path), *STUDENT]
        subprocess.run(command, check=True, timeout=280, capture_output=True)
    return config


@pytest.fixture
def start(clips, tmp_path):
    started = []

    def start(stage, *settings):
        started.append(Running(stage, clips, tmp_path, settings))
        return started[-1]

    yield start
    for job in started:
        if job.popen.poll() is None:
            for process in job.family():
                process.kill()
            job.popen.kill()


def check_interrupt(job, config, *, group):
    """Sends Ctrl-C, to the whole group as a terminal does, and looks at the end and at what is left."""
    family = [p for p in job.family() if "agent" not in command_line(p).lower()]
    began = time.monotonic()
    if group:
        os.killpg(job.popen.pid, signal.SIGINT)
    else:
        job.popen.send_signal(signal.SIGINT)
    out, _ = job.popen.communicate(timeout=60)
    seconds = time.monotonic() - began
    errors = job.errors()
    assert job.popen.returncode == 1, errors
    assert json.loads(out.splitlines()[-1])["status"] == "interrupted", errors
    assert errors.rstrip().endswith(f"{job.stage}: interrupted; run it again to go on")
    assert seconds < 30
    client = tracking.connect(config)
    runs = client.search_runs([tracking.experiment_id(config)])
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED", "FAILED"}
    wait_for(lambda: not any(is_alive(process) for process in family), 30)


@pytest.mark.fault(fault="Ctrl-C in a training of one process", stage="distill, teacher", checked=ENDED)
@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
@pytest.mark.parametrize("stage", ["distill", "teacher"])
def test_a_training(start, clips, stage, group):
    job = start(stage, *ENDLESS, "distill.method=no_kd", f"distill.seed={2 + group}")
    wait_for(lambda: job.says("steps/s"))
    check_interrupt(job, clips, group=group)


@pytest.mark.fault(fault="Ctrl-C in a training on Ray", stage="distill", checked=ENDED)
@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
def test_a_training_on_ray(start, clips, group):
    job = start("distill", *ENDLESS, "distill.method=no_kd", "distill.workers=1", f"distill.seed={4 + group}")
    wait_for(lambda: job.says("steps/s"), 240)
    check_interrupt(job, clips, group=group)


@pytest.mark.fault(fault="Ctrl-C in a sweep", stage="sweep", checked=ENDED)
@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_sweep(start, clips, workers, group):
    job = start("sweep", *SWEEP, f"distill.workers={workers}", "distill.cpus_per_worker=1")
    wait_for(lambda: job.says("steps/s"), 240)
    check_interrupt(job, clips, group=group)


@pytest.mark.fault(fault="Ctrl-C in the training of two students at once", stage="pipeline", checked=ENDED)
@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
def test_students_that_train_together(start, clips, group):
    # Targets of their own: those of below are to be made there.
    together = [
        *ENDLESS,
        *GOLDEN_TEACHER,
        "targets.views=3",
        "distill.workers=1",
        f"distill.seed={6 + group}",
    ]
    job = start("pipeline", *together)
    wait_for(
        lambda: all(re.search(rf"\({name}\): \d+/\d+ steps", job.errors()) for name in (NO_KD, SLOTMATCH)),
        240,
    )
    check_interrupt(job, clips, group=group)
    runs = tracking.connect(clips).search_runs([tracking.experiment_id(clips)])
    assert {run.info.status for run in runs if run.data.tags.get("seed") == str(6 + group)} == {"KILLED"}


@pytest.mark.fault(
    fault="Ctrl-C in tasks on Ray Data", stage="cache, evaluate, register, pipeline", checked=ENDED
)
@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("cache", GOLDEN_TEACHER),
        ("evaluate", STUDENT),
        ("register", STUDENT),
        ("pipeline", GOLDEN_TEACHER),
    ],
)
def test_tasks_on_ray_data(start, clips, stage, settings, group):
    job = start(stage, *settings, "ray.num_cpus=3")
    wait_for(job.works, 240)
    check_interrupt(job, clips, group=group)
