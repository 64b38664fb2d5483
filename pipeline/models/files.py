"""Checkpoint files: their tensors, read without running any code of theirs, and whether these fit a module."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.flax_files import is_flax, read_flax

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"  # of a model folder


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` or a PyTorch file, without running any pickled code.

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither format, or a pickle that holds more than tensors and plain values.
    """
    content = read_checkpoint_file(path)
    state = content.get("state_dict", content.get("model", content))
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path}: no tensors found in the file")
    return tensors


def read_checkpoint_file(path: str | Path, allowed: Sequence[type] = ()) -> dict[str, Any]:
    """The whole content of a checkpoint file; errors as in `read_state_dict`.

    PyTorch's own messages advise to turn its protection off, so they are not passed on. Objects of the `allowed`
    classes may be in it beside tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    flax = is_flax(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        if flax:
            content = read_flax(path)
        else:
            with torch.serialization.safe_globals(list(allowed)):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        held = _pickled_objects(path, error)
        if held:
            raise ValueError(
                f"{path}: refused, it is a pickle that holds more than tensors ({held}), and reading such a file "
                "can run any code that its author put there. Ask for a file of the tensors alone; where you trust "
                "the author: torch.save({'state_dict': torch.load(FILE, weights_only=False)['state_dict']}, NEW_FILE)"
            ) from error
        kind = {".safetensors": "safetensors"}.get(path.suffix, "a Flax file" if flax else "a PyTorch file")
        raise ValueError(
            f"{path}: can't be read as {kind}: cut off, damaged or something else ({type(error).__name__})"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _pickled_objects(path: Path, error: Exception) -> str:
    """What the unpickler refused, in words; empty where the file is no pickle at all."""
    if not isinstance(error, pickle.UnpicklingError):
        return ""
    named = re.search(r"(?:GLOBAL|global:?|class|function)\s+`?([A-Za-z_][\w]*(?:\.\w+)+)", str(error))
    if named:
        return named[1]
    with path.open("rb") as file:
        # PyTorch's own files are zip archives, or pickles of an old protocol that it knows to read.
        return "a plain pickle" if file.read(1) == b"\x80" else ""


def check_state_dict(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Raises one ValueError that lists every missing, unexpected and wrongly shaped key."""
    own = module.state_dict()
    problems = [f"missing {k}" for k in own if k not in state]
    problems += [f"unexpected {k}" for k in state if k not in own]
    problems += [
        f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"{source}: the weights don't fit the model: {shown}")


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Raises ValueError where tensors hold NaN or infinity, as a run leaves them that diverged; it names them."""
    wrong = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise ValueError(
            f"{source}: {len(wrong)} of {len(state)} tensors are not finite ({shown}): the training that made them "
            "diverged; take an earlier checkpoint, or train again with a lower learning rate"
        )
