"""Every knob of the pipeline, read from YAML files plus `section.key=value` overrides.

`load_config` either returns a frozen `Config` or raises a `ConfigError` that names each wrong key, its
value and the nearest valid one. Nothing here touches a disk beyond the YAML files, or starts anything.
"""

from pipeline.config.loading import load_config, resolve_config, with_overrides
from pipeline.config.sections import (
    Clips,
    Config,
    ConfigError,
    Dataset,
    Distill,
    Evaluate,
    Model,
    Sweep,
    Targets,
    TeacherTraining,
    Training,
    ViT,
    parse_split,
)

__all__ = [
    "Clips",
    "Config",
    "ConfigError",
    "Dataset",
    "Distill",
    "Evaluate",
    "Model",
    "Sweep",
    "Targets",
    "TeacherTraining",
    "Training",
    "ViT",
    "load_config",
    "parse_split",
    "resolve_config",
    "with_overrides",
]
