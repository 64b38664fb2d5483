"""Sweeps on a real Ray Tune: what they end with, and that nothing is trained twice whatever is killed."""

from pathlib import Path

import pytest
from helpers import GOLDEN_TEACHER, kill_with_family, resumed_from, wait_for

from pipeline import storage, tracking
from pipeline.clips.library import artifacts_of
from pipeline.clips.stage import shard, shard_split
from pipeline.config import with_overrides
from pipeline.distill.stage import distill
from pipeline.sweep.runs import PARENT_TAG
from pipeline.sweep.settings import plan_trials
from pipeline.sweep.stage import SweepFailed, sweep

pytestmark = pytest.mark.usefixtures("not_exported")
BASE = [*GOLDEN_TEACHER, "evaluate.baselines=false"]


def file_times(runs):
    """When each published model was written, by its run."""
    return {r: Path(r, "model/model.safetensors").stat().st_mtime_ns for r in runs if storage.is_complete(r)}


def runs_of(config):
    shard_split(config, config.dataset.split)
    return {t.title: artifacts_of(t.config).student.uri for t in plan_trials(config)}


def run_folders(config):
    """The run folder of a setting by its name, found once the targets are there."""
    found = {}

    def run(name):
        if not found:
            found.update({title.rpartition(", seed")[0]: uri for title, uri in runs_of(config).items()})
        return found[name]

    return run


def mlflow_runs(config, query):
    client = tracking.connect(config)
    return client.search_runs([tracking.experiment_id(config)], query)


