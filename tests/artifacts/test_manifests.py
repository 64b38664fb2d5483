"""What published folders say of themselves, as it was before the manifests had types."""

from dataclasses import fields

from pipeline import storage
from pipeline.artifacts.manifests import Rules, RunManifest
from pipeline.config.protocols import Protocol


def test_a_run_says_its_last_losses_as_they_were_logged(tmp_path):
    uri = str(tmp_path)
    losses = {"step": 20, "total": 0.5, "gradient_norm": 1.0}
    RunManifest(mlflow_run="x", losses=losses).publish(uri)
    assert '"step": 20,' in storage.read_bytes(f"{uri}/manifest.json").decode()
    assert RunManifest.read(uri).losses == losses
    assert isinstance(RunManifest.read(uri).losses["step"], int)


def test_an_evaluation_records_every_rule_of_its_protocol():
    assert {field.name for field in fields(Protocol)} <= set(Rules.model_fields)
