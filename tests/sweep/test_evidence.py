"""What the evidence says of scores that are given: differences by seed, verdicts, and the document."""

import math
from collections import Counter

import numpy as np
import pytest
from places import CONFIGS

from pipeline.config import ConfigError, load_config
from pipeline.sweep.comparisons import Comparison, Scored, bootstrap, compare
from pipeline.sweep.results import Result
from pipeline.sweep.settings import Setting, check_evidence, parse_claim, plan_trials


def result(name, *values):
    return Result(Setting(name, {}), {seed: {"video_mbo": value} for seed, value in enumerate(values)})


def verdict(better, worse, teacher=0.0):
    results = [result("a", *better), result("b", *worse)]
    (one,) = compare(["a > b"], Scored(results, {"video_mbo": teacher}), ["video_mbo"])
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
    scored = Scored([result("a", 0.5, 0.6)], {"video_mbo": 0.4})
    over, under = compare(["a > teacher", "teacher > a"], scored, ["video_mbo"])
    assert over.differences == pytest.approx((10, 20))
    assert under.differences == pytest.approx((-10, -20))


def test_only_seeds_that_both_finished_are_compared():
    first = Result(Setting("a", {}), {0: {"video_mbo": 0.5}, 2: {"video_mbo": 0.7}})
    (found,) = compare(["a > b"], Scored([first, result("b", 0.4, 0.4)], {}), ["video_mbo"])
    assert found.differences == pytest.approx((10,))
    alone = [first, Result(Setting("b", {}), {})]
    assert compare(["a > b"], Scored(alone, {}), ["video_mbo"]) == []


def test_the_bootstrap_draws_seeds_and_videos():
    """Against the variance of such draws: of effects of seeds and of videos that add up, each divided by its number."""
    rng = np.random.default_rng(1)
    seeds, videos = rng.normal(0, 3, 30), rng.normal(1, 5, 50)
    low, high = bootstrap(seeds[:, None] + videos, np.ones(50))
    spread = 1.96 * math.sqrt(seeds.var() / 30 + videos.var() / 50)
    assert (low + high) / 2 == pytest.approx(seeds.mean() + videos.mean(), abs=0.1)
    assert (high - low) / 2 == pytest.approx(spread, rel=0.05)
    # A long video counts as much as its frames do, as in the scores.
    weights = np.where(videos > 5, 4.0, 1.0)
    middle = sum(bootstrap(np.tile(videos, (2, 1)), weights)) / 2
    assert middle == pytest.approx(np.average(videos, weights=weights), abs=0.2)


def test_a_difference_that_hangs_on_a_few_videos_is_no_ordering():
    """Every seed agrees; but one video of four makes all of it."""
    rows = {"a": (0.9, 0.3, 0.3, 0.3), "b": (0.1, 0.3, 0.3, 0.3), "teacher": (0.1, 0.1, 0.1, 0.1)}

    def videos(name, seed):
        scores = [value + (0.001 * seed if i == 0 else 0) for i, value in enumerate(rows[name])]
        return {str(i): {"video_mbo": s, "video_samples": 1} for i, s in enumerate(scores)}

    per_video = {(name, seed): videos(name, seed) for name in "ab" for seed in range(3)}
    per_video |= {
        ("teacher", None): {**videos("teacher", 0), "empty": {"video_mbo": math.nan, "video_samples": 0}}
    }
    means = {
        key: np.mean([row["video_mbo"] for row in of.values() if row["video_samples"]])
        for key, of in per_video.items()
    }
    results = [result(name, *(means[name, seed] for seed in range(3))) for name in "ab"]
    scored = Scored(results, {"video_mbo": means["teacher", None]}, per_video)
    one, teacher = compare(["a > b", "a > teacher"], scored, ["video_mbo"])
    assert one.mean == pytest.approx(20)
    # It is drawn 0 to 3 times in 99.6 % of the draws of four.
    assert one.interval == pytest.approx((0, 80 * 3 / 4))
    assert one.verdict == "can't be told"
    assert teacher.verdict == "holds"
    assert Comparison("a > b", "video_mbo", one.differences).verdict == "holds", "of these videos alone"


@pytest.mark.parametrize("claim", ["a", "a > ", "a > b > c", "a>b"])
def test_what_is_no_claim(claim):
    with pytest.raises(ValueError, match="is not of the form 'better > worse'"):
        parse_claim(claim)


def test_names_with_signs_of_their_own():
    assert parse_claim("SlotMatch > SlotMatch, β = 0.1") == ("SlotMatch", "SlotMatch, β = 0.1")


def evidence_config(*overrides):
    return load_config(CONFIGS / "demo.yaml", overrides, presets=[CONFIGS / "sweeps/evidence.yaml"])


def davis_config(sweep):
    return load_config(CONFIGS / "davis_small.yaml", presets=[CONFIGS / f"sweeps/{sweep}.yaml"])


def test_the_shipped_claims_are_about_the_shipped_variants():
    check_evidence(evidence_config())


@pytest.mark.parametrize("sweep", ["davis_small", "davis_truncated", "davis_views"])
def test_the_comparisons_on_davis_choose_nothing_on_its_test_split(sweep):
    config = davis_config(sweep)
    check_evidence(config)
    assert (config.dataset.split, config.evaluate.split, config.evidence.split) == (
        "train",
        "validation",
        "test",
    )


def test_no_kd_and_slotmatch_have_five_seeds_on_davis():
    counts = Counter(trial.setting.name for trial in plan_trials(davis_config("davis_small")))
    five = {"no KD", "SlotMatch", "no KD, own initial slots"}
    assert {name for name, count in counts.items() if count == 5} == five
    assert {count for name, count in counts.items() if name not in five} == {3}
    # Students that the choice of beta has trained are not trained again.
    chosen = [t.config for t in plan_trials(davis_config("davis_beta")) if t.config.distill.beta == 2]
    again = [t.config for t in plan_trials(davis_config("davis_small")) if t.setting.name == "SlotMatch"]
    assert [c.distill for c in chosen] == [c.distill for c in again if c.distill.seed in (0, 1)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evidence.split=validation", "'validation' was trained or chosen on"),
        ("evidence.split=", "evidence.split: is not set"),
        ("evidence.claims=[SlotMatch > no kd]", "'no kd' is no setting of this sweep"),
        ("evidence.pictures=[teacher]", "evidence.pictures: 'teacher' is no setting of this sweep"),
        ("evidence.claims=[SlotMatch]", "evidence.claims: 'SlotMatch' is not of the form"),
    ],
)
def test_evidence_that_can_not_be_had_is_refused(override, message):
    with pytest.raises(ConfigError) as error:
        check_evidence(evidence_config(override))
    assert message in str(error.value)
