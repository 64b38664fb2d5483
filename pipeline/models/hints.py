"""What the shapes of a public checkpoint tell of its model, and the hints for what they don't."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.models.backbone import BackboneConfig
from pipeline.models.pixels import IMAGENET_MEAN, IMAGENET_STD

BACKBONE = "encoder.backbone.model."  # what a ViT's names begin with in a slot model's file


class HintError(ValueError):
    """A hint that a file needs and that is missing or can't be; the message starts with its name."""


@dataclass(frozen=True)
class CheckpointHints:
    """What a public checkpoint file does not tell, so that whoever loads it has to.

    num_heads: attention heads of the ViT. By default width / 64, as in every public ViT. Of models without one:
    heads of the decoder, by default as published (STEVE: 4).
    num_slots: of models that draw their initial slots, and so can have any number of them; learned
    slots are counted in the file. Of SAVi with boxes: one more than these, by default 24.
    mean, std: the normalisation of RGB values in [0, 1] that the model was trained with, by default
    ImageNet's; not looked at where a system has its own (DIOD, SAVi, STEVE).
    backbone_weights: a file of the frozen ViT in timm's names, of models whose files lack it (SOLV).
    batch_statistics: False: DIOD's batch norm uses its running statistics. By default, as published, those of the
    clip at hand.
    carried: True: DIOD's clips go on from each other's slots and memory, which is ours. By default, as published, each
    starts anew.
    predictor_heads: attention heads of the predictor, of models that may have any (STEVE and SlotFormer's SAVi, by
    default 4).
    num_iterations: of slot attention in every frame, of models that may have any: SAVi, by default 1 as published, or
    2 where its slot attention has an MLP; STEVE and SlotFormer's SAVi, by default 2.
    image_size: side of the input in pixels, of models whose layers can have several strides: SAVi, by default 64 where
    its CNN has the width of SAVi-S and 128 where it has SAVi-M's; SlotFormer's SAVi, by default the side of its grid.
    stochastic: whether slots are noisy, of SlotFormer's SAVi (those for CLEVRER are).
    """

    num_heads: int | None = None
    num_slots: int | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    backbone_weights: str | None = None
    batch_statistics: bool | None = None
    carried: bool | None = None
    predictor_heads: int | None = None
    num_iterations: int | None = None
    image_size: int | None = None
    stochastic: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name: the keyword arguments of `load_slot_model`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CheckpointHints:
        """The inverse of `to_dict`, also after a round trip through JSON; what is absent is the default.

        Raises:
            TypeError: names that are no hints.
            ValueError: sizes and counts below 1.
        """
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if isinstance(arguments.get("backbone_weights"), Path):
            arguments["backbone_weights"] = str(arguments["backbone_weights"])
        hints = cls(**arguments)
        for name in ("num_heads", "predictor_heads", "num_iterations", "image_size"):
            value = getattr(hints, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value}; nearest valid: 1")
        return hints


class Shapes:
    """Sizes read off the tensors of a file, whatever of it is missing or damaged.

    What can't be read is guessed, so that a model can be built and compared with the file: that gives
    the one error which lists all that is wrong.
    """

    def __init__(self, state: Mapping[str, Tensor], source: str) -> None:
        self.state, self.source = state, source

    def has(self, prefix: str) -> bool:
        return any(k.startswith(prefix) for k in self.state)

    def size(self, *places: tuple[str, int], default: int | None = None) -> int:
        """The first size found at `(key, axis)`.

        Raises:
            ValueError: none of them is there, and there is no default.
        """
        for key, axis in places:
            shape = self.state[key].shape if key in self.state else ()
            if -len(shape) <= axis < len(shape) and shape[axis]:
                return shape[axis]
        if default is None:
            missing = ", ".join(f"`{key}`" for key, _ in places)
            first = ", ".join(list(self.state)[:5]) or "none"
            raise ValueError(
                f"{self.source}: not a slot model, it has no {missing} (its first keys: {first})"
            )
        return default

    def count(self, pattern: str) -> int:
        """One more than the largest number that the pattern's group has in any key."""
        return 1 + max((int(m[1]) for k in self.state if (m := re.match(pattern, k))), default=-1)

    def linear_sizes(self, prefix: str) -> list[int]:
        """Output sizes of the linear layers `<prefix>0`, `<prefix>2` and so on, with ReLU between them."""
        sizes: list[int] = []
        for index in range(0, self.count(re.escape(prefix) + r"(\d+)\."), 2):
            places = ((f"{prefix}{index}.weight", 0), (f"{prefix}{index}.bias", 0))
            sizes.append(self.size(*places, default=sizes[-1] if sizes else 1))
        return sizes


def infer_vit(
    shapes: Shapes, num_heads: int | None, *, prefix: str = BACKBONE, patches: int | None = None
) -> tuple[BackboneConfig, int]:
    """The ViT for a square input, and the number of its patches.

    prefix: what its names begin with. patches: those that the slot model has, where the ViT's position embeddings may
    be of more; None: as the ViT has them.
    """
    patch_embedding, positions = prefix + "patch_embed.proj.weight", prefix + "pos_embed"
    width = shapes.size((patch_embedding, 0), (positions, 2))
    patch = shapes.size((patch_embedding, 2), default=16)
    if num_heads and width % num_heads:
        raise HintError(f"num_heads: {num_heads} does not divide the width {width} of the checkpoint's ViT")
    if num_heads is None and width % 64:
        raise HintError(
            f"num_heads: must be given, as the ViT's width {width} is not a multiple of 64 and the checkpoint's "
            "shapes don't tell its heads"
        )
    class_token = shapes.has(prefix + "cls_token")
    registers = shapes.size((prefix + "reg_token", 1), default=0)
    embedded = shapes.size((positions, 1), default=0)
    num_patches = patches or max(embedded - class_token - registers, 1)
    class_token = class_token or embedded == num_patches + registers + 1  # where its key is missing
    grid = max(1, round(num_patches**0.5))
    blocks = re.escape(prefix) + r"blocks\.(\d+)\."
    # Models with registers add position embeddings to the patches alone.
    patches_alone = embedded == num_patches or (
        embedded != num_patches + class_token + registers and math.isqrt(embedded) ** 2 == embedded
    )
    arguments: dict[str, Any] = {
        "patch_size": patch,
        "embed_dim": width,
        "depth": shapes.count(blocks),
        "num_heads": num_heads or width // 64,
        "mlp_ratio": shapes.size((prefix + "blocks.0.mlp.fc1.weight", 0), default=4 * width) / width,
        "qkv_bias": bool(shapes.count(blocks + r"attn\.qkv\.bias")),
        "init_values": 1.0 if shapes.count(blocks + r"ls\d\.gamma") else None,
        "class_token": class_token,
        "reg_tokens": registers,
        "no_embed_class": patches_alone and class_token,
    }
    return BackboneConfig(name=None, image_size=grid * patch, arguments=arguments), grid**2
