"""From config to models: the student, and the teacher wherever it comes from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from pipeline import storage
from pipeline.config import Config, ConfigError, Model, ViT
from pipeline.config.models import marked
from pipeline.log import log
from pipeline.models import (
    Backbone,
    BackboneConfig,
    CheckpointHints,
    HintError,
    SlotModel,
    SlotModelConfig,
    load_backbone_weights,
    load_slot_model,
    start_as_soft_kmeans,
)
from pipeline.models.checkpoints import CONFIG_FILE, MODEL_FILES
from pipeline.models.exported import ONNX_FILE, is_exported, load_exported
from pipeline.models.initialisation import WithoutDraws
from pipeline.models.segmenter import Segmenter, SegmenterConfig, VideoSegmenter
from pipeline.models.systems import of_config

# How a config gives hints that its section has in any case.
BESIDE = {
    "backbone_weights": "beside teacher.system=solv",
    "image_size": "beside teacher.system=savi; the default with an equal teacher.image_width",
}


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A block whose torch random numbers follow from `seed`, leaving the others as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def backbone_config(section: Model) -> BackboneConfig:
    return BackboneConfig(
        name=section.backbone if isinstance(section.backbone, str) else None,
        image_size=section.image_size,
        arguments=section.backbone.model_dump() if isinstance(section.backbone, ViT) else None,
        stride=section.stride,
        grid=section.grid,
        blocks=section.backbone_blocks,
        image_width=section.image_width,
    )


def fill_backbone(backbone: Backbone, weights: str) -> None:
    """Loads `weights` ("timm", "random" or a file) into a backbone."""
    if weights == "random":
        return
    if weights == "timm":
        load_backbone_weights(backbone, "timm")
        return
    with storage.local_copy(weights) as path:
        load_backbone_weights(backbone, path)


def build_backbone(section: Model) -> Backbone:
    # Random backbones must be the same in every stage and for every training seed.
    drawn = section.backbone_weights == "random"
    with seeded(0), contextlib.nullcontext() if drawn else WithoutDraws():
        backbone = Backbone(backbone_config(section))
    _check_colours(section, backbone)
    fill_backbone(backbone, section.backbone_weights)
    return backbone


def _check_colours(section: Model, backbone: Backbone) -> None:
    """Whether pretrained weights see the colours that they were trained with.

    ViTs were run with ImageNet's normalisation, whatever their own, before this was looked at: they are warned of. So
    are those from a file, which may have been trained in another way.

    Raises:
        ValueError: of another model the hub's weights were trained with another normalisation.
    """
    expected = None if section.backbone_weights == "random" else backbone.trained_colours
    if expected in (None, (section.mean, section.std)):
        return
    mean, std = (", ".join(f"{value:g}" for value in colour) for colour in expected)
    text = (
        f"{section.backbone} was trained with images of another normalisation (mean, std); nearest valid: "
        f"mean=[{mean}] std=[{std}]"
    )
    if section.backbone_weights == "timm" and not backbone.plain:
        raise ValueError(text)
    log(f"WARNING, backbone {text}")


def model_config(section: Model, *, num_slots: int, slot_size: int) -> SlotModelConfig:
    """The architecture of a config's section; a scale of features that is `auto` is 1 until a run measures it."""
    return SlotModelConfig(
        backbone=backbone_config(section),
        num_slots=num_slots,
        slot_size=slot_size,
        initializer=section.initial_slots,
        corrector_mlp=section.corrector_mlp,
        predictor=section.predictor,
        decoder=section.decoder,
        decoder_hidden_sizes=section.decoder_hidden_sizes,
        decoder_blocks=section.decoder_blocks,
        decoder_outputs=section.decoder_outputs,
        mean=section.mean,
        std=section.std,
        feature_scale=1.0 if section.feature_scale == "auto" else section.feature_scale,
    )


