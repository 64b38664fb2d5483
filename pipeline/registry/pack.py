"""What a version of the registry holds: the model's files and its exported form, and the code that runs that.

A model that can't be exported is stored with this package instead, which then has to be the module `pipeline`
where it is loaded.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifacts.manifests import MODEL_FOLDER
from pipeline.clips.sources import VideoRef, read_video
from pipeline.clips.sources.synthetic import SyntheticSettings, video_file, write_dataset
from pipeline.log import log
from pipeline.models import load_slot_model, save_slot_model
from pipeline.models.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from pipeline.models.export import ExportError, check, describe, exportable, trace, write_onnx
from pipeline.models.exported import ONNX_FILE
from pipeline.models.slim import read_frozen_backbone

CHECK_FRAMES = 30  # of a video, that an exported form is held against the model on
CHUNK_FRAMES = 8
_GENERATED = SyntheticSettings(videos=1, frames=CHECK_FRAMES, size=128)


def frames_of(video: VideoRef | None = None) -> Iterator[np.ndarray]:
    """The first `CHECK_FRAMES` frames of a video, of a generated one by default, in chunks `(t, h, w, 3)` uint8.

    Raises:
        BadVideo: it can't be decoded.
    """
    if video is None:
        with tempfile.TemporaryDirectory() as scratch:
            write_dataset(_GENERATED, scratch)
            path = Path(scratch) / video_file(0)
            yield from frames_of(VideoRef(path.stem, str(path), bytes=path.stat().st_size))
        return
    chunk: list[np.ndarray] = []
    for count, frame in enumerate(read_video(video), 1):
        chunk.append(frame.pixels)
        if len(chunk) == CHUNK_FRAMES or count == CHECK_FRAMES:
            yield np.stack(chunk)
            chunk = []
        if count == CHECK_FRAMES:
            return
    if chunk:
        yield np.stack(chunk)


def model_arguments(model: Path, source: str, scratch: Path) -> dict[str, Any]:
    """The arguments of MLflow's `save_model` that store a model folder as it is loaded.

    Args:
        source: where the model is, for those who look at its exported form.
        scratch: an empty folder, where what is stored is put together.
    """
    from pipeline.registry import pyfunc

    folder = scratch / MODEL_FOLDER
    folder.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(model / name, folder / name)
    loaded = load_slot_model(model)
    try:
        slot_model = exportable(loaded, source)
        write_onnx(trace(slot_model), folder / ONNX_FILE, describe(slot_model, source))
        check(slot_model, folder / ONNX_FILE, list(frames_of()))
    except ExportError as error:
        log(
            f"register: WARNING, {error}. The version is registered all the same, but loads only where this package "
            "is the module 'pipeline'"
        )
        (folder / ONNX_FILE).unlink(missing_ok=True)
        if read_frozen_backbone(folder) is not None:
            save_slot_model(loaded, folder)  # whole, as an exported form is
        return _with_package(folder, scratch)
    return {
        "python_model": pyfunc.__file__,
        "artifacts": {pyfunc.ARTIFACT: str(folder)},
        "pip_requirements": _pinned("mlflow", "numpy", "onnxruntime"),
    }


def _with_package(folder: Path, scratch: Path) -> dict[str, Any]:
    from pipeline.registry import pyfunc_torch

    package = Path(__file__).parents[1]
    code = scratch / "code" / package.name
    shutil.copytree(package, code, ignore=shutil.ignore_patterns("__pycache__"))
    return {
        "python_model": pyfunc_torch.__file__,
        "artifacts": {pyfunc_torch.ARTIFACT: str(folder)},
        "code_paths": [str(code)],
        "pip_requirements": _pinned("mlflow", "torch", "timm", "numpy", "safetensors"),
    }


def _pinned(*packages: str) -> list[str]:
    return [f"{package}=={installed_version(package).split('+')[0]}" for package in packages]
