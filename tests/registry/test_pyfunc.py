"""A registered model, where nothing of ours is installed: MLflow, numpy and onnxruntime run it."""

import os
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from places import ROOT
from safetensors.torch import load_file
from services import MLflowServer
from students import evaluation, make_finished_run
from tiny_models import tiny_model

from pipeline import storage, tracking
from pipeline.clips.sources.synthetic import SyntheticSettings, render_video
from pipeline.config import resolve_config
from pipeline.models import BackboneError, BackboneSource, CheckpointHints, load_slot_model
from pipeline.models.export import ExportError
from pipeline.models.exported import load_exported
from pipeline.registry import pack, pyfunc
from pipeline.registry.stage import pull, register_run
from pipeline.segment.stage import segment
from pipeline.tracking.versions import load_named

MODULE = "a user's module called pipeline on the path"
LOAD = """
import sys
import mlflow, numpy
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/slotmatch@champion")
numpy.save("labels.npy", model.predict(numpy.load("frames.npy")))
import pipeline
assert pipeline.MINE
print(sorted({name.split(".")[0] for name in sys.modules}))
"""


@pytest.fixture
def elsewhere(tmp_path):
    """A user's folder: frames that are neither square nor the model's size, and modules that are not ours."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    frames, _ = render_video(SyntheticSettings(videos=1, frames=10, size=128, seed=3), 0)
    np.save(folder / "frames.npy", frames[:, 10:, :90])
    for name in ("pipeline", "jobs"):
        (folder / f"{name}.py").write_text("MINE = True\n")
    return folder


@pytest.fixture(scope="module")
def teacher():
    """The demo's, whose slots are objects."""
    return load_slot_model(ROOT / "demo" / "teacher")


def register(model, tmp_path, *settings, slim=None):
    config = resolve_config({}, [f"storage.root={tmp_path / 'root'}", *settings])
    run = make_finished_run(config, str(tmp_path / "root" / "students" / "demo"), model=model, slim=slim)
    register_run(config, run, evaluation(0.5))
    return config


@pytest.fixture(scope="module")
def registry(teacher, tmp_path_factory):
    """Where the demo's teacher is registered as a student."""
    return register(teacher, tmp_path_factory.mktemp("registry")).tracking_uri


