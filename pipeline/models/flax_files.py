"""Checkpoint files of Flax: msgpack, in which arrays are an extension type."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

ARRAY = 1  # the extension type: a packed (shape, name of the dtype, bytes)
EMBEDDED_CONFIG = "slotmatch_config"  # an extra entry of the files that we write


def is_flax(path: Path) -> bool:
    """Whether a file is a msgpack map, by its name or its first byte (PyTorch's begin with `P` or 0x80)."""
    with path.open("rb") as file:
        first = file.read(1)
    return path.suffix == ".flax" or b"\x81" <= first <= b"\x8f"


def read_flax(path: Path) -> Any:
    """The content of a file, its arrays as tensors.

    Raises:
        ModuleNotFoundError: msgpack is not installed.
        ValueError, TypeError: not such a file.
    """
    content = _msgpack(path).unpackb(
        path.read_bytes(), ext_hook=_unpacked(path), raw=False, strict_map_key=False
    )
    if isinstance(content, dict) and isinstance(content.get("variables"), dict):
        ours = content["variables"].pop(EMBEDDED_CONFIG, None)
        return content if ours is None else {**content, EMBEDDED_CONFIG: ours}
    return content


def write_flax(content: dict[str, Any], path: str | Path) -> None:
    """Writes what a training of Flax restores: `step`, `optimizer`, `variables`, `rng`, and nothing else at the top.

    Its readers refuse other names there; our config is among the variables, where they leave it alone.
    """
    kept = {
        "step": content["global_step"],
        "optimizer": content["optimizer"],
        "variables": {EMBEDDED_CONFIG: content[EMBEDDED_CONFIG]},
        "rng": torch.zeros(2, dtype=torch.uint32),
    }
    msgpack = _msgpack(path)

    def packed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            raise TypeError(f"no msgpack of a {type(value).__name__}")
        array = np.ascontiguousarray(value.detach().cpu().numpy())
        return msgpack.ExtType(ARRAY, msgpack.packb((value.shape, array.dtype.name, array.tobytes())))

    Path(path).write_bytes(msgpack.packb(kept, default=packed))


def _unpacked(path: Path) -> Any:
    msgpack = _msgpack(path)

    def unpacked(kind: int, data: bytes) -> Any:
        if kind != ARRAY:
            return msgpack.ExtType(kind, data)
        shape, dtype, values = msgpack.unpackb(data, raw=False)
        return torch.from_numpy(np.frombuffer(values, dtype).reshape(shape).copy())

    return unpacked


def _msgpack(path: str | Path) -> ModuleType:
    try:
        import msgpack
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path} is a Flax file, for which the package msgpack is needed: pip install msgpack"
        ) from None
    return msgpack
