"""Refactoring changes no loss: the curves of short seeded runs of every kind are those that were recorded."""

import json
import re
from pathlib import Path

import pytest
import torch
from places import GOLDEN
from training_runs import make_clips, make_config, make_targets, student_run

from pipeline.distill.run import Run
from pipeline.distill.trainer import Trainer

RECORDED = json.loads((GOLDEN / "losses.json").read_text())
SAME_STEPS = 8
# As recorded: `auto` would choose bf16 on a CPU that is fast in it.
EXACT = ("teacher.train.precision=fp32", "distill.precision=fp32")
METHODS = ("slotmatch", "no_kd", "slotmatch_hungarian", "slotmatch_reconstruction_kd", "feature_kd")


def machine():
    """What decides the rounding, as far as a file can tell."""
    path = Path("/proc/cpuinfo")
    said = dict(re.findall(r"^(.+?)\s*: (.*)$", path.read_text() if path.exists() else "", re.MULTILINE))
    names = [said.get(key, "?") for key in ("model name", "cpu family", "model", "stepping")]
    cpu = f"{names[0]}, family {names[1]} model {names[2]} stepping {names[3]}"
    return {"torch": torch.__version__, "cpu": f"{cpu}, {torch.backends.cpu.get_cpu_capability()}"}


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """Of each run the total loss and the gradient's norm at every step."""
    root = tmp_path_factory.mktemp("runs")
    clips, runs = make_clips(root / "clips"), str(root)
    histories = {
        "teacher": Trainer(Run.teacher(make_config(root, *EXACT), f"{runs}/teacher", clips)).train().history
    }
    teacher = f"{runs}/teacher/model"
    targets = make_targets(make_config(root, *EXACT), clips, teacher, f"{runs}/targets")
    for method in METHODS:
        taught = {} if method == "no_kd" else {"teacher_uri": teacher, "targets_uri": targets}
        run = student_run(
            make_config(root, *EXACT, f"distill.method={method}"), f"{runs}/{method}", clips, **taught
        )
        histories[method] = Trainer(run).train().history
    config = make_config(root, *EXACT, "distill.live_teacher=true", "distill.fresh_views=true")
    histories["live"] = (
        Trainer(student_run(config, f"{runs}/live", clips, teacher_uri=teacher)).train().history
    )
    return {name: [[row["total"], row["gradient_norm"]] for row in h] for name, h in histories.items()}


@pytest.mark.parametrize("name", RECORDED["curves"])
def test_the_losses_are_those_that_were_recorded(curves, name):
    """To the last bit on the machine that recorded them; on others until rounding has grown."""
    recorded = RECORDED["curves"][name]
    if machine() == RECORDED["machine"]:
        assert curves[name] == recorded
    torch.testing.assert_close(
        torch.tensor(curves[name][:SAME_STEPS]), torch.tensor(recorded[:SAME_STEPS]), rtol=1e-3, atol=0
    )