def build_model(section: Model, *, num_slots: int, slot_size: int, seed: int) -> SlotModel:
    """A new model, its frozen backbone filled; what trains starts from `seed`.

    Raises:
        ConfigError: sizes that can't be built, or backbone weights that can't be had.
    """
    config = model_config(section, num_slots=num_slots, slot_size=slot_size)
    try:
        with seeded(seed):
            model = SlotModel(config)
            if section.initialisation != "default":  # what is fitted to features follows when there are some
                start_as_soft_kmeans(model)
        model.encoder.backbone = build_backbone(section)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        raise ConfigError(f"backbone {section.backbone!r}: {error}") from error
    return model


def student_sizes(config: Config, teacher: SegmenterConfig | None) -> dict[str, int]:
    """`num_slots` and `slot_size` of a config's student; those left open are the teacher's.

    Raises:
        ConfigError: they differ from the teacher's.
    """
    sizes = {}
    for key, default in config.teacher.sizes.items():
        own = getattr(config.student, key)
        other = getattr(teacher, key) if teacher else default
        mapped = key == "slot_size" and config.distill.slot_map
        if own is not None and teacher is not None and own != other and not mapped:
            way_out = "; or map one to the other: distill.slot_map=true" if key == "slot_size" else ""
            raise ConfigError(
                f"student.{key}: {own} differs from the teacher's {other}, and slot n is distilled to slot n; "
                f"nearest valid: {other}{way_out}"
            )
        sizes[key] = own if own is not None else other
    return sizes


def copies_initial_slots(config: Config, teacher: SegmenterConfig) -> bool:
    """Whether a student whose teacher is at hand starts from that one's initial slots."""
    same_size = student_sizes(config, teacher)["slot_size"] == teacher.slot_size
    may = config.distill.initial_slots_from_teacher is not False
    return isinstance(teacher, SlotModelConfig) and same_size and may


def build_student(
    config: Config, *, teacher: VideoSegmenter | SegmenterConfig | None, seed: int
) -> SlotModel:
    """The student of a config; sizes left open are the teacher's.

    With a `SlotModel` as teacher, and no other system, initial slots (or the distribution that they are drawn from) are
    copied, so that slot n means slot n on both sides: unless `distill.initial_slots_from_teacher` says
    otherwise, or sizes differ.

    Raises:
        ConfigError: slot counts, sizes or kinds of initial slots that differ from the teacher's.
    """
    teacher_config = teacher.config if isinstance(teacher, VideoSegmenter) else teacher
    sizes = student_sizes(config, teacher_config)
    student = build_model(config.student, seed=seed, **sizes)
    same_size = teacher_config is not None and sizes["slot_size"] == teacher_config.slot_size
    copies = config.distill.initial_slots_from_teacher
    if copies and not same_size:
        raise ConfigError(
            f"distill.initial_slots_from_teacher: slots of {sizes['slot_size']} numbers can't start as the "
            "teacher's do, which have another size; leave it out"
        )
    if copies and isinstance(teacher, VideoSegmenter) and not isinstance(teacher, SlotModel):
        raise ConfigError(
            f"distill.initial_slots_from_teacher: {type(teacher).__name__} starts its frames in another way than "
            "students do; leave it out"
        )
    if isinstance(teacher, SlotModel) and copies_initial_slots(config, teacher.config):
        if student.config.initializer != teacher.config.initializer:
            raise ConfigError(
                f"student.initial_slots: {student.config.initializer!r} differs from the teacher's "
                f"{teacher.config.initializer!r}; nearest valid: {teacher.config.initializer!r}"
            )
        student.initializer.load_state_dict(teacher.initializer.state_dict())
    return student


