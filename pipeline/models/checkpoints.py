"""Reading and writing models: public checkpoint files, and our own folders.

A model folder holds `model.safetensors` and `config.json`; of a slim one see `slim`. Tensor names in a slot model's
are those of the public layout, without `.module`. `systems` has whose public files are read, and as what.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.models.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_finite,
    check_state_dict,
    read_checkpoint_file,
)
from pipeline.models.flax_files import EMBEDDED_CONFIG
from pipeline.models.hints import CheckpointHints
from pipeline.models.initialisation import WithoutDraws
from pipeline.models.segmenter import SegmenterConfig, VideoSegmenter
from pipeline.models.slim import (
    CONFIG_KEY,
    BackboneSource,
    FrozenBackbone,
    describe_backbone,
    find_backbone,
    frozen_part,
)
from pipeline.models.slot_files import plain_names, without_training_heads
from pipeline.models.systems import SYSTEMS, System, model_of, of_content, of_model, parse_config

MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE)


def load_slot_model(path: str | Path, **hints: Any) -> VideoSegmenter:
    """Builds a model from a checkpoint and loads its weights; in eval mode, on the CPU.

    Args:
        path: a folder written by `save_slot_model`, or a public checkpoint file (`.ckpt`, `.pt`,
            `.safetensors`, `.flax`) in the layout that SlotContrast, VideoSAUR and DINOSAUR share, or in that of one of
            `SYSTEMS`.
        hints: what a public file does not tell, by the names of `CheckpointHints`. They are ignored where the file or
            folder has a config of ours, but for `backbone_weights`: where the frozen backbone's weights of a slim
            folder are, which are else looked for.

    Raises:
        FileNotFoundError: nothing at `path`.
        HintError: a public file needs another `num_heads`, or a `num_slots`, `backbone_weights` or `image_size`.
        TypeError: names that are no hints.
        BackboneError: a slim folder's backbone is not found, or has other weights.
        ValueError: not a checkpoint, one that holds more than tensors and plain values, or keys that are
            missing, unexpected or of another shape, all of which the message lists; or tensors that are not
            finite.
    """
    given = CheckpointHints.from_dict(hints)
    path, frozen = Path(path), None
    if path.is_dir():
        for name in MODEL_FILES:
            if not (path / name).is_file():
                raise FileNotFoundError(f"{path} is not a model folder: it has no {name}")
        _, config, frozen = _parse((path / CONFIG_FILE).read_text(), source=str(path / CONFIG_FILE))
        state = plain_names(without_training_heads(read_checkpoint_file(path / WEIGHTS_FILE), str(path)))
    else:
        config, state = _read_public_file(path, given)
    state = {key: value.float() for key, value in state.items()}
    with WithoutDraws():
        model = model_of(config)
    if frozen is not None:
        state |= find_backbone(model, frozen, path, given.backbone_weights)
    check_state_dict(model, state, str(path))
    check_finite(state, str(path))
    model.load_state_dict(state)
    return model.eval()


def _read_public_file(path: Path, hints: CheckpointHints) -> tuple[SegmenterConfig, dict[str, Tensor]]:
    content = _read_content(path)
    if EMBEDDED_CONFIG in content:
        system, config, _ = _parse(content[EMBEDDED_CONFIG], source=str(path))
        return config, system.tensors(content, str(path))
    return of_content(content).read(content, hints, str(path))


def _read_content(path: Path) -> Mapping[str, Any]:
    try:
        return read_checkpoint_file(path)
    except ValueError:
        for system in SYSTEMS.values():
            try:
                content = read_checkpoint_file(path, allowed=system.allowed) if system.allowed else {}
            except ValueError:
                continue
            if content and system.recognises(content):
                return content
        raise


def read_config(folder: str | Path) -> SegmenterConfig:
    """The config of a local model folder, whether or not its weights are there.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no model's.
    """
    file = Path(folder) / CONFIG_FILE
    return _parse(file.read_text(), source=str(file))[1]


def _parse(text: str, *, source: str) -> tuple[System, SegmenterConfig, FrozenBackbone | None]:
    """The config, and what it says of a backbone that is not in the file."""
    try:
        values = json.loads(text)
        frozen = values.pop(CONFIG_KEY, None)
        return *parse_config(values), frozen and FrozenBackbone.from_dict(frozen)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source}: not the config of a slot model ({type(error).__name__}: {error})"
        ) from error


def save_slot_model(
    model: VideoSegmenter,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    slim: BackboneSource | None = None,
) -> None:
    """Writes `model.safetensors` (weights stored as `dtype`) and `config.json` into `folder`.

    Args:
        slim: leave the frozen backbone out, which comes from there and is named by its hash.

    Raises:
        ValueError: weights that are not finite, as `dtype` has them; then nothing is written.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    state = {  # whole numbers, such as batch norm's counts of steps, may be too large for a short dtype
        k: v.detach().to("cpu", dtype if v.is_floating_point() else v.dtype).contiguous()
        for k, v in model.state_dict().items()
    }
    check_finite(state, f"the model to be saved as {str(dtype).removeprefix('torch.')}")
    config = model.config.to_dict()
    if slim is not None:
        config[CONFIG_KEY] = describe_backbone(model.state_dict(), slim)
        left_out = frozen_part(state)
        state = {key: value for key, value in state.items() if key not in left_out}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def save_public_checkpoint(model: VideoSegmenter, path: str | Path, *, step: int = 0) -> None:
    """Writes one file in its system's public layout (`.ckpt`, of SAVi `.flax`), which `load_slot_model` reads as well.

    Our config travels along as a JSON string; other readers ignore it.

    Raises:
        ValueError: weights that are not finite; then nothing is written.
    """
    check_finite(model.state_dict(), "the model to be saved")
    counters = {"epoch": 0, "global_step": step}
    system = of_model(model)
    content = {**system.written(model), **counters, EMBEDDED_CONFIG: json.dumps(model.config.to_dict())}
    system.write(content, path)
