"""From config to a teacher that is to be trained, of whichever system (`teacher.system`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pipeline import storage
from pipeline.config import Config, ConfigError
from pipeline.config.models import Teacher
from pipeline.models.backbone import Backbone, original_positions
from pipeline.models.build import backbone_config, build_backbone, build_model, seeded
from pipeline.models.rivals.diod import DIOD, STRIDE, DIODConfig
from pipeline.models.rivals.savi import SAVi, SAViConfig
from pipeline.models.rivals.solv import SOLV, SOLVConfig
from pipeline.models.rivals.solv_files import dinov2_positions
from pipeline.models.rivals.steve import STEVE, STEVEConfig
from pipeline.models.segmenter import VideoSegmenter


def build_solv(section: Teacher) -> SOLV:
    settings = section.solv
    config = SOLVConfig(
        backbone_config(section),
        **section.sizes,
        half_window=settings.half_window,
        decoder_size=settings.decoder_size,
        merge_distance=settings.merge_distance,
        mean=section.mean,
        std=section.std,
    )
    model = SOLV(config)
    if not model.backbone.plain:
        raise ValueError("SOLV drops tokens of a plain ViT; use such as vit_base_patch14_dinov2")
    model.backbone = build_backbone(section)
    if isinstance(section.backbone, str) and "dinov2" not in section.backbone:
        return model
    if section.backbone_weights == "timm":
        _use_historical_positions(model.backbone, "timm")
    elif section.backbone_weights != "random":
        with storage.local_copy(section.backbone_weights) as path:
            _use_historical_positions(model.backbone, str(path))
    return model


@torch.no_grad()
def _use_historical_positions(backbone: Backbone, source: str) -> None:
    """Positions as in DINOv2's hub models, which SOLV was trained with, and not as timm resamples them."""
    vit = backbone.model
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    vit.pos_embed.copy_(dinov2_positions(original_positions(backbone, source), backbone.grid, prefix))


def build_savi(section: Teacher) -> SAVi:
    settings = section.savi
    values: dict[str, Any] = {**section.sizes, **settings.model_dump(exclude={"conditioning"})}
    unconditional = "learned" if section.initial_slots == "learned" else "drawn"
    config = SAViConfig(
        **values,
        image_size=section.image_size,
        initializer="boxes" if section.uses_boxes else unconditional,
        num_iterations=section.num_iterations or (2 if settings.mlp_size else 1),
        predictor_heads=section.predictor_heads or SAViConfig.predictor_heads,
    )
    return SAVi(config)


def build_steve(section: Teacher) -> STEVE:
    architecture = section.steve.model_dump(exclude={"temperature_steps", "half_life"})
    values: dict[str, Any] = {**section.sizes, **architecture}
    config = STEVEConfig(
        **values,
        image_size=section.image_size,
        num_iterations=section.num_iterations or STEVEConfig.num_iterations,
        predictor_heads=section.predictor_heads or STEVEConfig.predictor_heads,
    )
    return STEVE(config)


def build_diod(section: Teacher) -> DIOD:
    settings, sides = section.diod, (section.image_size, section.image_width or section.image_size)
    for key, side in zip(("image_size", "image_width"), sides, strict=True):
        if side % STRIDE:
            nearest = -(-side // STRIDE) * STRIDE
            raise ValueError(
                f"{key}: {side} is no multiple of {STRIDE}, as DIOD's input is; nearest valid: {nearest}"
            )
    return DIOD(
        DIODConfig(
            grid=(sides[0] // STRIDE, sides[1] // STRIDE),
            num_slots=section.sizes["num_slots"],
            slot_size=section.sizes["slot_size"],
            widths=settings.widths,
            blocks=settings.blocks,
            mean=section.mean,
            std=section.std,
            batch_statistics=settings.batch_statistics,
        )
    )


# By `teacher.system`; those of SlotContrast's kind are `build_model`'s.
BUILDERS: dict[str, Callable[[Teacher], VideoSegmenter]] = {
    "solv": build_solv,
    "savi": build_savi,
    "steve": build_steve,
    "diod": build_diod,
}


def build_teacher(config: Config) -> VideoSegmenter:
    """A new teacher to be trained on the clips; what trains starts from its seed.

    Raises:
        ConfigError: sizes that can't be built, or backbone weights that can't be had.
    """
    section = config.teacher
    if section.system == "slotcontrast":
        return build_model(section, seed=section.train.seed, **section.sizes)
    try:
        with seeded(section.train.seed):
            return BUILDERS[section.system](section)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        raise ConfigError(f"teacher.system={section.system}: {error}") from error
