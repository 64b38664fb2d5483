"""What MLflow itself shows of a registered student: asked by MLflow's own calls, with none of our readers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
from clip_sets import random_clips
from layouts import edit_json
from mlflow.exceptions import MlflowException
from students import make_finished_run

from pipeline import storage
from pipeline.artifacts.manifests import EvaluationManifest, Rules, TargetManifest
from pipeline.config import resolve_config
from pipeline.evaluate.records import Evaluation, record_evaluations
from pipeline.registry.lineage import trace
from pipeline.registry.stage import register_run

SCORES = dict.fromkeys(("image_fg_ari", "image_mbo", "video_fg_ari", "video_mbo"), 0.25)


@pytest.fixture(scope="module")
def new_database(tmp_path_factory):
    """MLflow's tables with nothing in them, which take seconds to make."""
    path = tmp_path_factory.mktemp("new") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments(max_results=1)
    return path


@pytest.fixture
def config(tmp_path, monkeypatch, new_database):
    config = resolve_config({}, [f"storage.root={tmp_path / 'root'}", "mlflow.weights_licence=CC-BY-4.0"])
    (tmp_path / "root").mkdir()
    shutil.copy(new_database, tmp_path / "root")
    mlflow.set_tracking_uri(None)  # which an earlier test may have set
    monkeypatch.setenv("MLFLOW_TRACKING_URI", config.tracking_uri)
    yield config
    mlflow.set_tracking_uri(None)


@pytest.fixture
def root(config, tmp_path):
    """Clips to train and to score on, and targets."""
    root = tmp_path / "root"
    for name, count in (("train", 3), ("val", 2)):
        random_clips(root / "clips" / name, {f"{name}-{i}": 4 for i in range(count)})
        described = {"kind": "videos", "name": "my bikes", "split": name}
        more = {"dataset": described, "split": name, "frames": 4 * count}
        edit_json(root / "clips" / name / "manifest.json", lambda manifest, more=more: manifest.update(more))
    known = {"teacher_config": {"num_slots": 5, "slot_size": 64}, "teacher": {"files": ["hash-of-weights"]}}
    TargetManifest(fingerprint="t", views={"views": 2}, rows=12, **known).publish(str(root / "targets" / "t"))
    return root


def scored(config, root, run, video_mbo, name="student"):
    """Records a made-up evaluation of a student beside a trivial baseline, as `evaluate` does."""
    rules = Rules(name="slotcontrast", fingerprint="p", in_words="whole videos", clips="val")
    clips, results, tags = str(root / "clips" / "val"), {}, {}
    for who, value in ((name, video_mbo), ("grid", 0.125)):
        uri = str(root / "evaluations" / f"{who} of {storage.name(run)}")
        scores = {**SCORES, "video_mbo": value, "slots_in_use": 3.0}
        results[who] = Evaluation(uri, scores, rules, videos=2)
        EvaluationManifest(clips_uri=clips, scores=scores, protocol=rules, videos=2).publish(uri)
        tags[who] = {"method": "baseline", "name": "grid (N = 5)"}
    tags[name] = {"method": "slotmatch", "name": name, "model_uri": f"{run}/model"}
    record_evaluations(config, clips, tags, results)
    return results[name]


def student(config, root, name, *, targets=True):
    made_of = {"clips_uri": str(root / "clips" / "train")}
    if targets:
        made_of["targets_uri"] = str(root / "targets" / "t")
    run = make_finished_run(config, str(root / "students" / name), clips="train", **made_of)
    edit_json(Path(run) / "manifest.json", lambda manifest: manifest["tags"].update(targets="t"))
    return run


def logged_models(client):
    (experiment,) = [e for e in client.search_experiments() if e.name == "slotmatch"]
    return client.search_logged_models([experiment.experiment_id])


