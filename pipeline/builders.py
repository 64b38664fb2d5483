"""From config to models: the student, and the teacher wherever it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipeline import storage
from pipeline.config import Config, ConfigError, Model, Teacher, ViT
from pipeline.models import (
    Backbone,
    BackboneConfig,
    SlotModel,
    SlotModelConfig,
    load_backbone_weights,
    load_slot_model,
    start_as_soft_kmeans,
)
from pipeline.models.checkpoints import CONFIG_FILE, WEIGHTS_FILE

MODEL_FOLDER = "model"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A block whose torch random numbers follow from `seed`, leaving the others as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def backbone_config(section: Model) -> BackboneConfig:
    if isinstance(section.backbone, ViT):
        return BackboneConfig(None, section.image_size, section.backbone.model_dump())
    return BackboneConfig(section.backbone, section.image_size)


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
    with seeded(0):
        backbone = Backbone(backbone_config(section))
    fill_backbone(backbone, section.backbone_weights)
    return backbone


def build_model(section: Model, *, num_slots: int, slot_size: int, seed: int) -> SlotModel:
    """A new model, its frozen backbone filled; what trains starts from `seed`.

    Raises:
        ConfigError: sizes that can't be built, or backbone weights that can't be had.
    """
    config = SlotModelConfig(
        backbone=backbone_config(section),
        num_slots=num_slots,
        slot_size=slot_size,
        initializer=section.initial_slots,
        decoder_hidden_sizes=section.decoder_hidden_sizes,
        mean=section.mean,
        std=section.std,
    )
    try:
        with seeded(seed):
            model = SlotModel(config)
            if section.initialisation == "soft_kmeans":
                start_as_soft_kmeans(model)
        model.encoder.backbone = build_backbone(section)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        raise ConfigError(f"backbone {section.backbone!r}: {error}") from error
    return model


def build_student(config: Config, *, teacher: SlotModel | SlotModelConfig | None, seed: int) -> SlotModel:
    """The student of a config; sizes left open are the teacher's.

    With a `SlotModel` as teacher, initial slots (or the distribution that they are drawn from) are
    copied, so that slot n means slot n on both sides: unless `distill.initial_slots_from_teacher` says
    otherwise, or sizes differ.

    Raises:
        ConfigError: slot counts or sizes that differ from the teacher's, or that nobody gave.
    """
    teacher_config = teacher.config if isinstance(teacher, SlotModel) else teacher
    sizes = {}
    for key in ("num_slots", "slot_size"):
        own = getattr(config.student, key)
        other = getattr(teacher_config, key) if teacher_config else getattr(config.teacher, key)
        if own is None and other is None:
            raise ConfigError(f"student.{key}: is not set, and no teacher gives it")
        mapped = key == "slot_size" and config.distill.slot_map
        if own is not None and teacher_config is not None and own != other and not mapped:
            raise ConfigError(
                f"student.{key}: {own} differs from the teacher's {other}, and slot n is distilled to slot n; "
                f"nearest valid: {other}"
                + (
                    "; or learn a linear map between them: distill.slot_map=true"
                    if key == "slot_size"
                    else ""
                )
            )
        sizes[key] = own if own is not None else other
    student = build_model(config.student, seed=seed, **sizes)
    same_size = teacher_config is not None and sizes["slot_size"] == teacher_config.slot_size
    copies = config.distill.initial_slots_from_teacher
    if copies and not same_size:
        raise ConfigError(
            f"distill.initial_slots_from_teacher: slots of {sizes['slot_size']} numbers can't start as the "
            "teacher's do, which have another size; leave it out"
        )
    if isinstance(teacher, SlotModel) and same_size and copies is not False:
        if student.config.initializer != teacher.config.initializer:
            raise ConfigError(
                f"student.initial_slots: {student.config.initializer!r} differs from the teacher's "
                f"{teacher.config.initializer!r}; nearest valid: {teacher.config.initializer!r}"
            )
        student.initializer.load_state_dict(teacher.initializer.state_dict())
    return student


def build_teacher(config: Config) -> SlotModel:
    """A new teacher to be trained on the clips."""
    section = config.teacher
    if section.num_slots is None or section.slot_size is None:
        raise ConfigError("teacher.num_slots and teacher.slot_size: must be set to train a teacher")
    return build_model(
        section, num_slots=section.num_slots, slot_size=section.slot_size, seed=section.train.seed
    )


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(uri: str, **untold: Any) -> SlotModel:
    """`load_slot_model` for a local path or an `s3://` one; `untold` are its keyword arguments."""
    with storage.local_copy(uri) as path:
        return load_slot_model(path, **untold)


def untold_by_file(section: Teacher) -> dict[str, Any]:
    """What a config says of a public checkpoint that the file itself does not: for `load_model`."""
    return {
        "num_heads": section.num_heads,
        "num_slots": section.num_slots,
        "mean": section.mean,
        "std": section.std,
    }


def model_hash(uri: str) -> str:
    """A hash of a model's files: changes whenever its weights or its config do."""
    fs, path = storage.filesystem(uri)
    if storage.retry(lambda: bool(fs.isdir(path)), uri):
        files = [storage.join(uri, name) for name in (CONFIG_FILE, WEIGHTS_FILE)]
    else:
        files = [uri]
    try:
        return storage.fingerprint([storage.hash_file(file) for file in files])
    except FileNotFoundError:
        raise ConfigError(f"teacher.checkpoint: there is no model at {uri!r}") from None


