"""The way from a stage's module to what it runs: declarations, and few calls."""

import inspect
import json
import pkgutil
import sys
import traceback
from pathlib import Path

import pytest
from training_runs import make_clips, make_config

from jobs._main import STAGES, find_job, parse, run
from pipeline.clips.library import artifacts_of

ROOT = Path(__file__).parents[2]
MODEL = "models:/m/1"
WORDS = {
    "pull": [MODEL, "DIR"],
    "lineage": [MODEL],
    "export": [MODEL, "OUT"],
    "relocate": ["/old"],
    "segment": ["a.mp4", "model=m", "out=x"],
}
PRESETS = ("sweeps/evidence.yaml", "systems/demo_rivals.yaml")
CONFIGS = [str(ROOT / "configs" / name) for name in ("demo.yaml", *PRESETS)]


def test_a_stages_module_only_declares_it():
    modules = {path.stem: path for path in ROOT.glob("jobs/[a-z]*.py")}
    assert set(modules) == set(STAGES)
    assert {stage: n for stage in STAGES if (n := len(modules[stage].read_text().splitlines())) > 80} == {}


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_job_names_is_there_and_takes_the_words_and_options(stage):
    call = parse(stage, WORDS.get(stage, CONFIGS))
    for named in (call.job.stage, call.job.check):
        if named is not None:
            function = pkgutil.resolve_name(named) if isinstance(named, str) else named
            inspect.signature(function).bind(call.config, **call.arguments)


def test_the_gradient_is_six_calls_below_the_command_line(tmp_path, monkeypatch, capsys):
    from pipeline.distill import stage, trainer

    clips, step, ways = make_clips(tmp_path / "clips"), trainer.training_step, []

    def training_step(*arguments, **options):
        frames = [frame.f_code for frame, _ in traceback.walk_stack(sys._getframe())]
        ways.append([code.co_name for code in frames[: frames.index(run.__code__)]])
        return step(*arguments, **options)

    monkeypatch.setattr(trainer, "training_step", training_step)
    monkeypatch.setattr(stage, "artifacts_of", lambda config: artifacts_of(config, clips))
    config = tmp_path / "tiny.yaml"
    config.write_text(make_config(tmp_path, "distill.method=no_kd").to_yaml())
    assert run(find_job("distill"), [str(config), "distill.steps=2", "distill.warmup_steps=1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 2
    assert len(ways) == 2
    assert max(map(len, ways)) <= 6, ways[0]
