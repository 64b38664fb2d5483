"""The streaming step, exported: in every kind of model what PyTorch computes, in three precisions."""

import contextlib
import itertools
import json
import re
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from kinds import build
from places import GOLDEN, ROOT

from pipeline.clips.sources.synthetic import SyntheticSettings, render_video
from pipeline.models import BackboneConfig, load_slot_model
from pipeline.models import export as exporting
from pipeline.models.export import (
    ExportError,
    check,
    describe,
    difference,
    step_differences,
    trace,
    write_onnx,
    write_pt2,
)
from pipeline.models.exported import ExportedModel, load_exported
from pipeline.models.precisions import write_half, write_int8
from pipeline.models.streaming import StreamingStep
from pipeline.registry import pyfunc

MODELS = {
    "student": lambda: load_slot_model(ROOT / "demo" / "teacher"),  # of a student's design, and trained
    "videosaur": lambda: build("videosaur"),
    "dinosaur": lambda: build("dinosaur"),
    # Its grid is not square, and not the backbone's own.
    "convolutional": lambda: build(
        "slotcontrast", backbone=BackboneConfig("test_convnext", 64, None, 8, (3, 5))
    ),
    "image model of learned slots": lambda: build("slotcontrast", predictor=False),
}
GOLDENS = {
    "slotcontrast golden": lambda: load_slot_model(GOLDEN / "slotcontrast_tiny.ckpt", num_heads=3),
    "videosaur golden": lambda: load_slot_model(GOLDEN / "videosaur_tiny.ckpt", num_heads=3, num_slots=4),
}
# Of 12 blocks each, which take their time.
PARAMETERS = [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in GOLDENS)]


@pytest.fixture(scope="module")
def chunks():
    """30 frames that are not the model's size, cut unevenly."""
    frames, _ = render_video(SyntheticSettings(videos=1, frames=30, size=100), 0)
    return [frames[:1], frames[1:18, :80], frames[18:]]


@pytest.fixture(scope="module", params=PARAMETERS)
def exported(request, tmp_path_factory):
    """A model and its ONNX file."""
    model, path = (MODELS | GOLDENS)[request.param](), tmp_path_factory.mktemp("exported") / "model.onnx"
    program = trace(model)
    write_onnx(program, path, describe(model, request.param))
    write_pt2(program, path.with_suffix(".pt2"), describe(model, request.param))
    return model, path


def test_thirty_frames_are_pytorchs(exported, chunks):
    model, path = exported
    for file in (path, path.with_suffix(".pt2")):
        found = check(model, file, chunks)
        assert max(found.slots, found.masks) < 1e-4
    # And so where it draws another noise, goes back, or gives slot attention's masks.
    options = {"noise_seed": 7, "rollout": "cyclic", "masks": "attention"}
    pairs = zip(model.stream(chunks, **options), load_exported(path).stream(chunks, **options), strict=True)
    for (frames, *own), (its_frames, *its) in pairs:
        assert frames is its_frames
        for a, b in zip(own, its, strict=True):
            torch.testing.assert_close(b, a, atol=1e-4, rtol=0)


def test_the_other_precisions_are_smaller_and_near(exported, chunks):
    model, path = exported
    half, int8 = (path.with_name(f"{name}.onnx") for name in ("half", "int8"))
    write_half(path, half)
    write_int8(path, int8)
    assert difference(model, load_exported(half), chunks).masks < 0.05
    assert half.stat().st_size < path.stat().st_size
    assert [load_exported(f).about["precision"] for f in (path, half, int8)] == ["fp32", "fp16", "int8"]
    about = load_exported(path).about
    if about["source"] == "student":  # the others have random masks, and more graph than weights
        assert half.stat().st_size < 0.55 * path.stat().st_size
        assert int8.stat().st_size < 0.45 * path.stat().st_size
        assert difference(model, load_exported(half), chunks).labels_agree > 0.999
        assert difference(model, load_exported(int8), chunks).labels_agree > 0.9


def test_numpy_and_onnxruntime_alone_run_it_by_what_it_says(exported):
    """As a caller in another language does; clips at different places of their videos go together."""
    model, path = exported
    session = onnxruntime.InferenceSession(path)
    about = json.loads(session.get_modelmeta().custom_metadata_map["slotmatch"])
    size, shape = about["size"], (1, about["num_slots"], about["slot_size"])
    frames = np.random.default_rng(0).integers(0, 256, (4, size, size, 3), np.uint8)
    noise = np.zeros(shape) if about["noise"] is None else np.reshape(about["noise"], shape)
    start = state = noise.astype(np.float32)
    for t, frame in enumerate(frames):
        first = np.array([t == 0])
        inputs = {"frames": frame[None].astype(np.float32), "state": state, "first": first}
        slots, masks, _, after = session.run(None, inputs)
        # Beside another clip that begins.
        inputs = {
            "frames": np.stack([frames[0], frame]).astype(np.float32),
            "state": np.concatenate([start, state]),
            "first": np.array([True, t == 0]),
        }
        both = session.run(["slots"], inputs)[0]
        np.testing.assert_allclose(both[1], slots[0], atol=1e-4)
        state = after
    *_, (_, own_slots, own_masks) = model.stream([frames])
    np.testing.assert_allclose(slots[0], own_slots[-1], atol=1e-4)
    np.testing.assert_allclose(masks[0].reshape(shape[1], -1), own_masks[-1], atol=1e-4)


