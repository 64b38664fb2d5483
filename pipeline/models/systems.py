"""The systems that there are: what tells their files apart, and what reads, builds and writes them.

A new system gets a module, a module of its files beside it, and a row of `SYSTEMS`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.models import slot_files
from pipeline.models.flax_files import write_flax
from pipeline.models.hints import CheckpointHints
from pipeline.models.rivals import diod_files, savi_files, solv_files, steve_files, stosavi_files
from pipeline.models.rivals.diod import DIOD, DIODConfig
from pipeline.models.rivals.savi import SAVi, SAViConfig
from pipeline.models.rivals.solv import SOLV, SOLVConfig
from pipeline.models.rivals.steve import STEVE, STEVEConfig
from pipeline.models.rivals.stosavi import StoSAVi, StoSAViConfig
from pipeline.models.segmenter import SegmenterConfig, VideoSegmenter
from pipeline.models.slot_model import SlotModel, SlotModelConfig


@dataclass(frozen=True)
class System:
    """A kind of models and of their public files.

    model, config: `model(config)` is one with random weights. recognises: whether the content of a public file is of
    this system. read: the config and the tensors, by our names, of a file that others have written (`content, hints,
    source`). tensors: those of a file that has a config of ours. written: what a public file of a model holds, beside
    that config. allowed: plain classes that its files may hold beside tensors. write: what writes a file. uses_motion:
    whether it learns from motion segments, which others do without. uses_boxes: whether a model with this config starts
    from boxes of objects.
    """

    model: Callable[[Any], VideoSegmenter]
    config: Any
    recognises: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any], CheckpointHints, str], tuple[SegmenterConfig, dict[str, Tensor]]]
    tensors: Callable[[Mapping[str, Any], str], dict[str, Tensor]]
    written: Callable[[Any], dict[str, Any]]
    allowed: tuple[type, ...] = ()
    write: Callable[[dict[str, Any], str | Path], None] = torch.save
    uses_motion: bool = False
    uses_boxes: Callable[[Any], bool] = lambda config: False


SLOT_MODEL = System(
    SlotModel,
    SlotModelConfig,
    lambda content: True,  # what no other knows: the error says what it lacks
    slot_files.read,
    slot_files.tensors,
    slot_files.written,
)

# By what their configs say as `system`; slot models' say nothing.
SYSTEMS = {
    "solv": System(
        SOLV,
        SOLVConfig,
        solv_files.is_solv,
        solv_files.read,
        solv_files.tensors,
        solv_files.written,
        (Namespace,),
    ),
    "diod": System(
        DIOD,
        DIODConfig,
        diod_files.is_diod,
        diod_files.read,
        diod_files.tensors,
        diod_files.written,
        uses_motion=True,
    ),
    "steve": System(
        STEVE,
        STEVEConfig,
        steve_files.is_steve,
        steve_files.read,
        steve_files.tensors,
        steve_files.written,
    ),
    "savi": System(
        SAVi,
        SAViConfig,
        savi_files.is_savi,
        savi_files.read,
        savi_files.tensors,
        savi_files.written,
        write=write_flax,
        uses_boxes=lambda config: config.initializer == "boxes",
    ),
    "stosavi": System(
        StoSAVi,
        StoSAViConfig,
        stosavi_files.is_stosavi,
        stosavi_files.read,
        stosavi_files.tensors,
        stosavi_files.written,
    ),
}


def of_content(content: Mapping[str, Any]) -> System:
    """The system that a public file's content is of."""
    return next((s for s in SYSTEMS.values() if s.recognises(content)), SLOT_MODEL)


def of_model(model: VideoSegmenter) -> System:
    """The system that a model is of."""
    return next((s for s in SYSTEMS.values() if s.model is type(model)), SLOT_MODEL)


def of_config(config: SegmenterConfig) -> System:
    """The system that a model with this config is of."""
    return next((s for s in SYSTEMS.values() if s.config is type(config)), SLOT_MODEL)


def parse_config(values: dict[str, Any]) -> tuple[System, SegmenterConfig]:
    """The system and the config of a model folder's plain values.

    Raises:
        KeyError, TypeError, ValueError: they are no config.
    """
    values = dict(values)
    name = values.pop("system", None)
    if name is not None and name not in SYSTEMS:
        raise ValueError(f"system: {name!r}; nearest valid: {', '.join(SYSTEMS)}")
    system = SLOT_MODEL if name is None else SYSTEMS[name]
    return system, system.config.from_dict(values)


def model_of(config: SegmenterConfig) -> VideoSegmenter:
    """A model with random weights."""
    return of_config(config).model(config)
