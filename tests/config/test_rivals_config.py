"""Rival systems as teachers: what is refused when the config is loaded, before anything is trained."""

from typing import get_args

import pytest
from places import CONFIGS

from pipeline.config import ConfigError, load_config, resolve_config
from pipeline.config.models import Teacher
from pipeline.config.rivals import RIVALS

SYSTEMS = ("solv", "savi", "steve", "diod")
each_system = pytest.mark.parametrize("system", SYSTEMS)
REFUSED = {("coco", system) for system in SYSTEMS}  # no clip has a second frame


def preset(system):
    return CONFIGS / "systems" / f"{system}.yaml"


def problems(system, *overrides):
    """The lines that its preset with overrides is refused with."""
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides, presets=[preset(system)])
    return str(error.value).splitlines()


@each_system
@pytest.mark.parametrize("base", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_a_system_lies_over_every_shipped_config(base, system):
    """Whatever that sets of slot models alone is set back."""
    if (base, system) in REFUSED:
        with pytest.raises(ConfigError):
            load_config(CONFIGS / f"{base}.yaml", presets=[preset(system)])
        return
    config = load_config(CONFIGS / f"{base}.yaml", presets=[preset(system)])
    assert (config.teacher.system, config.teacher.checkpoint) == (system, None)
    assert config.distill.initial_slots_from_teacher is None
    assert config.student.initialisation == "default"


@each_system
@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("distill.method=reconstruction_kd", "slotmatch_hungarian"),
        ("distill.method=slotmatch_reconstruction_kd", "slotmatch"),
        ("distill.method=feature_kd", "slotmatch_hungarian"),
        ("distill.measure_bound_every=50", "0"),
        ("targets.teacher_features=true", "false"),
        ("distill.initial_slots_from_teacher=true", "null"),
    ],
)
def test_what_a_system_can_not_teach_is_refused_before_it_is_trained(system, override, nearest):
    key, value = override.split("=")
    for more in ([], ["teacher.checkpoint=model.pt"]):
        (line,) = problems(system, override, *more)
        assert line.startswith(f"{key}: {value}, but ")
        assert f"{system} (teacher.system)" in line
        assert line.endswith(f"nearest valid: {nearest}")
        assert load_config(None, [f"{key}={nearest}", *more], presets=[preset(system)])
    # Of a model that is scored alone the section is what its file does not tell.
    assert load_config(None, [override, "evaluate.model=model.pt"], presets=[preset(system)])


UNUSED = {
    "teacher.grid": "[4, 4]",
    "teacher.stride": "16",
    "teacher.decoder": "slot_mixer",
    "teacher.corrector_mlp": "false",
    "teacher.decoder_blocks": "2",
    "teacher.decoder_hidden_sizes": "[64]",
    "teacher.cached_features": "true",
    "teacher.feature_scale": "auto",
    "teacher.initialisation": "fitted",
    "teacher.num_heads": "3",
    "teacher.train.alpha": "0.5",
    "teacher.train.temperature": "0.2",
    "teacher.train.reconstruction": "0.5",
    "teacher.train.decoder_learning_rate": "0.001",
}
OF_A_VIT = {
    "teacher.backbone": "vit_tiny_patch16_224",
    "teacher.backbone_weights": "random",
    "teacher.backbone_blocks": "3",
    "teacher.save": "slim",
}
DRAWN = {"teacher.initial_slots": "random"}
ITERATED = {"teacher.num_iterations": "3", "teacher.predictor_heads": "2"}
COLOURS = {"teacher.mean": "[0.1, 0.1, 0.1]", "teacher.std": "[0.3, 0.3, 0.3]"}
NOT_USED = {
    "solv": {**UNUSED, **DRAWN, **ITERATED, "teacher.train.warmup_steps": "10", "teacher.savi.stride": "2"},
    "savi": {**UNUSED, **OF_A_VIT, **COLOURS, "teacher.steve.width": "8"},
    "steve": {**UNUSED, **OF_A_VIT, **COLOURS, **DRAWN, "teacher.diod.colours": "false"},
    "diod": {**UNUSED, **OF_A_VIT, **DRAWN, **ITERATED, "teacher.solv.half_window": "1"},
}


@each_system
def test_a_setting_of_another_system_is_not_ignored(system):
    """All at once, each with its value and the default; said of a file that is there, they are no settings."""
    overrides = [f"{key}={value}" for key, value in NOT_USED[system].items()]
    lines = problems(system, *overrides)
    expected = [
        f"{key}: {value}, but {system} (teacher.system) does" for key, value in NOT_USED[system].items()
    ]
    assert sorted(line.split(" not use it; leave it out (nearest valid: ")[0] for line in lines) == sorted(
        expected
    )
    assert load_config(None, [*overrides, "teacher.checkpoint=model.pt"], presets=[preset(system)])


@each_system
def test_what_a_system_uses_may_be_set(system):
    used = {**OF_A_VIT, **DRAWN, **ITERATED, **COLOURS, "teacher.train.warmup_steps": "10"}
    values = [f"{key}={value}" for key, value in used.items() if key not in NOT_USED[system]]
    more = [
        "teacher.image_size=224",
        "teacher.train.seed=3",
        "teacher.train.workers=1",
        f"teacher.{system}={{}}",
    ]
    assert load_config(None, [*values, *more], presets=[preset(system)]).teacher.train.seed == 3


def test_defaults_and_nothing_are_no_settings():
    """A config of one's own without the preset: alpha is 1 by default, and 0 is none of it."""
    for said in (
        [],
        ["teacher.train.alpha=0"],
        ["teacher.train.contrast=2"],
        ["teacher.train.warmup_steps=0"],
    ):
        values = {"teacher": {"system": "solv"}, "clips": {"clip_frames": 5}}
        assert resolve_config(values, said).teacher.system == "solv"


def test_the_table_has_every_system():
    there = get_args(Teacher.model_fields["system"].annotation)
    assert set(RIVALS) == set(SYSTEMS) == set(there) - {"slotcontrast"}
