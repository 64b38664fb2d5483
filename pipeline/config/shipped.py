"""The configs that come with the code, and the demo's models beside them.

In a checkout, where an editable install points too, they are its folders `configs/` and `demo/`; a wheel
brings the same two below `share/slotmatch/`.
"""

from __future__ import annotations

import functools
from importlib import metadata
from pathlib import Path
from typing import Any


@functools.cache
def _root() -> Path | None:
    """The folder that holds `configs/` and `demo/`; None where neither came with the code."""
    checkout = Path(__file__).parents[2]
    if (checkout / "configs").is_dir():
        return checkout
    try:
        files = metadata.files("slotmatch") or ()
    except metadata.PackageNotFoundError:
        return None
    demo = [file for file in files if file.match("share/slotmatch/configs/demo.yaml")]
    return Path(str(demo[0].locate())).resolve().parents[1] if demo else None


def shipped_configs() -> dict[str, Path]:
    """Their files by their names: `demo.yaml`, `methods/feature_kd.yaml`, …"""
    root = _root()
    if root is None:
        return {}
    folder = root / "configs"
    files = sorted(folder.rglob("*.yaml"), key=lambda file: (len(file.parts), file))
    return {file.relative_to(folder).as_posix(): file for file in files}


def find_config(path: str | Path) -> Path:
    """The file at `path`; where there is none, the shipped one of that name (`configs/` may stand before it).

    Raises:
        FileNotFoundError: neither is there; the message names the shipped ones.
    """
    if Path(path).exists():
        return Path(path)
    shipped = shipped_configs()
    name = Path(path).as_posix().removeprefix("configs/")
    if name not in shipped:
        raise FileNotFoundError(f"No such file; shipped are {', '.join(shipped) or 'none'}")
    return shipped[name]


def with_shipped_models(path: Path, values: dict[str, Any]) -> None:
    """Points a shipped config's models that are not where the command runs to those shipped beside it."""
    root = _root()
    if root is None or root / "configs" not in path.absolute().parents:
        return
    for section in ("teacher", "student"):
        model = values.get(section)
        if not isinstance(model, dict):
            continue
        for key in ("checkpoint", "backbone_weights"):
            name = model.get(key)
            if isinstance(name, str) and not Path(name).exists() and (root / name).exists():
                model[key] = str(root / name)
