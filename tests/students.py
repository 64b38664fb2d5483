"""What a training job leaves behind, without a training."""

import torch

from pipeline import storage, tracking
from pipeline.artifacts.manifests import Rules
from pipeline.evaluate.records import Evaluation
from pipeline.models import BackboneConfig, SlotModel, SlotModelConfig, save_slot_model


def make_finished_run(config, uri, *, clips="c", **manifest):
    """Publishes a tiny student at `uri`, with a run in MLflow."""
    name = storage.name(uri)
    torch.manual_seed(len(name))
    arguments = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = SlotModel(SlotModelConfig(BackboneConfig(None, 16, arguments), 3, 8, decoder_hidden_sizes=(8,)))
    save_slot_model(model, f"{uri}/model")
    storage.write_bytes(f"{uri}/config.yaml", config.to_yaml().encode())
    storage.write_json(f"{uri}/history.json", [])
    run_id = tracking.start_run(config, uri, name, {"role": "student"})
    tags = {"seed": "1", "clips": clips, "method": "slotmatch", "beta": "0.2", "teacher": "SlotContrast"}
    storage.publish(
        uri, {"kind": "student", "fingerprint": name, "mlflow_run": run_id, "tags": tags, **manifest}
    )
    return uri


def evaluation(score, protocol="p", uri="somewhere"):
    """A made-up evaluation."""
    return Evaluation(uri, {"video_mbo": score}, Rules(name=protocol, fingerprint=protocol), videos=1)
