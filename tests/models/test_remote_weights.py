"""Weights in S3: a teacher's public file, a folder of ours, a student's backbone."""

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_model, tiny_section

from pipeline import storage
from pipeline.artifacts.subjects import backbone_identity, model_identity
from pipeline.config import ConfigError, resolve_config
from pipeline.models import save_slot_model
from pipeline.models.build import build_backbone, checkpoint_hints, load_teacher
from pipeline.storage import join

STUDENT = tiny_section()


@pytest.fixture
def models(s3, tmp_path):
    """The same weights in a local folder and in S3."""
    model = tiny_model(image_size=16)
    local, uri = tmp_path / "models", join(s3, tmp_path.name)
    local.mkdir()
    torch.save({"state_dict": model.state_dict()}, local / "public.ckpt")
    save_file(model.encoder.backbone.model.state_dict(), local / "backbone.safetensors")
    save_slot_model(model, local / "folder")
    storage.upload_tree(local, uri)
    return str(local), uri


@pytest.mark.parametrize("name", ["public.ckpt", "folder"])
def test_a_teacher(models, name):
    def config(root):
        values = {"teacher": {"checkpoint": join(root, name), "num_heads": 2}, "student": STUDENT}
        return resolve_config(values)

    local, remote = (load_teacher(config(root), join(root, name)).state_dict() for root in models)
    assert local.keys() == remote.keys()
    assert all(torch.equal(local[key], remote[key]) for key in local)
    hints = checkpoint_hints(config(models[1]))
    assert model_identity(join(models[1], name), hints) == model_identity(join(models[0], name), hints)
    with pytest.raises(ConfigError, match=r"there is no model at 's3://bucket/.*nowhere'"):
        model_identity(join(models[1], "nowhere"), hints)
    with pytest.raises(storage.MissingBucketError, match="no bucket 'no-such-bucket'"):
        model_identity("s3://no-such-bucket/a.ckpt", hints)


def test_a_students_backbone(models):
    weights = [{**STUDENT, "backbone_weights": join(root, "backbone.safetensors")} for root in models]
    local, remote = (resolve_config({"student": section}).student for section in weights)
    one, two = (build_backbone(section).state_dict() for section in (local, remote))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert backbone_identity(local) == backbone_identity(remote)
    missing = local.model_copy(update={"backbone_weights": "s3://bucket/nowhere.safetensors"})
    with pytest.raises(ConfigError, match=r"there is no file 's3://bucket/nowhere\.safetensors'"):
        backbone_identity(missing)
