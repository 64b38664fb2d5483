"""Checkpoints of a run: complete or absent, and enough to go on to the identical curve."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from pipeline import storage
from pipeline.distill.checkpoint import TrainingState, latest_checkpoint, load_checkpoint, save_checkpoint
from pipeline.distill.step import Batch, Objective, Terms, training_step
from pipeline.models import BackboneError, BackboneSource, load_slot_model


def make(seed=0, num_slots=3):
    model = tiny_model(num_slots, seed=seed)
    teacher = tiny_model(num_slots, 16)
    objective = Objective(model, Terms(slot_kd=0.2, slot_map=True), teacher=teacher)
    return objective, torch.optim.Adam(objective.trainable_parameters())


def train(objective, optimizer, start, stop):
    losses = []
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        video = torch.randn(2, 3, 3, 32, 32, generator=generator)
        batch = Batch(video, target_slots=torch.randn(2, 3, 3, 16, generator=generator))
        values = training_step(objective, optimizer, batch, learning_rate=1e-2, gradient_clip=1.0)
        losses.append(values["total"])
    return losses


def test_a_resumed_run_has_the_identical_curve(place):
    objective, optimizer = make()
    unbroken = train(objective, optimizer, 0, 4)
    uri = save_checkpoint(place, objective, optimizer, TrainingState(4, [{"total": 1.5}]), keep=2)
    unbroken += train(objective, optimizer, 4, 8)
    objective, optimizer = make(seed=1)
    assert latest_checkpoint(place) == uri
    state = load_checkpoint(uri, objective, optimizer)
    assert state == TrainingState(4, [{"total": 1.5}])
    assert train(objective, optimizer, 4, 8) == unbroken[4:]


def test_a_slim_checkpoint_goes_on_beside_the_backbone_that_it_was_trained_with(place):
    objective, optimizer = make()
    train(objective, optimizer, 0, 2)
    source = BackboneSource("timm", storage.join(place, "backbones"))
    uri = save_checkpoint(place, objective, optimizer, TrainingState(2, []), keep=2, slim=source)
    unbroken = train(objective, optimizer, 2, 4)
    other, its_optimizer = make(seed=1)
    with pytest.raises(BackboneError, match="was trained beside a frozen backbone of sha256"):
        load_checkpoint(uri, other, its_optimizer)
    other.model.encoder.backbone.load_state_dict(objective.model.encoder.backbone.state_dict())
    load_checkpoint(uri, other, its_optimizer)
    assert train(other, its_optimizer, 2, 4) == unbroken


def test_a_run_that_began_on_a_gpu_goes_on_without_one(tmp_path, monkeypatch):
    objective, optimizer = make()
    train(objective, optimizer, 0, 2)
    # The label that torch gives to tensors on a GPU.
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    uri = save_checkpoint(str(tmp_path), objective, optimizer, TrainingState(2, []), keep=2)
    unbroken = train(objective, optimizer, 2, 4)
    objective, optimizer = make(seed=1)
    load_checkpoint(uri, objective, optimizer)
    assert train(objective, optimizer, 2, 4) == unbroken


def test_only_the_newest_are_kept(place):
    objective, optimizer = make()
    assert latest_checkpoint(place) is None
    for step in (5, 10, 100, 20):
        save_checkpoint(place, objective, optimizer, TrainingState(step, []), keep=2)
    names = storage.list_names(storage.join(place, "checkpoints"))
    assert names == ["step_00000020", "step_00000100"]
    assert latest_checkpoint(place).endswith("step_00000100")


def test_a_half_written_checkpoint_is_not_there(place):
    objective, optimizer = make()
    good = save_checkpoint(place, objective, optimizer, TrainingState(5, []), keep=2)
    newer = save_checkpoint(place, objective, optimizer, TrainingState(10, []), keep=2)
    storage.delete(storage.join(newer, storage.MANIFEST))
    assert latest_checkpoint(place) == good


def test_a_checkpoint_is_a_model_folder(tmp_path):
    objective, optimizer = make()
    uri = save_checkpoint(str(tmp_path), objective, optimizer, TrainingState(5, []), keep=1)
    video = torch.randn(1, 2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(load_slot_model(uri)(video).slots, objective.model.eval()(video).slots)


@pytest.mark.parametrize("name", ["model.safetensors", "heads.safetensors", "optimizer.pt", "history.json"])
def test_a_damaged_checkpoint_is_named(tmp_path, name):
    objective, optimizer = make()
    train(objective, optimizer, 0, 1)
    uri = save_checkpoint(str(tmp_path), objective, optimizer, TrainingState(5, [{"total": 1.0}]), keep=1)
    path = Path(uri) / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"step_00000005 can't be resumed from .* delete it"):
        load_checkpoint(uri, *make())


def test_a_checkpoint_of_another_model(tmp_path):
    uri = save_checkpoint(str(tmp_path), *make(), TrainingState(5, []), keep=1)
    with pytest.raises(ValueError, match=r"can't be resumed from"):
        load_checkpoint(uri, *make(num_slots=4))
