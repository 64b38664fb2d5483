"""What the stage `rivals` is to train, and its table: what is there, what is not, and what each costs."""

from types import SimpleNamespace

import numpy as np
import pytest
from clip_sets import make_clip_set
from places import CONFIGS
from tiny_models import tiny_model

from pipeline.artifacts.manifests import Rules, RunManifest
from pipeline.config import ConfigError, load_config, resolve_config
from pipeline.evaluate.records import Evaluation
from pipeline.evaluate.subjects import run_subject
from pipeline.models import save_slot_model
from pipeline.report.efficiency import count_macs
from pipeline.sweep.rivals import Entry, rival_table
from pipeline.sweep.settings import plan_rivals

LEVELS = ("image_fg_ari", "image_mbo", "video_fg_ari", "video_mbo")


def demo(*overrides):
    return load_config(CONFIGS / "demo.yaml", overrides, presets=[CONFIGS / "systems" / "demo_rivals.yaml"])


def test_every_system_from_every_seed_with_its_own_clips():
    plan = plan_rivals(demo())
    titles = ["SAVi", "STEVE", "SOLV", "DIOD (uses motion)"]
    assert [r.title for r in plan] == [f"{title}, seed {seed}" for seed in range(3) for title in titles]
    assert [r.config.clips.clip_frames for r in plan[:4]] == [4, 3, 8, 5]
    assert [r.config.teacher.train.seed for r in plan[::4]] == [0, 1, 2]
    assert all(r.wanted for r in plan)


def test_what_to_train_now():
    plan = plan_rivals(demo("rivals.train=[solv,diod:1]"))
    assert len(plan) == 12, "the table has them all"
    assert {(r.system, r.seed) for r in plan if r.wanted} == {
        *(("solv", seed) for seed in range(3)),
        ("diod", 1),
    }
    assert not any(r.wanted for r in plan_rivals(demo("rivals.train=[]")))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rivals.train=[solve]", "'solve' is none of savi, steve, solv, diod, diod:0"),
        ("rivals.train=[solv:7]", "'solv:7' is none of"),
        ("rivals.systems={mine: configs/systems/nowhere.yaml}", "rivals.systems.mine: .*No such file"),
        ("rivals.systems={none: configs/methods/no_kd.yaml}", "rivals.systems.none: .* trains no teacher"),
        ("rivals.systems={}", "rivals.systems: is empty"),
        ("rivals.seeds=[1, 1]", "rivals.seeds: 1 is there twice"),
        ("evaluate.split=", "evaluate.split: is not set"),
    ],
)
def test_what_can_not_be_compared(override, message):
    with pytest.raises(ConfigError, match=message):
        plan_rivals(demo(override))


def evaluation(score):
    rules = Rules(name="slotcontrast", fingerprint="f", warnings=("FG-ARI says nothing here.",))
    return Evaluation("uri", dict.fromkeys(LEVELS, score), rules, 2)


def test_the_table_has_means_costs_and_what_is_missing(tmp_path, monkeypatch):
    model = tiny_model(image_size=16)
    subjects = {}
    for seed in (0, 1):
        run = tmp_path / f"run{seed}"
        save_slot_model(model, run / "model")
        RunManifest(kind="teacher", mlflow_run=f"mlflow{seed}", steps=1500).publish(str(run))
        subjects[f"SAVi, seed {seed}"] = run_subject(str(run))
    # MLflow's frames a second, of steps of 8 frames: 2 and 4 seconds a step, and 3.
    speeds = {"mlflow0": [4.0, 2.0], "mlflow1": [8 / 3]}
    history = lambda run, key: [SimpleNamespace(value=v) for v in speeds[run] if key == "frames_per_second"]  # noqa: E731
    client = SimpleNamespace(get_metric_history=history)
    monkeypatch.setattr("pipeline.sweep.rivals.tracking.connect", lambda config: client)
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    clips = make_clip_set(tmp_path / "clips", {"a": (frames, None)})
    entries = [Entry("SAVi", subjects, 3, 8), Entry("STEVE", {}, 3, 12)]
    found = {"grid": evaluation(0.1), "SAVi, seed 0": evaluation(0.3), "SAVi, seed 1": evaluation(0.5)}
    table = rival_table(resolve_config({}), clips, entries, found)
    rows = {row.cells[0].text: [cell.text for cell in row.cells[1:]] for row in table.rows}
    assert list(rows) == ["SAVi", "STEVE", "grid"]
    assert rows["SAVi"][:3] == ["2", "1,500", "3.00"]
    assert float(rows["SAVi"][3]) == pytest.approx(model.num_parameters() / 1e6, rel=0.01)
    counted = count_macs(model.config, 5, fast_decoder=True).products / 5 / 1e9
    assert float(rows["SAVi"][4]) == pytest.approx(counted, rel=0.01), "as Table 2 counts"
    assert rows["SAVi"][5:] == ["40.0 ± 14.14 (n=2)"] * 4
    assert rows["STEVE"] == ["–"] * 9
    assert rows["grid"] == ["–"] * 5 + ["10.0"] * 4
    assert table.notes[0] == "Not trained yet: SAVi, 1 of 3 seeds; STEVE, 3 of 3 seeds."
    assert table.notes[-1] == "FG-ARI says nothing here."
