"""The whole line on a tiny data set, twice: the second run finds everything made."""

import mlflow
import numpy as np
import pytest

from pipeline import tracking
from pipeline.artifacts.manifests import RunManifest
from pipeline.compute import OneRay
from pipeline.distill.students import NO_KD, SLOTMATCH
from pipeline.evaluate.scoring import SCORES
from pipeline.line import run
from pipeline.models import load_slot_model
from pipeline.registry.lineage import trace
from pipeline.report.stage import report


@pytest.mark.timeout(900)
def test_from_videos_to_a_champion_and_again(tiny, local_ray, tmp_path, capsys, monkeypatch):
    config = tiny("distill.workers=auto")
    first = run(config)
    assert first["videos"] == 10
    assert not any(first["reused"].values())
    assert set(first["scores"]) == {"one slot", "grid", "colour k-means", "teacher", NO_KD, SLOTMATCH}
    for scores in first["scores"].values():
        assert all(-1 <= scores[name] <= 1 for name in SCORES)
    assert first["scores"]["one slot"]["video_fg_ari"] == pytest.approx(0, abs=1e-9)
    printed = capsys.readouterr().out
    for name in first["scores"]:
        assert name in printed
    assert "mlflow ui" in printed

    mlflow.set_tracking_uri(config.tracking_uri)
    champion = mlflow.pyfunc.load_model("models:/slotmatch@champion")
    frames = np.random.default_rng(0).integers(0, 256, (5, 30, 40, 3), dtype=np.uint8)
    labels = champion.predict(frames)
    assert labels.shape == (5, 30, 40)
    assert labels.max() < 4
    with pytest.raises(mlflow.exceptions.MlflowException, match="schema"):
        champion.predict(frames.astype(np.float64))

    pulled = load_slot_model(tmp_path / "root" / "demo" / "champion")
    *_, (_, _, masks) = pulled.stream([frames])
    np.testing.assert_array_equal(pulled.label_maps(masks, (30, 40)).numpy(), labels)

    assert trace("models:/slotmatch@champion", config.tracking_uri).missing == []
    origins = [trace(f"models:/slotmatch/{version}", config.tracking_uri) for version in first["versions"]]
    origin = next(o for o in origins if o.run["method"] == "slotmatch")  # the other one has no teacher
    assert origin.missing == []
    assert origin.targets["uri"] == first["targets"]
    assert origin.clips["dataset"]["kind"] == "synthetic"
    assert len(origin.clips["video_ids"]) == 10
    assert len(origin.evaluation_clips["video_ids"]) == 3
    assert origin.teacher["files"]
    assert origin.run["seed"] == str(config.distill.seed)
    assert RunManifest.read(origin.run["uri"]).tags["workers"] == "1", "there are no GPUs"

    summary = report(config, latency_runs=1)
    assert summary["records"] == len(first["scores"])
    folder = tmp_path / "root" / "report"
    names = ("figure1", "figure3", "figure4", "scores_by_video", "worst_videos")
    text = (folder / "report.md").read_text()
    for name in names:
        assert (folder / f"{name}.png").exists()
        assert f"]({name}.png)" in text
    mbo = f"{100 * first['scores'][SLOTMATCH]['video_mbo']:.1f}"
    row = next(line for line in text.splitlines() if line.startswith("| SlotMatch (ours) |"))
    assert mbo in row, "the first table is that of the data set that has runs"

    monkeypatch.setattr(OneRay, "start", lambda *_: pytest.fail("nothing is left that needs Ray"))
    second = run(config)
    assert all(second["reused"].values())
    assert second["scores"] == first["scores"]
    assert second["versions"] == first["versions"]


@pytest.fixture(scope="module")
def line(shared_tiny, local_ray):
    """The config of a line that has run, with system metrics."""
    config = shared_tiny("mlflow.system_metrics=true")
    run(config)
    return config


def test_mlflow_holds_curves_config_and_pictures(line):
    config = line
    client = tracking.connect(config)
    runs = client.search_runs([tracking.experiment_id(config)])
    assert {run.info.status for run in runs} == {"FINISHED"}
    student = next(run for run in runs if run.info.run_name == SLOTMATCH)
    assert student.data.params["distill.beta"] == "0.2"
    assert len(client.get_metric_history(student.info.run_id, "slot_kd")) == 8
    for name in ("learning_rate", "gradient_norm", "frames_per_second", "data_wait_share"):
        assert name in student.data.metrics
    assert client.list_artifacts(student.info.run_id, "overlays")
    assert client.get_model_version_by_alias("slotmatch", "champion")
    versions = {version.tags["method"]: version for version in client.search_model_versions()}
    for tag in ("clips", "seed", "git_revision", "score.video_mbo", "evaluation"):
        assert all(tag in version.tags for version in versions.values())
    assert "targets" in versions["slotmatch"].tags
    assert "targets" not in versions["no_kd"].tags, "it learned from none"
    (output,) = student.outputs.model_outputs
    files = _files(client, output.model_id)
    assert any(name.endswith("model.safetensors") for name in files)
    assert not any(name.endswith((".pkl", ".pickle", ".pt", ".pth")) for name in files)


@pytest.mark.fault("MLflow's own tables empty", "pipeline", "those of the champion, by plain MLflow calls")
def test_mlflow_shows_the_champion_by_its_own_calls(line):
    mlflow.set_tracking_uri(line.tracking_uri)
    client = mlflow.MlflowClient()
    champion = client.get_model_version_by_alias("slotmatch", "champion")
    trained = mlflow.get_run(champion.run_id)
    assert {one.dataset.name for one in trained.inputs.dataset_inputs} >= {"synthetic"}
    assert "system/system_memory_usage_percentage" in trained.data.metrics
    (output,) = trained.outputs.model_outputs
    model = mlflow.get_logged_model(output.model_id)
    assert model.status.value == "READY"
    scores = {metric.key: metric for metric in model.metrics if metric.dataset_name == "synthetic"}
    assert set(SCORES) <= set(scores)
    evaluated = mlflow.get_run(scores["video_mbo"].run_id)
    assert evaluated.data.metrics["video_mbo"] == scores["video_mbo"].value
    assert [one.dataset.digest for one in evaluated.inputs.dataset_inputs] == [
        scores["video_mbo"].dataset_digest
    ]
    example = mlflow.models.Model.load("models:/slotmatch@champion").load_input_example()
    assert mlflow.pyfunc.load_model("models:/slotmatch@champion").predict(example).shape == example.shape[:3]
    for words in ("| grid", "| colour k-means", "| one slot", "10 videos", "Licence of the weights"):
        assert words in champion.description
    assert "is the champion" in client.get_registered_model("slotmatch").description
    models = {one.model_type: one for one in client.search_logged_models([trained.info.experiment_id])}
    taught = models["teacher"]
    assert taught.status.value == "READY"
    assert "video_mbo" in {metric.key for metric in taught.metrics}
    assert taught.params["method"] == "teacher"


def _files(client, model_id, path=None):
    found = []
    for entry in client.list_logged_model_artifacts(model_id, path):
        found += _files(client, model_id, entry.path) if entry.is_dir else [entry.path]
    return found