def backbone_identity(section: Model) -> dict[str, Any]:
    """What decides the features of a backbone: for fingerprints."""
    weights = section.backbone_weights
    if weights not in ("timm", "random"):
        try:
            weights = storage.hash_file(weights)
        except FileNotFoundError:
            raise ConfigError(f"backbone_weights: there is no file {weights!r}") from None
    config = backbone_config(section)
    return {
        "name": config.name,
        "arguments": config.arguments,
        "image_size": config.image_size,
        "weights": weights,
        "mean": section.mean,
        "std": section.std,
    }


def teacher_location(config: Config, clips_fingerprint: str) -> str:
    """Where the teacher is: `teacher.checkpoint`, or the place where `jobs.teacher` writes it."""
    if config.teacher.checkpoint:
        return storage.absolute(config.teacher.checkpoint)
    return storage.join(teacher_run_uri(config, clips_fingerprint), MODEL_FOLDER)


def teacher_run_uri(config: Config, clips_fingerprint: str) -> str:
    section = config.teacher
    content = {
        "clips": clips_fingerprint,
        "model": section.model_dump(exclude={"name", "checkpoint", "num_heads", "train", "backbone_weights"}),
        "backbone": backbone_identity(section),
        "train": section.train.model_dump(exclude=RUN_DETAILS),
        "views": view_recipe(config),
    }
    return storage.join(storage.absolute(config.storage.root), "teachers", storage.fingerprint(content))


# Settings of a training run that don't change what is learned.
RUN_DETAILS = {
    "cpus_per_worker",
    "loader_threads",
    "log_every",
    "checkpoint_every",
    "validate_every",
    "keep_checkpoints",
    "overlays",
    "max_failures",
    "measure_bound_every",
}


def view_recipe(config: Config) -> dict[str, Any]:
    """What decides the views, for fingerprints."""
    keys = {"views", "crop", "min_scale", "flip"}
    return {**config.targets.model_dump(include=keys), "seed": config.dataset.seed}


def require_teacher(config: Config, clips_fingerprint: str) -> str:
    """`teacher_location`, after making sure that something is there.

    Raises:
        ConfigError: no model there.
    """
    uri = teacher_location(config, clips_fingerprint)
    if not storage.exists(uri):
        if config.teacher.checkpoint:
            raise ConfigError(f"teacher.checkpoint: there is no file or folder {config.teacher.checkpoint!r}")
        raise ConfigError(
            "there is no teacher of these clips and settings: train one (python -m jobs.teacher CONFIG), or name one "
            "that you have (teacher.checkpoint=PATH)"
        )
    return uri
