"""Means over seeds, who is chosen, and what the table and the plot show."""

import csv
import io
import json
import math

import pytest

from pipeline.artifacts.manifests import Rules
from pipeline.config import resolve_config
from pipeline.evaluate.records import Evaluation
from pipeline.evaluate.table import plain_text
from pipeline.sweep.page import page_files, sweep_chart
from pipeline.sweep.results import Result, as_csv, as_json, choose_best, sweep_table, varied_number
from pipeline.sweep.settings import Setting

LEVELS = ("image_fg_ari", "image_mbo", "video_fg_ari", "video_mbo")


def result(name, scores, values=None, **more):
    """Seeds 0, 1, … with the same number for all scores."""
    by_seed = {seed: dict.fromkeys(LEVELS, score) for seed, score in enumerate(scores)}
    return Result(Setting(name, values or {}), by_seed, **more)


def beta(value, scores, **more):
    return result(f"beta = {value:g}", scores, {"distill.beta": value}, **more)


def chosen(*results):
    best = choose_best(results, "video_mbo")
    return best.result.setting.name, best.seed


def test_the_best_mean_is_chosen_and_not_the_luckiest_seed():
    steady, lucky = beta(0.2, [0.39, 0.43, 0.40]), beta(0.5, [0.1, 0.9, 0.15])
    assert chosen(steady, lucky) == ("beta = 0.2", 2), "40.0 is nearest to the mean of 40.7"
    best = choose_best([steady, lucky], "video_mbo")
    assert best.reason == (
        "beta = 0.2 has the best mean video mBO of 2 settings, 40.67 ± 2.08; of its 3 seeds 2 is nearest to that, "
        "with 40.00"
    )


def test_of_two_seeds_that_are_equally_far_the_first_is_taken():
    assert chosen(beta(0.1, [0.2, 0.4])) == ("beta = 0.1", 0)
    assert chosen(beta(0.1, [0.4, 0.2])) == ("beta = 0.1", 0)


def test_what_is_left_of_a_setting_does_not_contend_with_whole_ones():
    survivor = beta(0.8, [0.9], stopped={1: 20}, failed={2: "NonFiniteLoss: x"})
    assert chosen(survivor, beta(0.2, [0.3, 0.3, 0.3])) == ("beta = 0.2", 0)
    assert chosen(survivor) == ("beta = 0.8", 0)
    assert choose_best([beta(0.8, [], failed={0: "x"})], "video_mbo") is None


def test_settings_of_more_seeds_contend_with_those_of_fewer():
    assert chosen(beta(0.2, [0.3] * 5), beta(0.5, [0.4] * 3)) == ("beta = 0.5", 0)
    stopped = beta(0.5, [0.4] * 3, stopped={3: 20})
    assert chosen(beta(0.2, [0.3] * 5), stopped) == ("beta = 0.2", 0)


def test_a_seed_without_a_score_is_none():
    found = beta(0.1, [0.2, math.nan, 0.4])
    assert found.mean("video_mbo") == pytest.approx(0.3)
    assert chosen(found)[1] in (0, 2)


TEACHER = {"teacher": {**dict.fromkeys(LEVELS, 0.5), "slots_in_use": 4.0}}


def table_of(*results):
    grid = {"grid": dict.fromkeys(LEVELS, 0.25)}
    return sweep_table(results, TEACHER, grid, score="video_mbo", dataset="clay", notes=["Note."])


def test_table_4():
    results = [
        beta(0.1, [0.30, 0.32]),
        beta(0.2, [0.41, 0.43]),
        beta(0.3, [0.6], failed={1: "NonFiniteLoss: the gradient"}),
        beta(0.5, [], stopped={0: 1000, 1: None}),
    ]
    table = table_of(*results)
    assert [[cell.text for cell in row.cells] for row in table.rows] == [
        ["beta = 0.1", "2 of 2", *["31.0 ± 1.41 (n=2)"] * 4],
        ["beta = 0.2", "2 of 2", *["42.0 ± 1.41 (n=2)"] * 4],
        ["beta = 0.3", "1 of 2", *["60.0"] * 4],
        ["beta = 0.5", "0 of 2", *["–"] * 4],
        ["teacher", "–", *["50.0"] * 4],
        ["grid", "–", *["25.0"] * 4],
    ]
    shown = plain_text(table)
    assert "beta = 0.3, seed 1 failed: NonFiniteLoss: the gradient" in shown
    assert "beta = 0.5, seed 0 was stopped early after step 1,000." in shown
    assert "(clay)" in shown
    assert "sample standard deviation" in shown
    lines = shown.splitlines()
    assert len({len(line) for line in lines[1:8]}) == 1, "columns are in line"


