"""`slotmatch export`: what it writes, and that what it writes segments videos as the model does."""

import json

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from places import ROOT
from tiny_models import tiny_model
from video_files import write_noise

from jobs import export, segment
from jobs._main import run
from pipeline.config import Config
from pipeline.models import save_slot_model
from pipeline.models.export import ExportError
from pipeline.registry import export as stage

FILES = {"model.onnx": "fp32", "model.pt2": "fp32", "model_fp16.onnx": "fp16", "model_int8.onnx": "int8"}


def summary(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_an_exported_model_segments_a_video_as_the_model_does(tmp_path, capsys):
    write_noise(tmp_path / "a.mp4", 34, (48, 80), codec="mpeg4")
    teacher, out, video = str(ROOT / "demo" / "teacher"), tmp_path / "out", str(tmp_path / "a.mp4")
    assert run(export.JOB, [teacher, str(out), f"video={video}"]) == 0
    done = summary(capsys)
    assert {name: form["precision"] for name, form in done["forms"].items()} == FILES
    assert {path.name for path in out.iterdir()} == {*FILES, "export.json"}
    for name, form in done["forms"].items():
        assert form["bytes"] == (out / name).stat().st_size
        assert (
            form["precision"] != "fp32"
            or max(form["difference"]["slots"], form["difference"]["masks"]) < 1e-4
        )
    about = json.loads((out / "export.json").read_text())
    assert (about["source"], about["size"], about["num_slots"]) == (teacher, 96, 6)
    assert about["forms"] == done["forms"]
    inputs = {i.name: i.shape[1:] for i in onnxruntime.InferenceSession(out / "model.onnx").get_inputs()}
    assert inputs == {"frames": [96, 96, 3], "state": [6, about["slot_size"]], "first": []}

    labels = {}
    for model in (teacher, out, out / "model.onnx", out / "model.pt2", out / "model_fp16.onnx"):
        assert run(segment.JOB, [video, f"model={model}", f"out={tmp_path / 'segmented'}"]) == 0
        files = sorted((tmp_path / "segmented" / "a_labels").iterdir())
        labels[str(model)] = np.stack([np.asarray(Image.open(file)) for file in files])
    expected = labels.pop(teacher)
    assert expected.shape == (34, 48, 80)
    assert len(np.unique(expected)) > 1
    assert {
        model: bool((found == expected).mean() > 0.999) for model, found in labels.items()
    } == dict.fromkeys(labels, True)


def test_a_refused_export_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    save_slot_model(tiny_model(), tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.onnx").write_text("of an earlier export")

    def differs(*_):
        raise ExportError("the exported form (.onnx) differs from the PyTorch model by 0.3 in its slots")

    monkeypatch.setattr(stage, "check", differs)
    assert run(export.JOB, [str(tmp_path / "model"), str(tmp_path / "out")]) == 1
    assert "by 0.3 in its slots" in summary(capsys)["error"]
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["of an earlier export"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "OUT"], "nowhere"),
        ([str(ROOT / "demo" / "teacher"), "OUT", "video=nowhere.mp4"], "there is no video 'nowhere.mp4'"),
        (
            [str(ROOT / "tests" / "golden" / "videosaur_tiny.ckpt"), "OUT", "num_heads=3"],
            "num_slots: must be given",
        ),
    ],
)
def test_what_cannot_be_exported_is_named(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert run(export.JOB, words) != 0
    assert message in summary(capsys)["error"]
    assert not (tmp_path / "OUT").exists()


def test_an_exported_model_is_not_exported_again():
    class Exported:
        config = None

    with pytest.raises(ExportError, match=r"x\.onnx is an exported model already"):
        stage.export(Config(), Exported(), "x.onnx", "OUT")
