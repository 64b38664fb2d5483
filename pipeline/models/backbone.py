"""Frozen backbones from timm, read out the way that slot models use them: a grid of features.

- Of a vision transformer (timm's `VisionTransformer`, or `Eva` as DINOv3 is one) the features are the patch tokens of
  the last block's output *before* the final norm (as in DINOSAUR, VideoSAUR and SlotContrast), so the final norm is
  removed: public checkpoints don't have its weights. Cut short, its last block is the last of those that are left.
- Of any other model, convolutional or hybrid, they are one of the maps that timm's `features_only` gives; the layers
  behind it are removed.

Nothing outside of this file knows which of them a model has.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models._timm import import_timm
from pipeline.models.files import check_finite, check_state_dict, read_state_dict
from pipeline.models.pixels import Grid, resized_grid

STRIDES = (8, 32)  # pixels between neighbours of a map: the least and the most


@dataclass(frozen=True)
class BackboneConfig:
    """A model of timm's: by its name, or a `VisionTransformer` by its own keyword arguments.

    `name` is a timm model name (`"vit_small_patch14_dinov2"`), or None for a plain
    `VisionTransformer(**arguments)`. `image_size` is the side of the square input in pixels, or its height where
    `image_width` says another width. `stride`, pixels, chooses one of the maps of a model that is no ViT; None is the
    deepest. `grid` is what the features are resampled to; None is the backbone's own. `blocks` is how many of a
    ViT's blocks there are, from the first on; None is all.
    """

    name: str | None
    image_size: int
    arguments: dict[str, Any] | None = None
    stride: int | None = None
    grid: Grid | None = None
    blocks: int | None = None
    image_width: int | None = None

    @property
    def input_size(self) -> Grid:
        """Height and width of the input, pixels."""
        return self.image_size, self.image_width or self.image_size

    @property
    def label(self) -> str:
        arguments = self.arguments or {}
        whole = self.name or "ViT(width {}, depth {}, patch {})".format(
            *(arguments.get(k, "?") for k in ("embed_dim", "depth", "patch_size"))
        )
        return whole + self.cut

    @property
    def cut(self) -> str:
        """What stands behind its name where it is cut short."""
        return "" if self.blocks is None else f" up to block {self.blocks}"


class Backbone(nn.Module):
    """Images `(M, 3, H, W)` -> features of a grid `(M, P, F)`; always frozen, always in eval mode.

    Raises:
        ValueError: an unknown timm name, a model that gives no grid of features, a stride or blocks that it doesn't
            have, or an image size that it can't take.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _create(config)
        self._map: int | None = None  # which of a model's maps is read; None: its patch tokens
        # Knows features of these pixels, or has them computed: set where many models see the same frames.
        self.remember: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor] | None = None
        self.eval()
        if _is_transformer(self.model):
            self.whole_depth = len(self.model.blocks)  # before it is cut short
            own, size = _use_tokens(self.model, config), self.model.embed_dim
        else:
            self._map = _use_map(self.model, config)
            own, size = self._try_map()
        self._own_grid = own
        self.grid: Grid = config.grid or own
        self.feature_size: int = size
        self.num_patches = self.grid[0] * self.grid[1]
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> Backbone:
        return super().train(False)

    @property
    def plain(self) -> bool:
        """Whether it is timm's `VisionTransformer` in its own grid's patches, as public checkpoints have."""
        return self._map is None and isinstance(self.model, _vision_transformer())

    @property
    def trained_colours(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and standard deviation of the colours that timm's weights of that name were trained with."""
        found = import_timm().models.get_pretrained_cfg(self.config.name) if self.config.name else None
        return (found.mean, found.std) if found else None

    @torch.no_grad()
    def forward(self, images_MCHW: Tensor) -> Tensor:
        return (
            self._compute(images_MCHW) if self.remember is None else self.remember(images_MCHW, self._compute)
        )

    def _compute(self, images_MCHW: Tensor) -> Tensor:
        if self._map is not None:
            return self._resampled(self._read_map(images_MCHW).flatten(2).transpose(1, 2))
        tokens = self.model.forward_features(images_MCHW)
        return self._resampled(tokens[:, self.model.num_prefix_tokens :])

    @torch.no_grad()
    def features_and_keys(self, images_MCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The features, and the attention keys of the last block, all heads side by side: both `(M, P, F)`.

        Raises:
            ValueError: a model whose last block has no projection to queries, keys and values.
        """
        seen: list[Tensor] = []
        projection = None if self._map is not None else getattr(self.model.blocks[-1].attn, "qkv", None)
        if projection is not None:
            hook = projection.register_forward_hook(lambda _, __, qkv: seen.append(qkv.chunk(3, dim=-1)[1]))
            try:
                features = self(images_MCHW)
            finally:
                hook.remove()
        if not seen:
            raise ValueError(
                f"backbone {self.config.name!r} shows no attention keys, which temporal similarity is made of; "
                "use a plain ViT, such as vit_small_patch14_dinov2"
            )
        return features, self._resampled(seen[0][:, self.model.num_prefix_tokens :])

    @torch.no_grad()
    def features_of_tokens(self, images_MCHW: Tensor, tokens_MK: Tensor) -> Tensor:
        """Features `(M, K, F)` of some of a ViT's patches, where the others are dropped before the first block."""
        prefix = self.model.num_prefix_tokens

        def drop(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
            patches = inputs[0][:, prefix:]
            kept = patches.gather(1, tokens_MK.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
            return torch.cat([inputs[0][:, :prefix], kept], 1)

        hook = self.model.blocks[0].register_forward_pre_hook(drop)
        try:
            return self.model.forward_features(images_MCHW)[:, prefix:]
        finally:
            hook.remove()

    def _resampled(self, features_MPF: Tensor) -> Tensor:
        """Features of the own grid at the grid that was asked for, bilinearly."""
        if self.grid == self._own_grid:
            return features_MPF
        return resized_grid(features_MPF, self._own_grid, self.grid)

    def _read_map(self, images_MCHW: Tensor) -> Tensor:
        maps = self.model.forward_intermediates(
            images_MCHW,
            indices=[self._map],
            norm=False,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        return maps[0]

    @torch.no_grad()
    def _try_map(self) -> tuple[Grid, int]:
        """The grid and the channels of the map: models round sizes that their stride does not divide up or down."""
        name, (height, width) = self.config.name, self.config.input_size
        try:
            found = self._read_map(torch.zeros(1, 3, height, width))
        except Exception as error:  # of whatever layer the size doesn't suit
            size = f"{height}" if height == width else f"{height} x {width}"
            raise ValueError(f"backbone {name!r} can't take images of {size} pixels ({error})") from error
        return (found.shape[2], found.shape[3]), found.shape[1]


def _create(config: BackboneConfig, *, pretrained: bool = False) -> Any:
    timm = import_timm()
    size = {"img_size": config.input_size}
    arguments = {**(config.arguments or {}), "num_classes": 0}
    if config.name is None:
        return _vision_transformer()(**{"global_pool": "", **arguments, **size})
    if config.name.split(".")[0] not in timm.list_models():
        near = difflib.get_close_matches(config.name, timm.list_models(), n=5)
        raise ValueError(f"timm has no model {config.name!r}; similar: {', '.join(near) or '-'}")
    try:
        return timm.create_model(config.name, pretrained=pretrained, **arguments, **size)
    except TypeError:  # of an argument that models of a fixed size know, and others don't
        return timm.create_model(config.name, pretrained=pretrained, **arguments)


def _vision_transformer() -> type[nn.Module]:
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer


def _is_transformer(model: nn.Module) -> bool:
    """Whether a model's features are the patch tokens of one grid; hybrids' patches come from another network."""
    from timm.layers import PatchEmbed
    from timm.models.eva import Eva

    return isinstance(model, (_vision_transformer(), Eva)) and isinstance(model.patch_embed, PatchEmbed)


def _use_tokens(model: Any, config: BackboneConfig) -> Grid:
    """Removes what comes after a transformer's blocks; its grid."""
    from timm.models.eva import Eva

    depth = len(model.blocks)
    if config.blocks is not None and not 1 <= config.blocks <= depth:
        raise ValueError(
            f"backbone_blocks {config.blocks}: {config.name or 'the ViT'} has {depth}; valid: 1 to {depth}"
        )
    model.blocks = model.blocks[: config.blocks]
    model.norm = nn.Identity()
    is_eva = isinstance(model, Eva)
    if is_eva:  # of a plain ViT what else there is stays, as public checkpoints name it
        model.fc_norm, model.attn_pool = nn.Identity(), None
    patch = model.patch_embed.patch_size[0]
    if config.stride not in (None, patch):
        raise ValueError(
            f"stride {config.stride}: {config.label} is a ViT, whose stride is its patch size {patch}"
        )
    for side in config.input_size:
        if side % patch:
            lower = side // patch * patch
            raise ValueError(
                f"image size {side} is not a multiple of the patch size {patch} of {config.label}; "
                f"nearest: {lower} or {lower + patch}"
            )
    rows, columns = (side // patch for side in config.input_size)
    # Interpolated position embeddings have been off by one at some sizes (timm#2111).
    assert model.patch_embed.num_patches == rows * columns, (model.patch_embed.num_patches, rows, columns)
    return rows, columns


def _use_map(model: Any, config: BackboneConfig) -> int:
    """Removes what comes after the map that is read; which of the model's maps that is."""
    if config.blocks is not None:
        raise ValueError(
            f"backbone_blocks {config.blocks}: {config.name!r} is no ViT, and is cut short by its stride; leave it out"
        )
    least, most = STRIDES
    strides = [info["reduction"] for info in model.feature_info]
    valid = sorted({stride for stride in strides if least <= stride <= most})
    if not valid:
        raise ValueError(
            f"backbone {config.name!r} gives no grid of features with a stride of {least} to {most} pixels (it has "
            f"{', '.join(map(str, sorted(set(strides))))}); ViTs, DINOv3, ConvNeXt, MobileNetV4, FastViT and "
            "EfficientViT do"
        )
    stride = config.stride or valid[-1]
    if stride not in valid:
        raise ValueError(
            f"stride {stride}: {config.name!r} gives no such map; its strides are {', '.join(map(str, valid))}"
        )
    index = len(strides) - 1 - strides[::-1].index(stride)
    model.prune_intermediate_layers([index], prune_norm=True, prune_head=True)
    return index


def load_backbone_weights(backbone: Backbone, source: str | Path) -> None:
    """Fills `backbone` from timm's hub (`source="timm"`) or from a local file of timm's key names.

    Position embeddings of another size are resampled by timm; layers that the backbone does without (a final norm, a
    head, blocks that were cut off, stages behind its map) are ignored.

    Raises:
        FileNotFoundError, ValueError: the file is missing, unreadable, its keys or shapes differ, or a tensor is
            not finite.
        RuntimeError: the hub can't be reached.
    """
    model = backbone.model
    hub = str(source) == "timm"
    state = _pretrained(backbone.config) if hub else _as_sized(read_state_dict(source), model)
    unused = _unused_names(backbone)
    state = {k: v for k, v in state.items() if not k.startswith(unused)}
    check_state_dict(model, state, str(source))
    check_finite(state, str(source))
    model.load_state_dict(state)


def original_positions(backbone: Backbone, source: str | Path) -> Tensor:
    """A ViT's position embeddings `(1, P', F)` as `load_backbone_weights` finds them, before they are resampled."""
    if str(source) == "timm":
        model = import_timm().create_model(backbone.config.name, pretrained=True, num_classes=0)
        return model.pos_embed.detach()
    return read_state_dict(source)["pos_embed"]


def _pretrained(config: BackboneConfig) -> Mapping[str, Tensor]:
    if not config.name:
        raise ValueError("pretrained weights need a timm name as backbone")
    try:
        return _create(config, pretrained=True).state_dict()
    except Exception as error:
        raise RuntimeError(
            f"the pretrained weights of {config.name} could not be downloaded ({type(error).__name__}); "
            "give a local file (backbone_weights: PATH) or random weights (backbone_weights: random)"
        ) from error


def _as_sized(state: dict[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """The tensors with embeddings and biases of positions resampled to the model's size, as timm does it."""
    convert: Any = getattr(importlib.import_module(type(model).__module__), "checkpoint_filter_fn", None)
    if _is_transformer(model):
        return convert(state, model)
    own = model.state_dict()
    resized = set(own) <= set(state) and any(state[k].shape != own[k].shape for k in own)
    try:
        return convert(state, model) if convert and resized else state
    except (KeyError, RuntimeError):  # another model's file, of which there is more to say than this
        return state


def _unused_names(backbone: Backbone) -> tuple[str, ...]:
    """Of a file's tensors what the backbone does without: names, or what they begin with."""
    if isinstance(backbone.model, _vision_transformer()):
        cut_off = range(backbone.config.blocks or backbone.whole_depth, backbone.whole_depth)
        return "norm.", "fc_norm.", "head.", *(f"blocks.{index}." for index in cut_off)
    config = backbone.config
    with torch.device("meta"):
        whole = import_timm().create_model(config.name, pretrained=False, **(config.arguments or {}))
    return tuple(set(whole.state_dict()) - set(backbone.model.state_dict()))
