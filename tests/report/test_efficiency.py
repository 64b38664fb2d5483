"""Table 2's figures against the paper's, and the clock against itself."""

import pytest
import torch
from places import python
from tiny_models import tiny_design, tiny_model, tiny_section, tiny_vit

from pipeline.config import resolve_config
from pipeline.models import BackboneConfig, SlotModelConfig, save_slot_model
from pipeline.report import costs
from pipeline.report.costs import config_models, cost_table, measure_costs
from pipeline.report.efficiency import (
    PAPER_FRAMES,
    PAPER_STUDENT,
    PAPER_TEACHER,
    count_macs,
    count_parameters,
    measure_latencies,
    measure_latency,
)
from pipeline.report.tables import paper_numbers

TINY = tiny_design(image_size=16)
PUBLISHED = [(PAPER_TEACHER, "teacher", 91.02, 147.1), (PAPER_STUDENT, "student", 25.17, 54.44)]


@pytest.mark.parametrize(("model", "role", "parameters", "gmacs"), PUBLISHED)
def test_parameters_and_macs_are_the_papers(counted_once, model, role, parameters, gmacs):
    printed, cost = paper_numbers()["table_2"][role], costs.count_cost(model)
    assert cost.parameters / 1e6 == pytest.approx(parameters, abs=0.005)
    assert round(cost.parameters / 1e6, 1) == printed["parameters"]
    assert cost.macs_paper / 1e9 == pytest.approx(gmacs, abs=0.01)
    assert cost.macs_paper * PAPER_FRAMES / 1e9 == pytest.approx(printed["gflops"], abs=0.1)
    assert cost.macs_paper < cost.macs_run < cost.macs_products


def test_macs_of_a_tiny_model_are_those_of_the_formulas():
    first, second = (count_macs(TINY, frames) for frames in (1, 2))
    P, F, N, d, tokens = 4, 16, 3, 8, 5
    vit = P * 3 * 64 * F + tokens * (F * 3 * F + F * F + 2 * F * 4 * F)
    projection = P * (F * 2 * F + 2 * F * d)
    keys_values = P * 2 * d * d
    iteration = N * (d * d + 2 * 3 * d * d + 2 * d * 4 * d)
    predictor = N * (4 * d * d + 2 * d * 4 * d)
    decoder = N * P * (d * 8 + 8 * (F + 1))
    assert first.layers == vit + projection + keys_values + 3 * iteration + predictor + decoder
    assert second.layers - first.layers == first.layers - iteration  # two iterations on later frames
    assert first.activations == (tokens * 4 * F) + P * 2 * F + 3 * N * 4 * d + N * 4 * d + N * P * 8
    assert first.attention == 2 * tokens**2 * F + 3 * 2 * N * P * d + 2 * N**2 * d


def test_the_fast_decoder_computes_less():
    wide = tiny_design(3, 64, image_size=16, hidden=(64, 64, 64))
    plain, fast = (count_macs(wide, 1, fast_decoder=fast).products for fast in (False, True))
    assert 0.5 < fast / plain < 0.99


def test_latency_is_the_median_per_frame_without_the_warmup(monkeypatch):
    model = tiny_model(image_size=16).eval()
    ticks = iter([0, 100, 0, 2, 0, 4, 0, 50])  # seconds at the start and end of a warm-up and three runs
    monkeypatch.setattr("pipeline.report.efficiency.perf_counter", lambda: next(ticks))
    assert measure_latency(model, frames=2, runs=3, warmup=1) == 2.0


def test_models_take_turns_and_random_slots_are_drawn():
    order = []
    models = []
    for initializer in ("learned", "random"):
        model = tiny_model(image_size=16, initializer=initializer).eval()
        model.register_forward_pre_hook(lambda *_, which=initializer: order.append(which))
        models.append(model)
    seconds = measure_latencies(models, frames=1, runs=2, warmup=0)
    assert order == ["learned", "random"] * 2
    assert all(0 < s < 10 for s in seconds)


def tiny_config(*overrides):
    teacher = tiny_section(num_slots=3, slot_size=8)
    values = {"teacher": teacher, "student": tiny_section()}
    return resolve_config(values, overrides)


def test_the_configs_own_models_are_built_from_a_section_or_a_checkpoint(tmp_path):
    assert config_models(tiny_config())[1] == TINY
    save_slot_model(tiny_model(image_size=16), tmp_path / "teacher")
    config = tiny_config(f"teacher.checkpoint={tmp_path / 'teacher'}", "teacher.slot_size=12")
    assert [model.slot_size for model in config_models(config)] == [8, 8]


def test_table_2_without_measuring_and_without_a_teacher(counted_once, tmp_path):
    pairs, notes = measure_costs(tiny_config(f"teacher.checkpoint={tmp_path / 'none'}"), runs=0)
    table = cost_table(paper_numbers(), pairs, notes)
    assert [row.cells[0].text.split(" (")[0] for row in table.rows] == ["Teacher", "SlotMatch", "Reduction"]
    assert [cell.text for cell in table.rows[2].cells[1:3]] == ["3.62×", "3.61×"]
    assert {row.cells[7].text for row in table.rows} == {"–"}
    assert any("none" in note for note in table.notes)


def test_the_configs_own_models_are_rows_of_table_2(counted_once):
    pairs, notes = measure_costs(tiny_config("student.decoder_hidden_sizes=[4]"), runs=0)
    rows = cost_table(paper_numbers(), pairs, notes).rows
    assert len(rows) == 6
    assert "16², N = 3" in rows[3].cells[0].text
    assert rows[3].cells[2].text == "–"  # the paper has none such


def test_efficiency_needs_neither_ray_nor_mlflow():
    big = "{'ray', 'mlflow', 'pydantic'} & set(sys.modules)"
    python("-c", f"import pipeline.report.efficiency, sys; assert not {big}")


def test_counting_allocates_no_weights():
    huge = SlotModelConfig(BackboneConfig(None, 16, tiny_vit(1 << 16, 40)), 3, 8)
    assert count_parameters(huge) > 1e12
    assert torch.get_default_device().type == "cpu"
