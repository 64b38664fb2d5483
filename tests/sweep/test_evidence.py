"""What the evidence says of scores that are given: differences by seed, verdicts, and the document."""

import math

import pytest
from places import CONFIGS

from pipeline.config import ConfigError, load_config
from pipeline.sweep.evidence import BEGIN, END, compare, update_document
from pipeline.sweep.results import Result
from pipeline.sweep.settings import Setting, check_evidence, parse_claim


def result(name, *values):
    return Result(Setting(name, {}), {seed: {"video_mbo": value} for seed, value in enumerate(values)})


def verdict(better, worse, teacher=0.0):
    results = [result("a", *better), result("b", *worse)]
    (one,) = compare(["a > b"], results, {"video_mbo": teacher}, ["video_mbo"])
    return one


def test_differences_are_paired_by_seed():
    """Seeds that are hard for both sides do not hide a difference that is there in each."""
    found = verdict([0.30, 0.40, 0.50], [0.28, 0.375, 0.485])
    assert found.differences == pytest.approx((2.0, 2.5, 1.5))
    assert found.mean == pytest.approx(2.0)
    # t(0.975, 2) = 4.303; standard deviation 0.5, three seeds
    assert found.margin == pytest.approx(4.3027 * 0.5 / math.sqrt(3), rel=1e-4)
    assert found.verdict == "holds"


def test_a_difference_the_other_way_is_reversed_and_noise_is_noise():
    assert verdict([0.28, 0.375, 0.485], [0.30, 0.40, 0.50]).verdict == "reversed"
    assert verdict([0.30, 0.40, 0.50], [0.35, 0.36, 0.50]).verdict == "can't be told"
    assert verdict([0.9], [0.1]).verdict == "can't be told", "one seed shows no noise"


def test_the_teacher_is_one_model_beside_every_seed():
    results = [result("a", 0.5, 0.6)]
    over, under = compare(["a > teacher", "teacher > a"], results, {"video_mbo": 0.4}, ["video_mbo"])
    assert over.differences == pytest.approx((10, 20))
    assert under.differences == pytest.approx((-10, -20))


def test_only_seeds_that_both_finished_are_compared():
    first = Result(Setting("a", {}), {0: {"video_mbo": 0.5}, 2: {"video_mbo": 0.7}})
    (found,) = compare(["a > b"], [first, result("b", 0.4, 0.4)], {}, ["video_mbo"])
    assert found.differences == pytest.approx((10,))
    alone = [first, Result(Setting("b", {}), {})]
    assert compare(["a > b"], alone, {}, ["video_mbo"]) == []


@pytest.mark.parametrize("claim", ["a", "a > ", "a > b > c", "a>b"])
def test_what_is_no_claim(claim):
    with pytest.raises(ValueError, match="is not of the form 'better > worse'"):
        parse_claim(claim)


def test_names_with_signs_of_their_own():
    assert parse_claim("SlotMatch > SlotMatch, β = 0.1") == ("SlotMatch", "SlotMatch, β = 0.1")


def evidence_config(*overrides):
    return load_config(CONFIGS / "demo.yaml", overrides, presets=[CONFIGS / "sweeps/evidence.yaml"])


def test_the_shipped_claims_are_about_the_shipped_variants():
    check_evidence(evidence_config())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evidence.split=validation", "'validation' was trained or chosen on"),
        ("evidence.split=", "evidence.split: is not set"),
        ("evidence.claims=[SlotMatch > no kd]", "'no kd' is no setting of this sweep"),
        ("evidence.claims=[SlotMatch]", "evidence.claims: 'SlotMatch' is not of the form"),
    ],
)
def test_evidence_that_can_not_be_had_is_refused(override, message):
    with pytest.raises(ConfigError) as error:
        check_evidence(evidence_config(override))
    assert message in str(error.value)


def test_the_documents_own_words_stay(tmp_path):
    document = tmp_path / "evidence.md"
    document.write_text(f"# What we saw\n\nBefore.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    update_document(document, "# Evidence\n\nintro\n\n## Scores\n", b"png")
    text = document.read_text()
    assert "old" not in text
    assert text.startswith("# What we saw\n\nBefore.\n")
    assert text.endswith("After.\n")
    assert "### Scores" in text
    assert (tmp_path / "evidence.png").read_bytes() == b"png"
    document.write_text("no marks")
    with pytest.raises(ValueError, match="has no <!-- evidence: begin -->"):
        update_document(document, "# Evidence\n\nintro\n", b"")
