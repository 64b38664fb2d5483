"""Slot models on the Hugging Face Hub: a repository holds the files that a model folder does."""

from __future__ import annotations

import tempfile
from pathlib import Path
from urllib.parse import quote

from pipeline import storage
from pipeline.models.checkpoints import MODEL_FILES, load_slot_model, save_slot_model
from pipeline.models.slot_model import SlotModel
from pipeline.storage.hub import push as upload

CARD_FILE = "README.md"


def from_hub(name: str, revision: str | None) -> SlotModel:
    """`SlotModel.from_pretrained`."""
    if Path(name).is_dir():
        if revision is not None:
            raise ValueError(
                f"revision: {revision!r}, but {name!r} is a folder of this machine, which has none"
            )
        return load_slot_model(name)
    at = f"@{quote(revision, safe='')}" if revision is not None else ""
    with storage.local_copy(f"hf://{name}{at}", MODEL_FILES) as folder:
        return load_slot_model(folder)


def push(
    model: SlotModel, name: str, card: str | None, private: bool | None, branch: str | None, message: str
) -> str:
    """`SlotModel.push_to_hub`."""
    with tempfile.TemporaryDirectory() as scratch:
        save_slot_model(model, scratch)
        if card is not None:
            (Path(scratch) / CARD_FILE).write_text(card, encoding="utf-8")
        return upload(scratch, name, private=private, branch=branch, message=message)