def test_its_labels_are_the_models(exported, chunks):
    """Also by the code that a registered model carries."""
    model, path = exported
    frames = chunks[1][:6]
    (_, _, masks), *_ = model.stream([frames])
    expected = model.label_maps(masks, frames.shape[1:3])
    assert (load_exported(path).label_maps(masks, frames.shape[1:3]) == expected).all()
    registered = pyfunc.SlotMatchModel()
    registered.load_context(SimpleNamespace(artifacts={pyfunc.ARTIFACT: str(path.parent)}))
    # Of random models all slots are nearly alike, and rounding may choose.
    margin = (
        F.interpolate(masks.unflatten(-1, model.grid), frames.shape[1:3], mode="bilinear").topk(2, 1).values
    )
    clear = (margin[:, 0] - margin[:, 1] > 1e-4).numpy()
    assert (registered.predict(None, frames) == expected.numpy())[clear].all()


def test_the_files_name_no_place_of_the_machine_that_wrote_them(exported):
    _, path = exported
    for file in (path, path.with_suffix(".pt2")):
        assert not re.search(rb"site-packages|\.py\"", file.read_bytes())
    assert len(onnx.load(path).graph.node[0].metadata_props) == 0


def test_a_form_that_differs_is_refused_with_the_largest_difference(exported, chunks, tmp_path):
    model, path = exported
    proto = onnx.load(path)
    tensor = next(t for t in proto.graph.initializer if t.name.endswith("corrector.gru.bias_hh"))
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + 0.01, tensor.name))
    onnx.save(proto, tmp_path / "other.onnx")
    frames = step_differences(model, load_exported(tmp_path / "other.onnx"), chunks)
    largest = max(np.median(values) for values in frames.values())
    with pytest.raises(ExportError, match=f"differs .* by {largest:.2g} in the median frame's"):
        check(model, tmp_path / "other.onnx", chunks)


def bent(model, bend):
    """An exported form whose slots are bent in some frames."""
    step, frames = StreamingStep(model), itertools.count()

    @torch.no_grad()
    def bent_step(pixels, state, first):
        slots, *others = step(torch.from_numpy(pixels), state, torch.tensor([first]))
        return bend(next(frames), slots), *others

    return ExportedModel(bent_step, describe(model, "bent"))


@pytest.mark.parametrize(
    ("bend", "message"),
    [
        (lambda frame, slots: slots * torch.nan, "by inf in the median frame's slots"),
        (lambda frame, slots: slots + 0.0002, "by 0.0002 in the median frame's slots"),
        (lambda frame, slots: slots + 0.02 * (frame == 0), "by 0.02 in a frame's slots"),
        # What two competing slots make of rounding.
        (lambda frame, slots: slots + 0.001 * (frame == 9), None),
    ],
)
def test_what_is_bent_in_all_frames_or_much_in_one_is_refused(chunks, tmp_path, monkeypatch, bend, message):
    model = build("slotcontrast").eval()
    monkeypatch.setattr(exporting, "load_exported", lambda _: bent(model, bend))
    refused = pytest.raises(ExportError, match=message) if message else contextlib.nullcontext()
    with refused:
        check(model, tmp_path / "x.onnx", chunks)


def test_a_step_that_is_not_the_models_is_refused(chunks, tmp_path, monkeypatch):
    """Though the file computes what that step does."""
    model = build("slotcontrast").eval()
    advance = StreamingStep._advance
    monkeypatch.setattr(
        StreamingStep,
        "_advance",
        lambda self, features, state, first: advance(self, features, state, torch.ones_like(first)),
    )
    path = tmp_path / "model.pt2"
    write_pt2(trace(model), path, describe(model, "x"))
    with pytest.raises(ExportError, match="in the median frame's"):
        check(model, path, chunks)


def test_what_cannot_be_opened_says_why(tmp_path):
    for name in ("a.onnx", "a.pt2"):
        (tmp_path / name).write_bytes(b"no such thing")
        with pytest.raises(ValueError, match=f"{name}: can't be read as"):
            load_exported(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.onnx"):
        load_exported(tmp_path / "nowhere.onnx")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [])
    graph.output.append(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1]))
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "another.onnx")
    with pytest.raises(ValueError, match="was not written by slotmatch export"):
        load_exported(tmp_path / "another.onnx")
