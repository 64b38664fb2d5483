"""Slim models: the trained part alone, and which frozen backbone belongs to it.

The `model.safetensors` of a slim folder lacks the backbone's weights, and its `config.json` tells them by their hash.
What depends on the size of the input, such as position embeddings, stays in the model: resampled by another machine, it
could differ in the last bit, and it is small.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import storage
from pipeline.models.backbone import Backbone, load_backbone_weights, read_state_dict
from pipeline.models.files import CONFIG_FILE

CONFIG_KEY = "frozen_backbone"  # of a slim model's config.json
STORE_FOLDER = "backbones"  # below a storage.root
STORE_FILE = "backbone.safetensors"
_BACKBONE = re.compile(
    r"(encoder\.)?backbone\.model\."
)  # what a ViT's names begin with in a model of any system
_SIZED = ("pos_embed", "rel_pos", "relative_position", "attention_bias")
_FOLDERS_ABOVE = 5  # of a model that are looked through for a store: it may have been moved with the model


class BackboneError(ValueError):
    """A slim model's backbone is not where it was looked for, or has other weights."""


@dataclass(frozen=True)
class BackboneSource:
    """Where the weights of a frozen backbone come from.

    weights: as a config's `backbone_weights`. store: a folder that keeps them under their hash; the first slim model
    that is saved puts them there.
    """

    weights: str = "timm"
    store: str | None = None


@dataclass(frozen=True)
class FrozenBackbone:
    """What a slim model says of the weights that it lacks: their hash, their size in bytes, and where they may be."""

    sha256: str
    bytes: int
    weights: str
    store: str | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FrozenBackbone:
        """Raises TypeError where something else is described."""
        return cls(**values)


def frozen_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a model's tensors those that a slim one lacks."""
    return {
        key: value.detach().cpu() for key, value in state.items() if _BACKBONE.match(key) and not _sized(key)
    }


def _sized(key: str) -> bool:
    return any(word in key for word in _SIZED)


def weights_hash(frozen: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors with their names and shapes, in whatever file they are stored."""
    digest = hashlib.sha256()
    for key in sorted(frozen):
        values = frozen[key].contiguous()
        digest.update(f"{key} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_backbone(state: Mapping[str, Tensor], source: BackboneSource) -> dict[str, Any]:
    """What a slim model's config says of its backbone, which is in the store afterwards."""
    frozen = frozen_part(state)
    sha256 = weights_hash(frozen)
    if source.store is not None:
        _keep(frozen, _place(source.store, sha256))
    size = sum(value.nbytes for value in frozen.values())
    return asdict(FrozenBackbone(sha256, size, source.weights, source.store))


def _place(store: str, sha256: str) -> str:
    return storage.join(store, sha256[:16], STORE_FILE)


def _keep(frozen: Mapping[str, Tensor], place: str) -> None:
    from safetensors.torch import save_file

    if storage.exists(place):
        return
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / STORE_FILE
        save_file({_BACKBONE.sub("", key, count=1): value for key, value in frozen.items()}, file)
        storage.upload_file(file, place)


def read_frozen_backbone(folder: str | Path) -> FrozenBackbone | None:
    """What the config of a local model folder says of weights that the folder lacks; None of a whole model."""
    values = json.loads((Path(folder) / CONFIG_FILE).read_text()).get(CONFIG_KEY)
    return None if values is None else FrozenBackbone.from_dict(values)


def without_places(config: bytes) -> bytes | None:
    """A slim model's config without where its backbone may be, which decides nothing; None of anything else."""
    try:
        values = json.loads(config)
    except ValueError:
        return None
    if not isinstance(values, dict) or CONFIG_KEY not in values:
        return None
    values[CONFIG_KEY] = values[CONFIG_KEY]["sha256"]
    return json.dumps(values, sort_keys=True).encode()


def own_backbone(state: Mapping[str, Tensor], expected: FrozenBackbone, source: str) -> dict[str, Tensor]:
    """The frozen tensors of a model that is built already.

    Raises:
        BackboneError: they are others than those that `source` was trained with.
    """
    frozen = frozen_part(state)
    if (found := weights_hash(frozen)) != expected.sha256:
        raise BackboneError(
            f"{source} was trained beside a frozen backbone of sha256 {expected.sha256} (backbone_weights="
            f"{expected.weights}), and this one's is {found}; give the same backbone_weights"
        )
    return frozen


def find_backbone(
    model: nn.Module, expected: FrozenBackbone, folder: Path, given: str | Path | None = None
) -> dict[str, Tensor]:
    """The tensors that a slim model lacks, by their names in a whole one.

    Looked at are, in turn, a file beside the model, stores above its folder, the store that it was saved with, and
    where its weights came from.

    Args:
        model: the one that they belong to; its backbone's weights are overwritten.
        folder: the model's.
        given: a file, or another `backbone_weights`, to be taken instead of all these.

    Raises:
        BackboneError: none of them has the weights; says what was expected, and what was found where.
    """
    looked = []
    name, backbone = next((n, m) for n, m in model.named_modules() if isinstance(m, Backbone))
    for place, read in _candidates(backbone, expected, folder, given):
        try:
            found = {f"{name}.model.{key}": value for key, value in read().items()}
        except (OSError, RuntimeError, ValueError) as error:
            looked.append(f"{place} ({error})")
            continue
        frozen = frozen_part(found)
        if (sha256 := weights_hash(frozen)) == expected.sha256:
            return frozen
        looked.append(f"{place} (other weights, sha256 {sha256})")
    raise BackboneError(
        f"{folder}: a slim model without its frozen backbone {backbone.config.label}, whose weights have sha256 "
        f"{expected.sha256} (backbone_weights={expected.weights}). Looked at: {'; '.join(looked)}. Put a file of those "
        f"weights beside the model as {STORE_FILE}, or name it: load_slot_model(PATH, backbone_weights=FILE)"
    )


def _candidates(
    backbone: Backbone, expected: FrozenBackbone, folder: Path, given: str | Path | None
) -> Iterator[tuple[str, Callable[[], dict[str, Tensor]]]]:
    """Places, and what reads the backbone's tensors by timm's names there."""
    if given is not None:
        yield str(given), functools.partial(_read, backbone, str(given))
        return
    above = [str(parent / STORE_FOLDER) for parent in folder.resolve().parents[:_FOLDERS_ABOVE]]
    stores = [store for store in above if Path(store).is_dir()]
    if expected.store is not None and expected.store not in stores:
        stores.append(expected.store)
    for place in [str(folder / STORE_FILE), *(_place(store, expected.sha256) for store in stores)]:
        yield place, functools.partial(_read, backbone, place)
    yield expected.weights, functools.partial(_read, backbone, expected.weights)


def _read(backbone: Backbone, weights: str) -> dict[str, Tensor]:
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # as `build_backbone` draws it
            return Backbone(backbone.config).model.state_dict()
    if weights == "timm":
        load_backbone_weights(backbone, "timm")
        return backbone.model.state_dict()
    with storage.local_copy(weights) as path:
        state = read_state_dict(path)
        if state.keys() == {key for key in backbone.model.state_dict() if not _sized(key)}:  # a store's
            backbone.model.load_state_dict(state, strict=False)
        else:
            load_backbone_weights(backbone, path)
    return backbone.model.state_dict()
