"""What a training job leaves behind, without a training."""

from tiny_models import tiny_model

from pipeline import storage, tracking
from pipeline.artifacts.manifests import Rules
from pipeline.evaluate.records import Evaluation
from pipeline.models import save_slot_model
from pipeline.models.export import ExportError


def make_finished_run(config, uri, *, model=None, clips="c", slim=None, **manifest):
    """Publishes a student, a tiny one by default, at `uri`, with a run in MLflow."""
    name = storage.name(uri)
    save_slot_model(model or tiny_model(seed=len(name), image_size=16), f"{uri}/model", slim=slim)
    storage.write_bytes(f"{uri}/config.yaml", config.to_yaml().encode())
    storage.write_json(f"{uri}/history.json", [])
    tags = {"seed": "1", "clips": clips, "method": "slotmatch", "beta": "0.2", "teacher": "SlotContrast"}
    run_id = tracking.start_run(config, uri, name, {"role": "student", **tags})
    storage.publish(
        uri, {"kind": "student", "fingerprint": name, "mlflow_run": run_id, "tags": tags, **manifest}
    )
    return uri


def evaluation(score, protocol="p", uri="somewhere"):
    """A made-up evaluation."""
    return Evaluation(uri, {"video_mbo": score}, Rules(name=protocol, fingerprint=protocol), videos=1)


def refuse_export(_):
    """In the place of `pack.trace`, for students that are registered without their exported form: seconds less."""
    raise ExportError("exports are tested elsewhere")
