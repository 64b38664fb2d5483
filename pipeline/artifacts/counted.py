"""Which settings count in a fingerprint: those that are not at their defaults, and those of the first format.

The first format hashed every setting that it had, defaults too, and its folders are to be found. So nothing is ever
added to `FIRST_KEYS`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from pipeline.config import Distill, Section, Training, run_details
from pipeline.config.protocols import Protocol
from pipeline.config.sections import Config

_MODEL = """backbone backbone_weights image_size num_slots slot_size initial_slots initialisation corrector_mlp
    predictor decoder decoder_hidden_sizes decoder_blocks mean std"""
_TRAINING = (
    "steps batch_size learning_rate warmup_steps gradient_clip alpha temperature seed workers precision"
)
_KEYS = {
    "Dataset": "kind name path split resolution masks seed synthetic",
    "Clips": "clip_frames short_side fps max_seconds codec quality videos_per_shard row_group_mb",
    "ViT": "patch_size embed_dim depth num_heads",
    "Teacher": f"{_MODEL} name checkpoint num_heads train",
    "Student": _MODEL,
    "Targets": "views crop min_scale flip rollout student_features teacher_features feature_dtype",
    "TeacherTraining": f"""{_TRAINING} reconstruction similarity similarity_temperature similarity_threshold""",
    "Distill": f"""{_TRAINING} name method beta reconstruction_kd_weight feature_kd_weight matching slot_map
        initial_slots_from_teacher live_teacher fresh_views fast_decoder""",
    "Evaluate": """split model protocol clip_frames mask_size crop background ignore_overlaps rollout masks score
        teacher baselines validation_videos""",
    "SyntheticSettings": "videos frames size min_objects max_objects fps seed",
    "CheckpointHints": "num_heads num_slots mean std",
    "Protocol": "clip_frames mask_size crop background ignore_overlaps rollout masks",
}

# By the name of a section's class.
FIRST_KEYS = {section: frozenset(keys.split()) for section, keys in _KEYS.items()}


def counted(section: Section, *, but: Iterable[str] = ()) -> dict[str, Any]:
    """Of a section's settings what decides content, by key; without those of `but`."""
    first = FIRST_KEYS.get(type(section).__name__, frozenset())
    defaults = type(section).model_fields
    ignored = run_details(type(section)) | set(but)
    return {
        key: counted(value) if isinstance(value, Section) else value
        for key, value in section
        if key not in ignored
        and (key in first or _is_said(value, defaults[key].get_default(call_default_factory=True)))
    }


def _is_said(value: Any, default: Any) -> bool:
    """Whether somebody has changed a setting, or one that counts in a section."""
    return bool(counted(value)) if isinstance(value, Section) else value != default


def later(section: Section, *, but: Iterable[str] = ()) -> dict[str, Any]:
    """Of a section whose first settings are counted one by one: the later ones that are not at their defaults.

    Their keys have the section before them, as they stand among another section's.
    """
    kind = type(section).__name__
    return {
        f"{kind.lower()}.{key}": value
        for key, value in counted(section, but=FIRST_KEYS[kind] | set(but)).items()
    }


def counted_fields(values: Any) -> dict[str, Any]:
    """`counted` for a dataclass: its fields without defaults, those of the first format, and what differs."""
    kinds = [kind.__name__ for kind in type(values).__mro__]
    first = next(FIRST_KEYS[kind] for kind in kinds if kind in FIRST_KEYS)
    known = {field.name: (getattr(values, field.name), field.default) for field in fields(values)}
    return {key: value for key, (value, default) in known.items() if key in first or value != default}


def clip_settings(config: Config, split: str) -> dict[str, Any]:
    """Settings that decide what a split's clip set holds, beside its videos.

    `dataset.splits` only chooses these; what lies below `dataset.motion` is part of their contents.
    """
    return {**counted(config.clips_of(split)), **later(config.dataset, but={"splits", "motion"})}


def training_settings(settings: Training, *, but: Iterable[str] = ()) -> dict[str, Any]:
    """The settings that decide what is learned.

    Of several workers each contrasted its own share before there was a choice; for one it makes no difference. So a
    number of shares counts as that many workers. Where the machines decide how many workers there are, any number
    learns what one does, and so it counts as one.
    """
    content = counted(settings, but={"contrast", *but})
    if isinstance(settings.contrast, int):
        return content | {"workers": settings.contrast}
    if not isinstance(settings.workers, int):
        return content | {"workers": 1}
    globally = settings.alpha > 0 and settings.workers > 1 and settings.contrast == "global"
    return content | ({"contrast": "global"} if globally else {})


def distill_settings(settings: Distill) -> dict[str, Any]:
    """The settings that decide what is learned: of a method that does not use them, no weights."""
    unused = set()
    if not settings.distils_slots:
        unused.add("beta")
    if not settings.distils_reconstruction:
        unused.add("reconstruction_kd_weight")
    if settings.method != "feature_kd":
        unused.add("feature_kd_weight")
    if settings.method != "slotmatch_hungarian":
        unused.add("matching")
    if not settings.distils:
        unused |= {"live_teacher", "slot_map"}
    copies = settings.initial_slots_from_teacher
    return {
        **training_settings(settings, but=unused),
        "initial_slots_from_teacher": settings.distils if copies is None else copies,
    }


def view_recipe(config: Config) -> dict[str, Any]:
    """What decides the views."""
    keys = {"views", "crop", "min_scale", "flip"}
    chosen = config.targets.model_dump(include=keys)
    return {**chosen, **later(config.targets), "seed": config.dataset.seed}


def protocol_rules(protocol: Protocol) -> dict[str, Any]:
    """A protocol's rules without its name."""
    return {key: value for key, value in counted_fields(protocol).items() if key != "name"}
