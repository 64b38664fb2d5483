"""Which trials a config's sweep has, and which sweeps are refused with the way out."""

import math

import pytest
from places import CONFIGS

from pipeline.config import Config, ConfigError, load_config, resolve_config, with_overrides
from pipeline.sweep.settings import plan_trials
from pipeline.sweep.trials import concurrent_trials

SCORED = {"evaluate": {"split": "validation"}}


def planned(sweep=None, *overrides):
    return plan_trials(resolve_config({**SCORED, "sweep": sweep or {}}, overrides))


def refused(sweep, *overrides):
    with pytest.raises(ConfigError) as error:
        planned(sweep, *overrides)
    return str(error.value).splitlines()


def test_as_it_is_the_sweep_is_the_papers():
    trials = planned()
    betas, seeds = [0.1, 0.2, 0.3, 0.5, 0.8], [42, 101, 2048]
    assert [(t.config.distill.seed, t.config.distill.beta) for t in trials] == [
        (seed, beta) for seed in seeds for beta in betas
    ]
    assert trials[1].title == "beta = 0.2, seed 42"


def test_a_grid_is_crossed_and_everything_else_is_left_alone():
    grid = {"distill.beta": [0.1, 0.5], "student.decoder_hidden_sizes": [[8], [8, 8]]}
    config = resolve_config({**SCORED, "sweep": {"grid": grid, "seeds": [3]}}, ["distill.steps=7"])
    trials = plan_trials(config)
    assert [t.setting.name for t in trials] == [
        "beta = 0.1, decoder_hidden_sizes = (8,)",
        "beta = 0.1, decoder_hidden_sizes = (8, 8)",
        "beta = 0.5, decoder_hidden_sizes = (8,)",
        "beta = 0.5, decoder_hidden_sizes = (8, 8)",
    ]
    changed = {"distill.beta": 0.5, "student.decoder_hidden_sizes": [8], "distill.seed": 3}
    expected = with_overrides(config, changed).model_copy(update={"sweep": Config().sweep})
    assert trials[2].config == expected


def test_sections_may_nest_as_on_the_command_line():
    trials = planned({"seeds": [0]}, "sweep.grid.distill.beta=[0.3]", "sweep.grid.targets.views=[1, 4]")
    assert [t.setting.values for t in trials] == [
        {"distill.beta": 0.3, "targets.views": 1},
        {"distill.beta": 0.3, "targets.views": 4},
    ]


def test_names_say_as_much_of_a_key_as_is_needed():
    (trial,) = planned({"grid": {"distill.batch_size": [4], "targets.batch_size": [2]}, "seeds": [0]})
    assert trial.setting.name == "distill.batch_size = 4, targets.batch_size = 2"


def test_numbers_that_yaml_takes_for_text_are_numbers():
    (trial,) = planned({"grid": {"distill.learning_rate": ["1e-3"]}, "seeds": [0]})
    assert trial.setting.values == {"distill.learning_rate": 0.001}


def test_variants_are_used_instead_of_the_grid():
    variants = {"no KD": {"distill.method": "no_kd"}, "K = 4": {"targets.views": 4}, "plain": {}}
    trials = planned({"variants": variants, "seeds": [1, 2]})
    assert [t.title for t in trials][:4] == [
        *("no KD, seed 1", "K = 4, seed 1", "plain, seed 1", "no KD, seed 2")
    ]
    assert trials[1].config.targets.views == 4
    assert trials[0].config.distill.method == "no_kd"


def test_settings_may_have_seeds_of_their_own():
    """They begin seed by seed, so that what is stopped early has something of every setting."""
    sweep = {"grid": {"distill.beta": [0.1, 0.2]}, "seeds": [3, 1], "seeds_of": {"beta = 0.2": [1, 3, 5]}}
    trials = plan_trials(resolve_config({"sweep": sweep, "evaluate": {"split": "val"}}))
    found = [(trial.setting.values["distill.beta"], trial.seed) for trial in trials]
    assert found == [(0.1, 3), (0.2, 3), (0.1, 1), (0.2, 1), (0.2, 5)]
    assert [trial.config.distill.seed for trial in trials] == [3, 3, 1, 1, 5]