def test_two_betas_from_two_seeds(tiny, local_ray, capfd):
    config = tiny(*BASE, "sweep.grid={distill.beta: [0.1, 0.5]}", "sweep.seeds=[0, 1]")
    summary = sweep(config)
    assert summary["trials"] == {"finished": 4, "failed": 0, "stopped": 0, "reused": 0}
    out, err = capfd.readouterr()
    assert "beta = 0.1, seed 1 begins" in err
    assert "4 of 4 ended" in err
    assert out.count("(n=2)") == 8, "mean ± std of four scores for two settings"
    folder = Path(summary["uri"])
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "| beta = 0.5 | 2 of 2 |" in (folder / "table.md").read_text()
    assert "| teacher |" in (folder / "table.md").read_text()
    manifest = storage.read_manifest(summary["uri"], kind="sweep")
    assert manifest["best"]["setting"] == summary["best"]["setting"]

    (parent,) = mlflow_runs(config, "tags.role = 'sweep'")
    assert parent.info.status == "FINISHED"
    assert parent.data.params["best.setting"] == summary["best"]["setting"]
    mean = summary["means"][summary["best"]["setting"]]["video_mbo"]
    assert parent.data.metrics["video_mbo"] == pytest.approx(mean)
    files = {f.path for f in tracking.connect(config).list_artifacts(parent.info.run_id)}
    assert {"table.md", "table.csv", "scores.json", "plot.png"} <= files
    children = mlflow_runs(config, f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'")
    assert {r.info.run_name for r in children} == set(summary["versions"])
    assert {r.info.status for r in children} == {"FINISHED"}

    assert sorted(summary["versions"].values()) == [1, 2, 3, 4]
    alias = tracking.connect(config).get_model_version_by_alias("slotmatch", "champion")
    best = f"{summary['best']['setting']}, seed {summary['best']['seed']}"
    assert int(alias.version) == summary["versions"][best]
    assert alias.tags["sweep.setting"] == summary["best"]["setting"]
    assert float(alias.tags["sweep.mean"]) == pytest.approx(mean, abs=1e-5)

    # Once more: nothing is made again.
    times = file_times(runs_of(config).values())
    again = sweep(config)
    assert again["trials"] == {"finished": 4, "failed": 0, "stopped": 0, "reused": 4}
    assert again["versions"] == summary["versions"]
    assert len(mlflow_runs(config, "tags.role = 'sweep'")) == 1
    assert file_times(runs_of(config).values()) == times

    # A variant more: its targets are made, and the student that is there already is not trained again.
    variants = {"beta 0.1": {"distill.beta": 0.1}, "K = 2": {"targets.views": 2, "distill.beta": 0.1}}
    more = with_overrides(config, {"sweep.variants": variants, "sweep.seeds": [0]})
    capfd.readouterr()
    both = sweep(more)
    assert both["trials"] == {"finished": 2, "failed": 0, "stopped": 0, "reused": 1}
    assert "1 of 2 trials have ended before and are not run again: beta 0.1, seed 0" in capfd.readouterr().err
    assert file_times(times) == times


@pytest.mark.slow
@pytest.mark.timeout(900)  # two starts of Ray, on machines that may be busy
@pytest.mark.fault("SIGKILL of the Tune driver", "sweep", "run again, it trains only what had not ended")
def test_a_sweep_whose_driver_is_killed_goes_on(tiny, job):
    variants = {"short": {"distill.steps": 10}, "long": {"distill.steps": 400}, "last": {"distill.steps": 9}}
    settings = [*BASE, "sweep.seeds=[0]", "distill.checkpoint_every=20", "ray.num_cpus=2"]
    config = with_overrides(tiny(*settings), {"sweep.variants": variants})
    run = run_folders(config)
    process = job("sweep", config)

    def half_way():
        text = process.error_output()
        assert process.popen.poll() is None, text
        checkpoints = Path(run("long"), "checkpoints") if "begins" in text else Path("nowhere")
        return "short, seed 0 finished" in text and list(checkpoints.glob(f"*/{storage.MANIFEST}"))

    wait_for(half_way, 400)
    kill_with_family(process)
    done = {name for name in variants if storage.is_complete(run(name))}
    assert "short" in done
    assert "long" not in done, "too little work to be killed half-way"
    written = {p: p.stat().st_mtime_ns for name in done for p in Path(run(name)).rglob("*")}

    last = job("sweep", config)
    summary = last.finish()
    text = last.error_output()
    assert summary["trials"] == {"finished": 3, "failed": 0, "stopped": 0, "reused": len(done)}
    (line,) = [line for line in text.splitlines() if "are not run again" in line]
    for name in done:
        assert f"{name}, seed 0" in line
        assert f"{name}, seed 0 begins" not in text
    assert {p: p.stat().st_mtime_ns for p in written} == written
    assert max(resumed_from(text)) >= 20, "the one that was interrupted goes on from its checkpoint"
    assert not mlflow_runs(config, "attributes.status = 'RUNNING'")
    (parent,) = mlflow_runs(config, "tags.role = 'sweep'")
    assert len(mlflow_runs(config, f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'")) == 3


def test_asha_stops_what_learns_nothing(tiny, local_ray, capfd):
    settings = ["sweep.grid={distill.learning_rate: [3e-3, 1e-9]}", "sweep.seeds=[0]", "sweep.asha=true"]
    settings += ["sweep.max_concurrent=1", "sweep.grace_steps=20", "sweep.reduction_factor=2"]
    config = tiny(*BASE, *settings, "distill.steps=60", "distill.validate_every=20")
    summary = sweep(config)
    err = capfd.readouterr().err
    assert summary["trials"]["stopped"] == 1, err
    assert "learning_rate = 1e-09, seed 0 stopped early after step" in err
    run = runs_of(config)["learning_rate = 1e-09, seed 0"]
    assert not storage.is_complete(run)
    # By these ASHA judges the others when the sweep is started again.
    records = [storage.read_json(str(path)) for path in Path(summary["uri"], "trials").iterdir()]
    records = {record["status"]: record for record in records}
    assert [row["step"] for row in records["finished"]["validations"]] == [20, 40]
    assert 20 in [row["step"] for row in records["stopped"]["validations"]]
    (stopped,) = mlflow_runs(config, "attributes.status = 'KILLED'")
    assert stopped.info.run_name == "learning_rate = 1e-09, seed 0"
    again = sweep(config)
    assert again["trials"] == {"finished": 1, "failed": 0, "stopped": 1, "reused": 2}
    assert not storage.is_complete(run), "it is not run again"


@pytest.mark.parametrize(("error", "status"), [(SystemExit, "KILLED"), (ZeroDivisionError, "FAILED")])
def test_a_training_that_tune_exits_ends_its_run_as_killed(tiny, local_ray, error, status):
    """Tune leaves a stopped trial's process to end by itself, after the sweep's own mark or before it."""

    def stop(step, scores):
        raise error

    config = tiny(*BASE, "distill.method=no_kd", "distill.validate_every=4")
    shard(config)
    with pytest.raises(error):
        distill(config, on_validation=stop)
    (run,) = mlflow_runs(config, "tags.role = 'student'")
    assert run.info.status == status


@pytest.mark.slow
def test_train_workers_inside_of_tune_and_a_trial_that_fails(tiny, local_ray, capfd):
    variants = {
        "good": {"distill.beta": 0.1},
        "hopeless": {"distill.learning_rate": 1e30, "distill.gradient_clip": 1e30, "distill.warmup_steps": 3},
    }
    config = tiny(*BASE, "sweep.seeds=[0]", "distill.workers=1", "distill.validate_every=4")
    config = with_overrides(config, {"sweep.variants": variants})
    summary = sweep(config)
    assert summary["trials"] == {"finished": 1, "failed": 1, "stopped": 0, "reused": 0}
    out, err = capfd.readouterr()
    assert "hopeless, seed 0 FAILED: NonFiniteLoss" in err
    assert "hopeless, seed 0 failed: NonFiniteLoss" in out
    assert "NonFiniteLoss" in summary["failed"]["hopeless, seed 0"]
    assert summary["best"]["setting"] == "good"
    shard_split(config, "")
    good = plan_trials(config)[0]
    assert distill(good.config)["reused"], "the same run as that of jobs.distill"
    again = sweep(config)
    assert again["trials"] == {"finished": 1, "failed": 1, "stopped": 0, "reused": 2}

    alone = with_overrides(config, {"sweep.variants": {"hopeless": variants["hopeless"]}})
    with pytest.raises(SweepFailed, match="hopeless, seed 0: NonFiniteLoss"):
        sweep(alone)