def load_elsewhere(python, folder, tracking_uri):
    """Its labels, and the modules that making them imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MLFLOW"))}
    environment["PYTHONPATH"] = str(folder)
    done = subprocess.run(
        [str(python), "-c", LOAD, tracking_uri],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return np.load(folder / "labels.npy"), done.stdout


def agreement(model, folder, labels):
    """Share of pixels whose label is that of the PyTorch form."""
    frames = np.load(folder / "frames.npy")
    *_, (_, _, masks) = model.stream([frames])
    expected = model.label_maps(masks, frames.shape[1:3]).numpy()
    assert labels.dtype == np.uint8
    assert len(np.unique(expected)) > 1
    return (labels == expected).mean()


@pytest.mark.fault(MODULE, "register", "the model loads without this package; labels as PyTorch's")
def test_a_users_own_pipeline_module_is_not_in_the_way(elsewhere, teacher, registry):
    labels, modules = load_elsewhere(sys.executable, elsewhere, registry)
    assert agreement(teacher, elsewhere, labels) > 0.999
    assert not {f"'{name}'" for name in ("torch", "timm", "safetensors", "ray", "onnx")} & set(
        modules.strip("[]\n").split(", ")
    )


@pytest.mark.slow
def test_an_environment_of_mlflow_numpy_and_onnxruntime_alone(tmp_path, elsewhere, teacher):
    """MLflow's own small package, whose `pyfunc` imports pandas, and a server as the registry."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
    packages = ["mlflow-skinny", "pandas", "numpy", "onnxruntime"]
    command = [str(python), "-m", "pip", "install", "--quiet", *packages, "-c", str(ROOT / "constraints.txt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    if done.returncode:
        pytest.skip(f"pip can't install {', '.join(packages)} here: {done.stderr.strip().splitlines()[-1]}")
    (tmp_path / "server").mkdir()
    server = MLflowServer(tmp_path / "server")
    server.start()
    try:
        register(teacher, tmp_path, f"mlflow.tracking_uri={server.uri}")
        labels, _ = load_elsewhere(python, elsewhere, server.uri)
    finally:
        server.kill()
    assert agreement(teacher, elsewhere, labels) > 0.999


def test_pull_brings_both_forms(tmp_path, elsewhere, teacher, registry):
    pull("models:/slotmatch@champion", tmp_path / "pulled", registry)
    frames = np.load(elsewhere / "frames.npy")
    for pulled in (load_slot_model(tmp_path / "pulled"), load_exported(tmp_path / "pulled" / "model.onnx")):
        *_, (_, _, masks) = pulled.stream([frames])
        labels = pulled.label_maps(masks, frames.shape[1:3]).numpy()
        assert agreement(teacher, elsewhere, labels) > 0.999


def test_a_student_that_draws_its_slots_starts_from_the_same_noise(tmp_path):
    model = tiny_model(initializer="random", decoder="slot_mixer", corrector_mlp=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # masks that say something
    config = register(model, tmp_path)
    mlflow.set_tracking_uri(config.tracking_uri)
    champion = mlflow.pyfunc.load_model("models:/slotmatch@champion")
    frames = np.random.default_rng(0).integers(0, 256, (5, 40, 50, 3), np.uint8)
    *_, (_, _, masks) = model.stream([frames])
    expected = model.label_maps(masks, (40, 50)).numpy()
    assert len(np.unique(expected)) > 1
    assert (champion.predict(frames) == expected).mean() > 0.999


def test_a_slim_version_is_pulled_and_segments_and_its_exported_form_is_whole(tmp_path, elsewhere, teacher):
    store = str(tmp_path / "root" / "backbones")
    config = register(teacher, tmp_path, slim=BackboneSource("random", store))
    pull("models:/slotmatch@champion", tmp_path / "pulled", config.tracking_uri)
    assert "encoder.backbone.model.blocks.0.mlp.fc1.weight" not in load_file(
        tmp_path / "pulled/model.safetensors"
    )
    frames = np.load(elsewhere / "frames.npy")
    pulled = load_slot_model(tmp_path / "pulled")
    *_, (_, _, masks) = pulled.stream([frames])
    assert agreement(teacher, elsewhere, pulled.label_maps(masks, frames.shape[1:3]).numpy()) == 1

    video = tmp_path / "video"
    video.mkdir()
    for number, frame in enumerate(frames[:3]):
        Image.fromarray(frame).save(video / f"{number}.png")
    named = load_named("models:/slotmatch/1", CheckpointHints(), config.tracking_uri)
    segmented = segment(named, video, tmp_path / "out")
    assert len(list(Path(segmented["labels"]).glob("*.png"))) == 3
    storage.delete(store)
    with pytest.raises(BackboneError, match=r"backbones/\w{16}/backbone\.safetensors"):
        load_slot_model(tmp_path / "pulled")
    exported = load_exported(tmp_path / "pulled" / "model.onnx")
    *_, (_, _, masks) = exported.stream([frames])
    assert agreement(teacher, elsewhere, exported.label_maps(masks, frames.shape[1:3]).numpy()) > 0.999


def test_a_student_that_cannot_be_exported_is_registered_with_the_package(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise ExportError("the exported form differs")

    monkeypatch.setattr(pack, "check", refuse)
    model = tiny_model().eval()
    store = str(tmp_path / "backbones")
    config = register(model, tmp_path, slim=BackboneSource("random", store))
    storage.delete(store)  # such a version is whole, whatever the run keeps
    assert "WARNING, the exported form differs" in capsys.readouterr().err
    mlflow.set_tracking_uri(config.tracking_uri)
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), np.uint8)
    labels = mlflow.pyfunc.load_model("models:/slotmatch@champion").predict(frames)
    *_, (_, _, masks) = model.stream([frames])
    assert (labels == model.label_maps(masks, (40, 50)).numpy()).all()
    source = tracking.connect(config).get_model_version("slotmatch", "1").source
    assert "code" in storage.list_names(source.removeprefix("file://"))
    card = tracking.connect(config).get_model_version("slotmatch", "1").description
    assert "needs MLflow, PyTorch, timm and safetensors" in card
    assert "model.onnx" not in card


@pytest.mark.parametrize("size", [(32, 32), (17, 40), (300, 211), (7, 900)])
def test_numpy_resizes_as_pytorch(size):
    planes = np.random.default_rng(0).uniform(0, 255, (3, *size)).astype(np.float32)
    for resize, options in ((pyfunc.bicubic, {"mode": "bicubic", "antialias": True}), (pyfunc.bilinear, {})):
        expected = F.interpolate(torch.from_numpy(planes)[None], (56, 48), **{"mode": "bilinear", **options})[
            0
        ]
        found = pyfunc.resized(planes, resize(size[0], 56), resize(size[1], 48))
        np.testing.assert_allclose(found, expected.numpy(), atol=5e-3)