def test_a_random_search_draws_the_same_again_and_nothing_twice():
    ranges = {
        "distill.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        "distill.beta": {"low": 0.1, "high": 0.8},
        "targets.views": {"low": 1, "high": 3},
        "distill.batch_size": [4, 8],
    }
    sweep = {"grid": ranges, "search": "random", "samples": 40, "seeds": [0]}
    trials = planned(sweep)
    assert [t.setting for t in trials] == [t.setting for t in planned(sweep)]
    assert [t.setting for t in trials] != [t.setting for t in planned({**sweep, "seed": 1})]
    rates = [t.config.distill.learning_rate for t in trials]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert 10 <= sum(rate < 1e-3 for rate in rates) <= 30, "each decade is as likely"
    assert {t.config.targets.views for t in trials} == {1, 2, 3}
    assert {t.config.distill.batch_size for t in trials} == {4, 8}
    assert all(math.isclose(float(f"{t.config.distill.beta:.3g}"), t.config.distill.beta) for t in trials)
    every = planned({"search": "random", "samples": 5, "seeds": [0]})
    assert sorted(t.config.distill.beta for t in every) == [0.1, 0.2, 0.3, 0.5, 0.8]


GRID, VARIANTS = "sweep.grid", "sweep.variants"
REFUSED = [  # with the problem
    ({"grid": {"distill.betta": [1]}},
     f"{GRID}: distill.betta: unknown key (value 1); did you mean 'distill.beta'?"),
    ({"grid": {"distill.beta": [0.1, -1]}}, f"{GRID}: distill.beta: -1 must be at least 0.0; nearest valid: 0.0"),
    ({"grid": {"distill.beta": 0.1}}, f"{GRID}.distill.beta: 0.1 is not a list of values; nearest valid: [0.1]"),
    ({"grid": {"distill.beta": []}}, f"{GRID}.distill.beta: [] is not a list of values; nearest valid: [[]]"),
    ({"grid": {"distill.beta": [0.1, "0.1"]}}, f"{GRID}: 'beta = 0.1' is there twice"),
    ({"grid": {"distill.beta": {"low": 0, "high": 1}}},
     f"{GRID}.distill.beta: {{'low': 0, 'high': 1}} is a range, which only sweep.search=random draws from; nearest: "
     "a list"),
    ({"grid": {"distill.beta": {"low": 2, "high": 1}}, "search": "random"},
     f"{GRID}.distill.beta: low 2 must be less than high 1"),
    ({"grid": {"distill.beta": {"low": 0, "high": 1, "log": True}}, "search": "random"},
     f"{GRID}.distill.beta: low 0 must be more than 0 where log is true"),
    ({"grid": {"distill.seed": [1]}}, f"{GRID}: 'distill.seed' comes from sweep.seeds; name its values there"),
    ({"grid": {"distil": [1]}}, f"{GRID}: 'distil' is not of the form section.key; nearest: 'distill.…'"),
    ({"variants": {"long": {"clips.clip_frames": 8}}},
     f"{VARIANTS} 'long': 'clips.clip_frames' can't differ between trials, which share clips, scoring and storage; set "
     "it for all (clips.clip_frames=…); nearest: distill.…, student.…, targets.…"),
    ({"variants": {"K = 0": {"targets.views": 0}}},
     f"{VARIANTS} 'K = 0': targets.views: 0 must be at least 1; nearest valid: 1"),
    ({"search": "random", "samples": 6},
     f"sweep.samples: 6, but {GRID} has only 5 combinations; nearest valid: 5"),
    ({"seeds": []}, "sweep.seeds: is empty; nearest valid: [42]"),
    (
        {"seeds_of": {"beta = 0.4": [1]}},
        "sweep.seeds_of: 'beta = 0.4' is no setting of this sweep; nearest: 'beta = 0.8'",
    ),
    ({"seeds_of": {"beta = 0.1": []}}, "sweep.seeds_of.beta = 0.1: is empty; nearest valid: [42]"),
    ({"seeds": [2, 1, 2]}, "sweep.seeds: 2 is there twice; nearest valid: [1, 2]"),
    ({"asha": True, "grace_steps": 500},
     f"{GRID}: distill.validate_every: 0 validates never, and sweep.asha stops by validations; nearest valid: 500"),
]  # fmt: skip