@pytest.mark.fault("MLflow's own tables empty", "register", "inputs, logged model, example, description")
def test_plain_mlflow_shows_what_a_student_is(config, root):
    run = student(config, root, "s")
    register_run(config, run, scored(config, root, run, 0.5))
    client = mlflow.MlflowClient()
    version = client.get_model_version_by_alias("slotmatch", "champion")

    trained = client.get_run(version.run_id)
    inputs = {one.dataset.name: one for one in trained.inputs.dataset_inputs}
    assert {name: one.dataset.digest for name, one in inputs.items()} == {
        "my bikes": "train",
        "my bikes targets": "t",
    }
    assert [(tag.key, tag.value) for tag in inputs["my bikes"].tags] == [("mlflow.data.context", "training")]
    source = mlflow.data.get_source(inputs["my bikes"])
    assert source.uri == str(root / "clips" / "train")
    profile = json.loads(inputs["my bikes"].dataset.profile)
    assert (profile["videos"], profile["clips"], profile["frames"]) == (3, 3, 12)

    (output,) = trained.outputs.model_outputs
    model = mlflow.get_logged_model(output.model_id)
    assert model.status.value == "READY"
    assert (model.model_type, model.source_run_id) == ("student", version.run_id)
    assert {key: model.params[key] for key in ("method", "beta", "seed")} == {
        "method": "slotmatch",
        "beta": "0.2",
        "seed": "1",
    }
    assert "distill.learning_rate" in model.params
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "slotmatch", "version": "1"}]
    assert version.tags["logged_model"] == model.model_id

    scores = {metric.key: metric for metric in model.metrics}
    assert scores["video_mbo"].value == 0.5
    assert (scores["video_mbo"].dataset_name, scores["video_mbo"].dataset_digest) == ("my bikes", "val")
    evaluated = client.get_run(scores["video_mbo"].run_id)
    (on,) = evaluated.inputs.dataset_inputs
    assert (on.dataset.digest, on.tags[0].value) == ("val", "evaluation")
    assert [one.model_id for one in evaluated.inputs.model_inputs] == [model.model_id]
    best = client.search_logged_models(
        [trained.info.experiment_id],
        filter_string="metrics.video_mbo > 0.4",
        datasets=[{"dataset_name": "my bikes", "dataset_digest": "val"}],
    )
    assert [one.model_id for one in best] == [model.model_id]


def test_the_example_is_loaded_and_predicted_on(config, root):
    register_run(config, student(config, root, "s"), None)
    described = mlflow.models.Model.load("models:/slotmatch/1")
    example = described.load_input_example()
    assert (example.dtype, example.ndim, example.shape[-1]) == (np.uint8, 4, 3)
    for uri in ("models:/slotmatch/1", f"models:/{described.model_id}", f"runs:/{described.run_id}/s"):
        assert mlflow.pyfunc.load_model(uri).predict(example).shape == example.shape[:3]
    stored = list((root / "mlartifacts").rglob("model.safetensors"))
    assert len(stored) == 1, "weights are stored once"
    assert sum(path.stat().st_size for path in (root / "mlartifacts").rglob("*input_example.json")) < 2**17


def test_the_description_says_what_it_is(config, root):
    run = student(config, root, "s")
    register_run(config, run, scored(config, root, run, 0.5))
    client = mlflow.MlflowClient()
    card = client.get_model_version("slotmatch", "1").description
    for words in (
        "my bikes, split train: 3 videos, 3 clips, 12 frames (clips `train`)",
        "teacher: SlotContrast, weights `hash-of-weights`",
        "12 rows (`t`)",
        "| **this model** | 25.0 | 25.0 | 25.0 | 50.0 |",
        "| grid (N = 5) | 25.0 | 25.0 | 25.0 | 12.5 |",
        "whole videos",
        'mlflow.pyfunc.load_model("models:/slotmatch/1")',
        "slotmatch pull models:/slotmatch/1 DIR mlflow.tracking_uri=URI    # safetensors, a config, model.onnx",
        "needs MLflow, numpy and onnxruntime.",
        "CC-BY-4.0",
        "licence of the teacher that they were distilled from is not known",
        "DINOv2",
    ):
        assert words in card
    assert str(root) not in card
    whole = client.get_registered_model("slotmatch").description
    assert "Version 1 is the champion" in whole
    assert "| **this model** |" in whole
    assert whole.count("Kept up to date") == 1


@pytest.mark.usefixtures("not_exported")
def test_descriptions_follow_scores_and_champions_until_somebody_edits_them(config, root):
    client = mlflow.MlflowClient()
    first, second, third = (student(config, root, name) for name in ("first", "second", "third"))
    register_run(config, first, None)
    assert "None: it was registered without" in client.get_model_version("slotmatch", "1").description
    found = scored(config, root, first, 0.5)  # by a version that did not warn
    rules = found.protocol.model_copy(update={"warnings": ("FG-ARI says nothing here.",)})
    register_run(config, first, replace(found, protocol=rules))
    card = client.get_model_version("slotmatch", "1").description
    assert "| 50.0 |" in card
    assert "whole videos. FG-ARI says nothing here." in card
    register_run(config, first, None)
    assert "| 50.0 |" in client.get_model_version("slotmatch", "1").description, "its scores are known"
    register_run(config, second, scored(config, root, second, 0.4))
    assert "Version 1 is the champion" in client.get_registered_model("slotmatch").description
    register_run(config, third, scored(config, root, third, 0.6))
    whole = client.get_registered_model("slotmatch").description
    assert "Version 3 is the champion" in whole
    assert "| 60.0 |" in whole

    edited = f"{client.get_model_version('slotmatch', '1').description}\n\nNot for the night shift."
    client.update_model_version("slotmatch", "1", edited)
    client.update_registered_model("slotmatch", "Ours, for the yard.")
    register_run(config, first, scored(config, root, first, 0.7))
    assert client.get_model_version("slotmatch", "1").description == edited
    assert client.get_registered_model("slotmatch").description == "Ours, for the yard."
    client.update_model_version("slotmatch", "1", "")
    register_run(config, first, None)
    assert "| 70.0 |" in client.get_model_version("slotmatch", "1").description


