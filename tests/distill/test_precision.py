"""What `precision: auto` chooses, that a run keeps it, and that it is said."""

import pytest
import torch
from training_runs import make_clips, make_config, student_run

from pipeline.distill import precision
from pipeline.distill.checkpoint import TrainingState, latest_checkpoint, load_checkpoint, save_checkpoint
from pipeline.distill.precision import choose_precision
from pipeline.distill.trainer import Hooks, NoLogger, Trainer

CPU = torch.device("cpu")


class Stopped(Exception):
    pass


@pytest.fixture
def cpu(monkeypatch):
    def fake(has, times_as_fast):
        monkeypatch.setattr(precision, "has_bf16", lambda: has)
        monkeypatch.setattr(precision, "speedup_of_bf16", lambda: times_as_fast)

    return fake


@pytest.mark.parametrize(
    ("has", "times_as_fast", "chosen"),
    [(True, 3.4, "bf16"), (True, 0.5, "fp32"), (True, 1.1, "fp32"), (False, 3.0, "fp32")],
)
def test_auto_asks_the_cpu_and_times_it(cpu, has, times_as_fast, chosen):
    cpu(has, times_as_fast)
    assert choose_precision("auto", CPU) == chosen
    assert choose_precision("bf16", CPU) == "bf16"
    assert choose_precision("fp32", CPU) == "fp32"


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_is_bf16_on_gpus_from_ampere_on(monkeypatch, capability, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", torch.device("cuda")) == chosen


def test_this_cpu_is_timed_once():
    precision.speedup_of_bf16.cache_clear()
    assert precision.speedup_of_bf16() > 0
    assert precision.speedup_of_bf16() == precision.speedup_of_bf16()


class Tags(NoLogger):
    def __init__(self):
        self.said = {}

    def tag(self, key, value):
        self.said[key] = value


def test_a_run_goes_on_in_the_precision_that_it_began_in(cpu, tmp_path):
    clips = make_clips(tmp_path / "clips")
    config = make_config(tmp_path, "distill.method=no_kd", "distill.checkpoint_every=6")

    def stop_at_12(step):
        if step == 12:
            raise Stopped

    cpu(True, 4.0)
    unbroken = Trainer(student_run(config, f"{tmp_path}/unbroken", clips)).train()
    with pytest.raises(Stopped):
        Trainer(
            student_run(config, f"{tmp_path}/stopped", clips), hooks=Hooks(after_checkpoint=stop_at_12)
        ).train()
    cpu(False, 0.5)  # on another machine
    logger = Tags()
    resumed = Trainer(student_run(config, f"{tmp_path}/stopped", clips), logger=logger).train()
    assert resumed.precision == unbroken.precision == logger.said["precision"] == "bf16"
    assert resumed.history == unbroken.history


def test_a_checkpoint_that_does_not_say_was_of_fp32(cpu, tmp_path):
    clips = make_clips(tmp_path / "clips")
    run = student_run(make_config(tmp_path, "distill.method=no_kd"), f"{tmp_path}/run", clips)
    cpu(True, 4.0)
    earlier = Trainer(run)
    save_checkpoint(run.uri, earlier.objective, earlier.optimizer, TrainingState(4, []), keep=2)
    assert load_checkpoint(latest_checkpoint(run.uri), earlier.objective, earlier.optimizer).precision is None
    assert Trainer(run).train().precision == "fp32"


def test_both_precisions_learn_alike(tmp_path):
    """200 steps: the losses of bf16 and fp32 are closer than those of seeds."""
    clips = make_clips(tmp_path / "clips")

    def final(seed, chosen):
        overrides = (f"distill.seed={seed}", f"distill.precision={chosen}", "distill.steps=200")
        config = make_config(tmp_path, "distill.method=no_kd", *overrides)
        return Trainer(student_run(config, f"{tmp_path}/{chosen}{seed}", clips)).train().history[-1]["total"]

    exact = [final(seed, "fp32") for seed in (1, 2, 3)]
    rounded = final(1, "bf16")
    assert abs(rounded - exact[0]) < max(exact) - min(exact)
