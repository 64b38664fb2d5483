"""The table "Deployed": forms that are really run, each in its own process, and which models it shows."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import tiny_design, tiny_model

from benchmarks.deployed import measured_table, paper_models, random_forms
from pipeline.models import save_slot_model
from pipeline.report import streamed
from pipeline.report.costs import architecture
from pipeline.report.deployed import OWN, deployed_table
from pipeline.report.exports import find_deployed

DRAWN = tiny_design(3, 8, image_size=16, initializer="random")


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    return random_forms("Student", DRAWN, tmp_path_factory.mktemp("forms"))


def texts(row):
    return [cell.text for cell in row.cells]


def test_what_each_form_takes(forms, tmp_path):
    uris = {**forms.uris, "model_fp16.onnx": str(tmp_path / "deleted.onnx")}
    del uris["model_int8.onnx"]  # never exported
    table = deployed_table([replace(forms, uris=uris, scores={OWN: {"image_mbo": 0.25}})], runs=2)
    own, pt2, onnx, half, int8 = map(texts, table.rows)
    numbers = sum(p.numel() for p in tiny_model(image_size=16, initializer="random").parameters())
    assert own[0].startswith("Student (")
    assert float(own[1]) == pytest.approx(numbers / 1e6, rel=0.01)
    assert [own[2], int8[2]] == ["PyTorch, safetensors", "ONNX int8"]
    for row, file in (
        (own, f"{uris[OWN]}/model.safetensors"),
        (pt2, uris["model.pt2"]),
        (onnx, uris["model.onnx"]),
    ):
        assert float(row[3]) == pytest.approx(os.path.getsize(file) / 1e6, rel=0.01)
        assert all(float(cell) > 0 for cell in row[4:7])
    assert float(onnx[6]) < float(own[6])  # without PyTorch in it
    assert half[3:] == int8[3:] == ["–"] * 8
    assert own[7:] == ["–", "25.0", "–", "–"]
    assert any("PyTorch" in note and "onnxruntime" in note for note in table.notes)


def test_all_forms_stream_the_same_step(forms):
    """So their times compare."""
    random = np.random.default_rng(0)
    frame = random.integers(0, 256, (1, 16, 16, 3)).astype(np.float32)
    state = random.standard_normal((1, 3, 8), np.float32)
    after = []
    for key in (OWN, "model.pt2", "model.onnx"):
        on_threads, _ = streamed._opened(streamed.Form(forms.uris[key], 16, 3, 8))
        step = on_threads(torch.get_num_threads())
        after.append(step(frame, step(frame, state, np.array([True])), np.array([False])))
    assert after[0].shape == (1, 3, 8)
    assert all(np.allclose(after[0], other, atol=1e-5) for other in after[1:])


def test_a_form_that_cannot_be_run_is_named(forms, tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"broken\.onnx can't be run: .*INVALID_PROTOBUF"):
        streamed.measure(streamed.Form(str(broken), 16, 3, 8), 1, 1)


def test_models_are_the_teacher_and_a_student_of_each_size(record, tmp_path):
    for name, hidden in (("teacher", (32,)), ("small", (4,)), ("large", (8,))):
        save_slot_model(tiny_model(image_size=16, hidden=hidden), tmp_path / name)
    at = {name: str(tmp_path / name) for name in ("teacher", "small", "large", "gone")}
    records = [
        record("slotmatch", model_uri=at["small"], steps=100),
        record("slotmatch", model_uri=at["large"], steps=100, score=0.1),
        record("slotmatch", model_uri=at["large"], steps=200, score=0.2),
        record("no_kd", model_uri=at["large"], steps=300, score=0.3),
        record("teacher", model_uri=at["teacher"]),
        record("slotmatch", model_uri=at["gone"]),
        record("baseline"),
    ]
    found = find_deployed(records, beta=0.2)
    assert [model.uris for model in found.models] == [
        {OWN: at[name]} for name in ("teacher", "large", "small")
    ]
    assert found.models[1].scores[OWN]["image_mbo"] == 0.2
    assert found.run_ids == {records[i].run_id for i in (0, 2, 4)}
    assert found.form_ids == frozenset()
    assert "the rules of slotcontrast" in found.notes[0]
    assert find_deployed([], beta=0.2).models == ()


def test_the_benchmark_is_of_the_papers_sizes():
    names = {title: list(map(architecture, pair)) for title, pair in paper_models().items()}
    assert names == {
        "MOVi-E": ["ViT-B/14, 336², N = 15", "ViT-S/14, 336², N = 15"],
        "YTVIS-2021": ["ViT-B/14, 518², N = 7", "ViT-S/14, 518², N = 7"],
    }


@pytest.mark.slow
def test_the_benchmark_measures_every_form():
    table = measured_table([tiny_design(image_size=16), DRAWN], frames=1)
    assert len(table.rows) == 10
    assert all(float(cell) > 0 for row in table.rows for cell in texts(row)[3:7])
