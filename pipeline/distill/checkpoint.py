"""Checkpoints of a training run: complete or absent, and enough to go on to the identical curve.

A checkpoint is a model folder (`load_slot_model` opens it) with the state of the optimizer and of what
only training uses (the objective's heads), and the history of losses, beside it. The training loop
draws no random numbers, so there is no random state to save: step s uses what follows from (seed, s).
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline import storage
from pipeline.distill.objective import TrainingObjective
from pipeline.distill.precision import Precision
from pipeline.models import BackboneError, BackboneSource, save_slot_model
from pipeline.models.checkpoints import WEIGHTS_FILE, read_config
from pipeline.models.slim import own_backbone, read_frozen_backbone

CHECKPOINT_FOLDER = "checkpoints"
HEADS_FILE = "heads.safetensors"


@dataclass(frozen=True)
class TrainingState:
    step: int
    history: list[dict[str, float]]
    precision: Precision | None = None  # None: of an earlier version, which did not say


def save_checkpoint(
    run_uri: str,
    objective: TrainingObjective,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    *,
    keep: int,
    slim: BackboneSource | None = None,
) -> str:
    """Publishes a checkpoint of `run_uri` and deletes the oldest beyond `keep`; returns its URI."""
    uri = storage.join(run_uri, CHECKPOINT_FOLDER, f"step_{state.step:08d}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_slot_model(objective.model, folder, slim=slim)
        save_file(objective.heads.state_dict(), folder / HEADS_FILE)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        (folder / "history.json").write_text(json.dumps(state.history))
        manifest = {"kind": "checkpoint", "step": state.step, "precision": state.precision}
        (folder / storage.MANIFEST).write_text(json.dumps(manifest))
        storage.upload_folder(folder, uri)
    for name in _complete(run_uri)[:-keep]:
        storage.delete(storage.join(run_uri, CHECKPOINT_FOLDER, name))
    return uri


def latest_checkpoint(run_uri: str) -> str | None:
    """The newest complete checkpoint of a run."""
    names = _complete(run_uri)
    return storage.join(run_uri, CHECKPOINT_FOLDER, names[-1]) if names else None


def _complete(run_uri: str) -> list[str]:
    folder = storage.join(run_uri, CHECKPOINT_FOLDER)
    return [n for n in storage.list_names(folder) if storage.is_complete(storage.join(folder, n))]


def load_checkpoint(
    uri: str, objective: TrainingObjective, optimizer: torch.optim.Optimizer
) -> TrainingState:
    """Fills the objective's model and heads, and the optimizer, from a checkpoint.

    Raises:
        ValueError: a file of it is damaged or of another model; or it lacks the frozen backbone, and the objective's
            is another one.
    """
    with storage.local_copy(uri) as folder:
        try:
            weights = load_file(Path(folder) / WEIGHTS_FILE)
            if (frozen := read_frozen_backbone(folder)) is not None:
                weights |= own_backbone(objective.model.state_dict(), frozen, uri)
            objective.model.load_state_dict(weights)
            objective.heads.load_state_dict(load_file(Path(folder) / HEADS_FILE))
            # Its `feature_scale` was measured when the run began, where the config leaves it open.
            objective.model.config = read_config(folder)
            # A run that began on a GPU may go on without one; the optimizer moves its state to the parameters.
            state = torch.load(Path(folder) / "optimizer.pt", map_location="cpu", weights_only=True)
            for own, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
                saved["fused"] = own.get("fused")  # follows from the device, which may be another one
            optimizer.load_state_dict(state)
            manifest: dict[str, Any] = json.loads((Path(folder) / storage.MANIFEST).read_text())
            history = json.loads((Path(folder) / "history.json").read_text())
        except BackboneError:  # says what to do
            raise
        except Exception as error:
            raise ValueError(
                f"checkpoint {uri} can't be resumed from ({type(error).__name__}: {error}); delete it to go "
                "back to the one before"
            ) from error
    return TrainingState(manifest["step"], history, manifest.get("precision"))
