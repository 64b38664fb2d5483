"""Which student is scored and registered: a finished one, whose model is there."""

import pytest
from artifacts.worlds import world

from pipeline import storage
from pipeline.artifacts.manifests import RunManifest
from pipeline.clips.library import clip_files
from pipeline.config import ConfigError
from pipeline.evaluate.subjects import finished_student


@pytest.fixture
def artifacts(tmp_path):
    artifacts = world("movi_e", tmp_path)
    for name in ("config.json", "model.safetensors"):
        storage.write_bytes(f"{artifacts.student_model}/{name}", b"")
    RunManifest(mlflow_run="x").publish(artifacts.student.uri)
    return artifacts


def test_a_finished_student_needs_its_clips_no_more(artifacts):
    for name in clip_files(artifacts.clips.uri):
        storage.delete(f"{artifacts.clips.uri}/{name}")
    assert finished_student(artifacts) == artifacts.student.uri


def test_a_student_without_its_model_is_made_again_by_distill(artifacts):
    storage.delete(f"{artifacts.student_model}/model.safetensors")
    with pytest.raises(
        ConfigError, match=r"has lost model/model\.safetensors; .*python -m jobs\.distill CONFIG"
    ):
        finished_student(artifacts)


def test_a_student_that_is_not_finished(artifacts):
    storage.delete(f"{artifacts.student.uri}/manifest.json")
    with pytest.raises(storage.IncompleteError, match=r"python -m jobs\.distill CONFIG"):
        finished_student(artifacts)