@pytest.mark.parametrize(("sweep", "line"), REFUSED)
def test_what_cannot_be_run_is_refused(sweep, line):
    assert refused(sweep) == [line]


def test_every_problem_is_named_at_once():
    grid = {"clips.fps": [1], "distill.beta": 3}
    assert len(refused({"grid": grid, "seeds": []}, "evaluate.split=", "evaluate.model=m")) == 5


def test_asha_leaves_time_to_learn():
    (line,) = refused({"asha": True, "grace_steps": 60}, "distill.steps=60", "distill.validate_every=20")
    assert line == "sweep.grid: sweep.grace_steps: 60 must be less than distill.steps (60); nearest valid: 59"


@pytest.mark.parametrize("name", ["demo", "movi_e", "ytvis2021", "davis2017", "coco", "webdataset"])
def test_the_configs_that_are_there_can_be_swept(name):
    trials = plan_trials(load_config(CONFIGS / f"{name}.yaml"))
    assert len(trials) == 15


# --- how many at a time -----------------------------------------------------------------------------------


def together(nodes, count=8, **distill):
    config = resolve_config({"distill": {"batch_size": 8, **distill}})
    return concurrent_trials(nodes, [config] * count)


@pytest.mark.parametrize(
    ("nodes", "distill", "count"),
    [
        ([{"CPU": 2}], {"workers": 0}, 2),
        ([{"CPU": 2}], {"workers": 1}, 2),  # 2 × (0.1 + 0.8)
        ([{"CPU": 2}], {"workers": 2}, 1),
        ([{"CPU": 2}], {"workers": 2, "cpus_per_worker": 0.95}, 1),
        # With three, nodes that hold a trial have no room for two workers: it could be two of them.
        ([{"CPU": 2}, {"CPU": 2}], {"workers": 1, "cpus_per_worker": 1}, 2),
        ([{"CPU": 64, "GPU": 8}, {"CPU": 64, "GPU": 8}, {"CPU": 4}], {"workers": 4, "cpus_per_worker": 4}, 4),
        ([{"CPU": 64}], {"workers": 0}, 8),  # no more than there are trials
        # The fewest that a trial can do with, so that the others have a place.
        ([{"CPU": 64, "GPU": 6}], {"workers": "auto"}, 6),
        ([{"CPU": 64, "GPU": 6}], {"workers": [2, 4]}, 3),
    ],
)
def test_trials_at_a_time_never_wait_for_each_others_halves(nodes, distill, count):
    assert together(nodes, **distill) == count


def test_a_trial_that_never_fits_is_refused_with_what_would():
    with pytest.raises(ConfigError, match=r"nearest valid: distill\.cpus_per_worker=0\.95"):
        together([{"CPU": 2}], workers=2, cpus_per_worker=1)
    with pytest.raises(ConfigError, match=r"2 workers of 0\.8 CPUs.* and 1 GPUs"):
        together([{"CPU": 16, "GPU": 1}], workers=2)
    with pytest.raises(ConfigError, match="needs 1 CPU"):
        together([{"CPU": 0.5}], workers=0)


PRESETS = sorted((CONFIGS / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
@pytest.mark.parametrize("base", ["demo", "movi_e"])
def test_a_shipped_sweep_goes_over_any_config(base, preset):
    config = load_config(CONFIGS / f"{base}.yaml", presets=[preset])
    trials = plan_trials(config)
    assert len(trials) == len({t.title for t in trials}) > len(config.sweep.seeds)
