"""The web page of a model: what lies beside its ONNX files for a browser to run them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

PAGE = Path(__file__).with_name("page")
RUNTIME = "runtime"  # the folder of the page that onnxruntime-web is copied to
# Each script brings its own loader and finds its .wasm beside it. They are renamed, since some servers don't know
# that .mjs is JavaScript, and then browsers refuse it.
SCRIPTS = {"ort.wasm.bundle.min.mjs": "ort.wasm.js", "ort.webgpu.bundle.min.mjs": "ort.webgpu.js"}
NOTICES = ("LICENSE", "ThirdPartyNotices.txt")
HOW_TO_GET = "npm pack onnxruntime-web && tar xzf onnxruntime-web-*.tgz"


def runtime_files(folder: str | Path) -> dict[str, Path]:
    """What a page needs of onnxruntime-web, by the name that it gets there.

    The package of npm has no licence file; the one of Python, built of the same source, has.

    Args:
        folder: the unpacked package, which has a folder `dist`.

    Raises:
        ValueError: it isn't there, or is none; says how to get it.
    """
    import onnxruntime

    dist = Path(folder) / "dist"
    files = {name: dist / script for script, name in SCRIPTS.items()}
    for script in files.values():
        _check(script)
    for script in list(files.values()):
        for name in set(re.findall(r"ort-wasm[\w.-]*\.wasm", script.read_text())):
            files[name] = _check(dist / name)
    return files | {name: Path(onnxruntime.__file__).with_name(name) for name in NOTICES}


def _check(file: Path) -> Path:
    if not file.is_file():
        raise ValueError(
            f"there is no {file}: --runtime names the folder of onnxruntime-web (tested: 1.30); "
            f"`{HOW_TO_GET}` makes it, as the folder 'package'"
        )
    return file


def write_page(runtime: str | Path, folder: Path) -> None:
    """Writes the page, and below it onnxruntime-web, into a local folder; its models are written by `export`.

    Raises:
        ValueError: as `runtime_files`.
    """
    (folder / RUNTIME).mkdir()
    for name, file in runtime_files(runtime).items():
        shutil.copyfile(file, folder / RUNTIME / name)
    for file in PAGE.iterdir():
        shutil.copyfile(file, folder / file.name)
