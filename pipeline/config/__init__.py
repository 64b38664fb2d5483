"""Every knob of the pipeline, read from YAML files plus `section.key=value` overrides.

`load_config` either returns a frozen `Config` or raises a `ConfigError` that names each wrong key, its
value and the nearest valid one. Nothing here touches a disk beyond the YAML files, or starts anything.
"""

from pipeline.config.fields import ConfigError, Section, run_details
from pipeline.config.loading import (
    load_config,
    read_settings,
    resolve_config,
    with_overrides,
    with_presets,
)
from pipeline.config.models import Model, ViT
from pipeline.config.sections import Clips, Config, Dataset, Evaluate, NamedSplit, Sweep, Targets, parse_split
from pipeline.config.shipped import shipped_configs
from pipeline.config.training import Distill, TeacherTraining, Training

__all__ = [
    "Clips",
    "Config",
    "ConfigError",
    "Dataset",
    "Distill",
    "Evaluate",
    "Model",
    "NamedSplit",
    "Section",
    "Sweep",
    "Targets",
    "TeacherTraining",
    "Training",
    "ViT",
    "load_config",
    "parse_split",
    "read_settings",
    "resolve_config",
    "run_details",
    "shipped_configs",
    "with_overrides",
    "with_presets",
]