@pytest.mark.usefixtures("not_exported")
def test_registering_again_makes_nothing_twice(config, root):
    run = student(config, root, "s")
    evaluation = scored(config, root, run, 0.5)
    client = mlflow.MlflowClient()
    seen = []
    for _ in range(2):
        register_run(config, run, scored(config, root, run, 0.5))
        (model,) = logged_models(client)
        trained = client.get_run(model.source_run_id)
        metrics = [(metric.key, metric.value, metric.timestamp, metric.run_id) for metric in model.metrics]
        on_run = client.get_metric_history(model.metrics[0].run_id, "video_mbo")
        counts = len(trained.inputs.dataset_inputs), len(trained.outputs.model_outputs), len(on_run)
        seen.append((model.model_id, sorted(metrics), counts, model.tags))
    assert seen[0] == seen[1]
    assert seen[0][2] == (2, 1, 1)
    assert len(model.metrics) == len(evaluation.scores)


def _fails(*_, **__):
    raise MlflowException("API request to /api/2.0/mlflow/logged-models failed with error code 404 != 200")


@pytest.mark.usefixtures("not_exported")
@pytest.mark.fault("a server without logged models", "register", "registered, said; later it gets what lacks")
def test_a_server_without_logged_models_registers_all_the_same(config, root, monkeypatch, capfd):
    client = mlflow.MlflowClient()
    run = student(config, root, "s")
    with monkeypatch.context() as old:
        for call in ("create_logged_model", "search_logged_models", "log_inputs"):
            old.setattr(f"mlflow.MlflowClient.{call}", _fails)
        done = register_run(config, run, scored(config, root, run, 0.5))
    assert done["champion"]
    said = capfd.readouterr().err
    assert "the logged model of this student could not be recorded" in said
    assert "error code 404" in said
    version = client.get_model_version("slotmatch", "1")
    assert version.source == f"{client.get_run(version.run_id).info.artifact_uri}/model"
    example = np.zeros((2, 20, 30, 3), np.uint8)
    assert mlflow.pyfunc.load_model("models:/slotmatch@champion").predict(example).shape == (2, 20, 30)
    assert "| 50.0 |" in version.description
    assert "no logged model" in trace("models:/slotmatch/1", config.tracking_uri).tree()

    register_run(config, run, scored(config, root, run, 0.5))
    version = client.get_model_version("slotmatch", "1")
    model = client.get_logged_model(version.tags["logged_model"])
    assert {metric.key: metric.value for metric in model.metrics}["video_mbo"] == 0.5
    assert len(client.get_run(version.run_id).inputs.dataset_inputs) == 2
    assert len(list((root / "mlartifacts").rglob("model.safetensors"))) == 1


@pytest.mark.usefixtures("not_exported")
@pytest.mark.parametrize(
    "call", ["log_inputs", "finalize_logged_model", "update_model_version", "log_outputs"]
)
def test_a_record_that_fails_does_not_cost_the_version(call, config, root, monkeypatch):
    run = student(config, root, "s")
    client = mlflow.MlflowClient()
    with monkeypatch.context() as broken:
        broken.setattr(f"mlflow.MlflowClient.{call}", _fails)
        register_run(config, run, None)
    register_run(config, run, None)
    version = client.get_model_version("slotmatch", "1")
    (model,) = logged_models(client)
    assert model.status.value == "READY"
    trained = client.get_run(version.run_id)
    assert (len(trained.inputs.dataset_inputs), len(trained.outputs.model_outputs)) == (2, 1)
    assert version.description


@pytest.mark.usefixtures("not_exported")
def test_the_lineage_reads_what_mlflow_holds(config, root):
    run = student(config, root, "s")
    register_run(config, run, scored(config, root, run, 0.5))
    held = trace("models:/slotmatch/1", config.tracking_uri).summary()["mlflow"]
    assert [one["digest"] for one in held["inputs"]] == ["train", "t"]
    assert {"score": "video_mbo", "value": 0.5, "dataset": "my bikes", "digest": "val"} in held[
        "logged_model"
    ]["scores"]
    # Neither the run's folder nor the version's tags name them any more.
    shutil.rmtree(run)
    client = mlflow.MlflowClient()
    for tag in ("clips", "targets"):
        if tag in client.get_model_version("slotmatch", "1").tags:
            client.delete_model_version_tag("slotmatch", "1", tag)
    found = trace("models:/slotmatch/1", config.tracking_uri)
    assert found.clips["uri"] == str(root / "clips" / "train")
    assert found.targets["uri"] == str(root / "targets" / "t")
    assert found.clips["videos"] == 3
    tree = found.tree()
    assert "training: my bikes (train)" in tree
    assert "video_mbo 50.0 on my bikes (val)" in tree
