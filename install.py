"""Installs packages into the environment of the Python that runs this, by uv; what `make` calls.

uv takes seconds where pip takes minutes, and reads none of pip's settings: so it is told those that say where packages
come from, a mirror or a folder of wheels. Where it can't be had, or fails, pip installs.

    python install.py --constraint constraints.txt --editable '.[dev]'
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Sequence

# pip's settings, the variables that tell them to uv, and what stands between several values there.
SETTINGS = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "proxy": ("ALL_PROXY", " "),
}
SECTIONS = ("global", "install", ":env:")  # the later ones win
# uv compiles nothing, as pip does. What a line of stages imports is compiled once, here, before all of Ray's processes
# do it at the same time.
IMPORTED = """
import pipeline.line, pipeline.distill.ray_train, pipeline.report.stage
from pipeline.models._timm import import_timm
import_timm()
import mlflow.pyfunc, onnxruntime, onnxscript, ray.data, ray.train.torch, ray.tune, torch.onnx
"""


def uv_settings(listed: str) -> dict[str, str]:
    """Environment variables that tell uv what `pip config list` says."""
    found: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in found and option in SETTINGS:
            found[section][option] = ast.literal_eval(value)
    settings = {option: value for section in SECTIONS for option, value in found[section].items()}
    told = {SETTINGS[o][0]: SETTINGS[o][1].join(value.split()) for o, value in settings.items()}
    return {**told, "UV_INDEX_STRATEGY": "unsafe-best-match"}  # the best version of all places, as pip does


def _run(*words: str, environment: dict[str, str] | None = None) -> bool:
    return subprocess.run([sys.executable, *words], env=environment).returncode == 0


def _by_uv(arguments: Sequence[str]) -> bool:
    if not _run("-m", "pip", "install", "--quiet", "--constraint", "constraints.txt", "uv"):
        return False
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    quiet = [] if sys.stderr.isatty() else ["--quiet"]  # its progress, on a terminal
    words = ("-m", "uv", "pip", "install", *quiet, "--python", sys.executable, *arguments)
    return _run(*words, environment={**uv_settings(listed.stdout), **os.environ})


def main(arguments: Sequence[str]) -> int:
    if _by_uv(arguments):
        writing = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        _run("-c", IMPORTED, environment={**writing, "RAY_TRAIN_V2_ENABLED": "1"})
        return 0
    print("uv could not install this, so pip does; it takes a few minutes", file=sys.stderr)
    _run("-m", "pip", "install", "--quiet", "--upgrade", "pip")
    return int(not _run("-m", "pip", "install", "--quiet", *arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