def checkpoint_hints(config: Config) -> CheckpointHints:
    """What a config's `teacher` section says of a public file."""
    section = config.teacher
    weights = section.backbone_weights
    lacking = section.system == "solv" and weights not in ("timm", "random")
    # A size that is the default says nothing, unless the width says it too.
    default_size = type(section).model_fields["image_size"].default
    both = section.system == "savi" and section.image_width == section.image_size
    sized = not section.has_backbone and (both or section.image_size != default_size)
    return CheckpointHints(
        section.num_heads,
        section.num_slots,
        section.mean,
        section.std,
        weights if lacking else None,
        batch_statistics=False if section.system == "diod" and not section.diod.batch_statistics else None,
        predictor_heads=section.predictor_heads,
        num_iterations=section.num_iterations,
        image_size=section.image_size if sized else None,
        stochastic=section.stochastic,
    )


def load_model(uri: str, hints: CheckpointHints) -> VideoSegmenter:
    """`load_slot_model` for a local path, an `s3://` or an `hf://` one.

    Raises:
        ConfigError: a hint is missing or can't be; they are the config's `teacher` section's.
    """
    weights = hints.backbone_weights
    named = weights is None or weights in ("timm", "random")
    vit: contextlib.AbstractContextManager[str | None]
    vit = contextlib.nullcontext(weights) if named else storage.local_copy(str(weights))
    with storage.local_copy(uri, MODEL_FILES) as path, vit as backbone:
        try:
            return load_slot_model(path, **{**hints.to_dict(), "backbone_weights": backbone})
        except HintError as error:
            beside = BESIDE.get(str(error).partition(":")[0])
            raise ConfigError(f"teacher.{error}{f' ({beside})' if beside else ''}") from None


def exported_file(uri: str) -> str | None:
    """The exported file that `uri` names: itself, or the fp32 ONNX one of a folder that `export` wrote, else None."""
    if is_exported(uri):
        return uri
    inside = storage.join(uri, ONNX_FILE)
    own = storage.join(uri, CONFIG_FILE)  # of a model folder, which may have an exported form beside it
    return inside if storage.is_folder(uri) and storage.exists(inside) and not storage.exists(own) else None


def open_model(uri: str, hints: CheckpointHints, device: torch.device) -> Segmenter:
    """A model in any form, local, `s3://` or `hf://`: an exported one, which runs on the CPU, or as `load_model`."""
    if (file := exported_file(uri)) is None:
        return load_model(uri, hints).to(device)
    with storage.local_copy(file) as path:
        return load_exported(path)


def load_teacher(config: Config, uri: str) -> VideoSegmenter:
    """The config's teacher, which is at `uri`.

    Raises:
        ConfigError: as in `load_model`, a system that does not teach, or not what the config wants of it, or the
            config says another number of slots than the checkpoint has.
    """
    model = load_model(uri, checkpoint_hints(config))
    if not model.teaches:
        raise ConfigError(
            f"teacher.checkpoint: {uri} is a {type(model).__name__}, whose slots are not distilled (of a SAVi: "
            "those that start from boxes, which students don't have); nearest valid: a SlotContrast, VideoSAUR, "
            "DINOSAUR, SOLV, STEVE or DIOD file, or a SAVi with learned or drawn slots (teacher.savi.conditioning=none)"
        )
    if config.targets.teacher_features and not isinstance(model, SlotModel):
        raise ConfigError(
            f"targets.teacher_features: of a {type(model).__name__} its slots are all that is cached; nearest valid: "
            "false"
        )
    said, found = config.teacher.num_slots, model.config.num_slots
    if config.teacher.checkpoint and said not in (None, found):
        raise ConfigError(
            f"teacher.num_slots: {said}, but {config.teacher.checkpoint} has {found} slots; nearest valid: {found}, "
            "or leave it empty"
        )
    return model


def title_of(name: str, model: SegmenterConfig) -> str:
    """What tables and tags call a model: its name, and that it uses motion or boxes where it does."""
    system = of_config(model)
    return marked(name, boxes=system.uses_boxes(model), motion=system.uses_motion)


def teacher_title(config: Config, model: SegmenterConfig | None) -> str:
    """What they call the config's teacher; where it is not there (None), by what the config says that it is."""
    return config.teacher.title if model is None else title_of(config.teacher.name, model)
