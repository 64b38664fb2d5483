"""Hints that can't be, and those that a config's section gives."""

import pytest
from places import GOLDEN

from pipeline.config import resolve_config
from pipeline.models import load_slot_model
from pipeline.models.build import load_teacher


@pytest.mark.parametrize("name", ["num_heads", "predictor_heads", "num_iterations", "image_size"])
def test_a_count_below_one_is_no_hint(name):
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"^{name}: {value}; nearest valid: 1"):
            load_slot_model(GOLDEN / "rivals" / "stosavi_mlp_tiny.pth", **{name: value})


@pytest.mark.parametrize("own", [True, False])
def test_batch_statistics_of_a_diod_file_are_as_the_config_says(own):
    file = str(GOLDEN / "rivals" / "diod_tiny.ckpt")
    settings = {"checkpoint": file, "system": "diod", "diod": {"batch_statistics": own}}
    config = resolve_config({"teacher": settings, "clips": {"motion": "flow"}})
    assert load_teacher(config, file).config.batch_statistics is own