def test_all_numbers_for_other_programs():
    results = [beta(0.1, [0.3, 0.5]), beta(0.2, [], failed={0: "broke, badly"})]
    first, second = csv.DictReader(io.StringIO(as_csv(results)))
    assert (first["setting"], first["distill.beta"], first["video_mbo_n"]) == ("beta = 0.1", "0.1", "2")
    assert float(first["video_mbo_mean"]) == pytest.approx(0.4)
    assert float(first["video_mbo_std"]) == pytest.approx(0.02**0.5)
    assert (second["failed"], second["video_mbo_mean"], second["video_mbo_n"]) == ("1", "", "0")
    numbers = json.loads(json.dumps(as_json(results, TEACHER)))
    assert numbers["settings"][0]["scores"]["1"]["video_mbo"] == 0.5
    assert numbers["settings"][1]["failed"] == {"0": "broke, badly"}
    assert numbers["others"]["teacher"]["video_mbo"] == 0.5


def test_the_files_of_a_page():
    results = [beta(0.1, [0.3, 0.5]), beta(0.2, [0.2, math.nan])]
    words, warning = "clips of 4 frames", "FG-ARI says nothing here."
    rules = Rules(name="paper", in_words=words, fingerprint="f00", warnings=(warning,))
    evaluation = Evaluation("evaluations/e", results[0].scores[0], rules, videos=60)
    best = choose_best(results, "video_mbo")
    config = resolve_config({}, ["dataset.name=clay", "evaluate.score=video_mbo"])
    found, table = page_files("5a1ad", results, TEACHER, {}, evaluation, best, config)
    files = dict(found)
    protocol = "Protocol paper: clips of 4 frames; 60 videos."
    assert table.notes[-3:] == (protocol, warning, f"Chosen: {best.reason}.")
    assert files["table.txt"].decode() == plain_text(table) + "\n"
    assert files["table.csv"].decode() == as_csv(results)
    page = files["table.md"].decode()
    assert page.startswith("# Sweep 5a1ad\n")
    assert "| beta = 0.1 | 2 of 2 | **40.0 ± 14.14 (n=2)** |" in page
    assert "![Scores](plot.png)" in page
    numbers = json.loads(files["scores.json"], parse_constant=pytest.fail)
    assert numbers["best"]["setting"] == "beta = 0.1"
    assert numbers["settings"][1]["scores"]["1"]["video_mbo"] is None, "JSON has no NaN"
    assert files["plot.png"].startswith(b"\x89PNG")


def test_the_plot_is_over_the_one_number_that_differs():
    betas = [beta(value, [value, value + 0.1]) for value in (0.5, 0.1, 0.8)]
    assert varied_number(betas) == "distill.beta"
    axes = sweep_chart(betas, TEACHER).axes
    assert [a.get_title() for a in axes] == ["image FG-ARI", "image mBO", "video FG-ARI", "video mBO"]
    line = axes[3].containers[0].lines[0]
    assert line.get_xdata().tolist() == [0.1, 0.5, 0.8]
    assert line.get_ydata() == pytest.approx([15, 55, 85])
    (dots,) = [c for c in axes[3].collections if c.get_label() == "one seed"]
    assert sorted(dots.get_offsets()[:, 1]) == pytest.approx([10, 20, 50, 60, 80, 90])
    assert axes[3].get_xlabel() == "β"
    dashed = [x for x in axes[3].lines if x.get_label() == "teacher"]
    assert [x.get_ydata()[0] for x in dashed] == [50]


def test_a_plot_of_some_scores_and_of_equal_ones():
    same = [result(n, [v]) for n, v in (("a", 0.0), ("b", 1e-17))]
    axes = sweep_chart(same, TEACHER, ["video_mbo"]).axes
    assert [a.get_title() for a in axes if a.get_visible()] == ["video mBO"]
    alone = sweep_chart(same, {}, ["image_mbo", "video_mbo", "image_fg_ari"]).axes
    assert [a.get_visible() for a in alone] == [True, True, True, False]
    low, high = alone[1].get_xlim()
    assert high - low == pytest.approx(1), "a difference of rounding is not drawn as one"


def test_settings_of_other_kinds_are_listed():
    named = [result("no KD", [0.3]), result("K = 4", [0.4, 0.5], {"targets.views": 4}), result("lost", [])]
    assert varied_number(named) is None
    axes = sweep_chart(named, TEACHER).axes
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["no KD", "K = 4", "lost"]
    both = [result("a", [0.3], {"distill.beta": 0.1, "targets.views": 1})]
    both.append(result("b", [0.3], {"distill.beta": 0.2, "targets.views": 2}))
    assert varied_number(both) is None
    words = [result(n, [0.3], {"targets.crop": n}) for n in ("center", "random")]
    assert varied_number(words) is None
