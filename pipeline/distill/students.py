"""The students that the whole line trains of a config, and others look for."""

from __future__ import annotations

from pipeline.config import Config, with_overrides

NO_KD = "student, no KD"
SLOTMATCH = "SlotMatch"


def students_of(config: Config) -> dict[str, Config]:
    """The line's students by their names: one without distillation, one with SlotMatch."""
    return {
        NO_KD: with_overrides(config, {"distill.method": "no_kd", "distill.name": NO_KD}),
        SLOTMATCH: with_overrides(config, {"distill.name": config.distill.name or SLOTMATCH}),
    }
