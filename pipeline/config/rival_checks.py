"""What a rival system as `teacher.system` can't be, can't teach, or does not use: one line for every problem."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pipeline.config.fields import Section, run_details
from pipeline.config.models import Teacher
from pipeline.config.rivals import ALL_TRAIN_WITH, ALL_USE, NONE_OF_IT, RIVALS
from pipeline.config.sections import Config


def check_rival(config: Config) -> list[str]:
    """Whether the config's teacher can be this rival, and can be distilled as the config says."""
    section = config.teacher
    if section.system not in RIVALS:
        return []
    scored_alone = config.evaluate.model is not None  # then the section is what a file does not tell
    problems: list[str] = [] if scored_alone else _check_taught(config)
    if section.checkpoint is None:
        problems += [] if scored_alone else _check_used(section)
        problems += _check_trained(config)
    return problems


def _check_taught(config: Config) -> list[str]:
    """What would be refused when the student is built, after the teacher's training and its cache."""
    distill, system, problems = config.distill, config.teacher.system, []
    only = f"but of {system} (teacher.system) its slots are all that is distilled; nearest valid:"
    if distill.method == "feature_kd" or distill.distils_reconstruction:
        nearest = "slotmatch" if distill.distils_slots else "slotmatch_hungarian"
        problems.append(f"distill.method: {distill.method}, {only} {nearest}")
    if distill.distils and distill.measure_bound_every:
        problems.append(f"distill.measure_bound_every: {distill.measure_bound_every}, {only} 0")
    if config.targets.teacher_features:
        problems.append(f"targets.teacher_features: true, {only} false")
    if distill.initial_slots_from_teacher:
        problems.append(
            f"distill.initial_slots_from_teacher: true, but {system} (teacher.system) starts its frames in another "
            "way than students do; nearest valid: null"
        )
    return problems


def _check_used(section: Teacher) -> list[str]:
    """Settings of other systems, which would be ignored and yet make it another teacher."""
    rival = RIVALS[section.system]
    used = ALL_USE | rival.keys | {section.system}
    train = ALL_TRAIN_WITH | rival.training | run_details(type(section.train))
    found = [*_said(section, used, "teacher"), *_said(section.train, train, "teacher.train")]
    problems = [
        f"{key}: {_plain(value)}, but {section.system} (teacher.system) does not use it; leave it out (nearest valid: "
        f"{_plain(default)})"
        for key, value, default in found
    ]
    if section.uses_boxes and section.initial_slots != "learned":
        problems.append(
            f"teacher.initial_slots: {section.initial_slots}, but slots start from boxes "
            "(teacher.savi.conditioning=boxes); nearest valid: learned, or teacher.savi.conditioning=none"
        )
    return problems


def _said(section: Section, used: frozenset[str], name: str) -> Iterator[tuple[str, Any, Any]]:
    """Each setting that is not `used` and not at its default: its key, its value and that default, as JSON has them."""
    values, defaults = (one.model_dump(mode="json") for one in (section, type(section)()))
    for key, value in values.items():
        if key in used or value == defaults[key] or NONE_OF_IT.get(key, defaults[key]) == value:
            continue
        if isinstance(below := getattr(section, key), Section) and isinstance(defaults[key], dict):
            yield from _said(below, frozenset(), f"{name}.{key}")
        else:
            yield f"{name}.{key}", value, defaults[key]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _check_trained(config: Config) -> list[str]:
    """Of a rival that is trained here."""
    section, problems = config.teacher, []
    if not section.has_backbone:
        problems += _check_without_backbone(section)
    if section.uses_motion and config.clips.motion == "none":
        problems.append(
            f"clips.motion: none, but {section.system} learns from motion segments; nearest valid: flow (or masks, or "
            "files of your own)"
        )
    if section.system == "savi" and section.savi.target == "flow" and config.clips.flow == "none":
        problems.append(
            "clips.flow: none, but teacher.savi.target=flow reconstructs it; nearest valid: dataset (MOVi's own), or "
            "teacher.savi.target=rgb"
        )
    if section.system == "solv" and config.clips.clip_frames < section.solv.window:
        problems.append(
            f"clips.clip_frames: {config.clips.clip_frames} frames are fewer than the window of {section.solv.window} "
            f"that SOLV looks at (teacher.solv.half_window={section.solv.half_window}); nearest valid: "
            f"{section.solv.window}"
        )
    return problems


def _check_without_backbone(section: Teacher) -> list[str]:
    """Of a rival that sees the pixels."""
    problems, savi = [], section.savi
    if section.system != "diod" and section.image_width not in (None, section.image_size):
        problems.append(
            f"teacher.image_width: {section.image_width}, but the frames of {section.system} are square; nearest "
            "valid: null"
        )
    if section.system == "savi" and savi.encoder_blocks:
        if len(savi.encoder_blocks) != len(savi.encoder_channels):
            problems.append(
                f"teacher.savi.encoder_blocks: {len(savi.encoder_blocks)} stages, but teacher.savi.encoder_channels "
                f"has {len(savi.encoder_channels)} widths; nearest valid: as many of both"
            )
        for width in savi.encoder_channels:
            if width % 32:
                problems.append(
                    f"teacher.savi.encoder_channels: {width} is not a multiple of 32, the groups of the ResNet's "
                    f"norms; nearest: {max(1, round(width / 32)) * 32}"
                )
    return problems
