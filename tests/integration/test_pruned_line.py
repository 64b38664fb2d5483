"""What can go after a real line, and that all still works without it."""

import json
from pathlib import Path

import pytest
from students import evaluation, make_finished_run

from jobs._main import run as run_job
from jobs.prune import JOB
from pipeline import storage, tracking
from pipeline.artifacts.once import INPUTS_FILE
from pipeline.clips.library import artifacts_of
from pipeline.config import with_overrides
from pipeline.distill.stage import distill
from pipeline.distill.students import students_of
from pipeline.evaluate.stage import evaluate
from pipeline.line import run
from pipeline.registry.lineage import trace
from pipeline.registry.prune import prune as prune_now
from pipeline.registry.stage import pull, register_run
from pipeline.sweep.stage import sweep

CHAMPION = "models:/slotmatch@champion"


@pytest.fixture
def prune(tmp_path, capsys):
    def prune(config, *options):
        path = tmp_path / "config.yaml"
        path.write_text(config.to_yaml())
        capsys.readouterr()
        assert run_job(JOB, [str(path), "--older-than", "0", *options]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return prune


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_after_a_line_only_another_student_and_checkpoints_can_go(tiny, local_ray, prune, tmp_path):
    config = tiny()
    first = run(config)
    # What the config alone would train is a student of another name than the line's; it is this config's own.
    distill(config)
    other = distill(with_overrides(config, {"distill.seed": 7}))["uri"]
    listed = prune(config)
    assert set(listed["kinds"]) == {"students", "checkpoints"}
    assert [item["path"] for item in listed["list"] if item["kind"] == "students"] == [other]
    assert listed["kinds"]["students"]["bytes"] == sum(f.size for f in storage.list_files(other))
    assert listed["kinds"]["checkpoints"]["items"] == 4, "of the teacher and three students"
    assert Path(other).exists()
    assert listed["unknown"] == []

    deleted = prune(config, "--delete")
    assert deleted["bytes"] == listed["bytes"]
    assert not Path(other).exists()
    assert prune(config)["items"] == 0
    for version in first["versions"]:
        assert trace(f"models:/slotmatch/{version}", config.tracking_uri).missing == []
    pull(CHAMPION, tmp_path / "pulled", config.tracking_uri)
    for named in students_of(config).values():
        scores = evaluate(named)["scores"]
        assert first["scores"][named.distill.name].items() <= scores.items()
    second = run(config)
    assert all(second["reused"].values())
    assert second["scores"] == first["scores"]
    assert distill(with_overrides(config, {"distill.seed": 7}))["uri"] == other, "it is made again"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_unfinished_student_and_sweep_of_the_config_stay(tiny, local_ray, prune):
    config = tiny("sweep.grid={distill.beta: [0.1, 0.2]}", "sweep.seeds=[1]", "sweep.register_students=false")
    run(config)
    uri = sweep(config)["uri"]
    assert not [item for item in prune(config)["list"] if item["kind"] != "checkpoints"], "it is finished"
    storage.delete(storage.join(uri, storage.MANIFEST))
    inputs = storage.read_json(storage.join(uri, INPUTS_FILE))
    assert sum("/students/" in one for one in inputs) == 2
    assert all(storage.exists(one) for one in inputs)
    assert not [item for item in prune(config)["list"] if item["kind"] != "checkpoints"]
    student = artifacts_of(config).student.uri
    storage.write_bytes(storage.join(student, "checkpoints", "step_00000004", "x"), b"")
    assert student not in [item["path"] for item in prune(config)["list"]]
    another = with_overrides(config, {"sweep.seeds": [2], "distill.seed": 3})
    assert student in [item["path"] for item in prune(another)["list"]]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_superseded_version_leaves_a_server_with_its_files(tiny, tmp_path, mlflow_server):
    config = tiny(f"mlflow.tracking_uri={mlflow_server.uri}", "mlflow.model_name=pruned")
    runs = [make_finished_run(config, str(tmp_path / "root" / "students" / (digit * 16))) for digit in "ab"]
    for run_uri, score in zip(runs, (0.5, 0.4), strict=True):
        register_run(config, run_uri, evaluation(score))
    client = tracking.connect(config)
    models = {v.version: v.tags["logged_model"] for v in client.search_model_versions("name = 'pruned'")}
    assert all(map(client.list_logged_model_artifacts, models.values()))
    found = prune_now(config, lambda config: runs, delete=True, older_than=0, versions=True)
    assert {kind: n["items"] for kind, n in found["kinds"].items()} == {
        "registered versions": 1,
        "models in MLflow": 1,
    }
    assert [v.version for v in client.search_model_versions("name = 'pruned'")] == ["1"]
    assert client.list_logged_model_artifacts(models["1"])
    assert not client.list_logged_model_artifacts(models["2"])
    pull("models:/pruned@champion", tmp_path / "pulled", config.tracking_uri)
