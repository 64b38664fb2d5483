"""Frozen vision transformers from timm, read out the way that slot models use them.

The features are the patch tokens of the last block's output *before* the final norm (as in DINOSAUR,
VideoSAUR and SlotContrast), so the final norm is removed: public checkpoints don't have its weights.
"""

from __future__ import annotations

import difflib
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models._timm import import_timm


@dataclass(frozen=True)
class BackboneConfig:
    """A timm `VisionTransformer`: by timm's name, or by its own keyword arguments.

    `name` is a timm model name (`"vit_small_patch14_dinov2"`), or None for a plain
    `VisionTransformer(**arguments)`. `image_size` is the side of the square input in pixels.
    """

    name: str | None
    image_size: int
    arguments: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        arguments = self.arguments or {}
        return self.name or "ViT(width {}, depth {}, patch {})".format(
            *(arguments.get(k, "?") for k in ("embed_dim", "depth", "patch_size"))
        )


class Backbone(nn.Module):
    """Images `(M, 3, S, S)` -> patch features `(M, P, F)`; always frozen, always in eval mode.

    Raises:
        ValueError: an unknown timm name, a model that is not a plain ViT, or an image size that the
            patch size does not divide.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        timm = import_timm()
        from timm.layers import PatchEmbed
        from timm.models.vision_transformer import VisionTransformer

        arguments = {**(config.arguments or {}), "img_size": config.image_size, "num_classes": 0}
        if config.name is None:
            model = VisionTransformer(**{"global_pool": "", **arguments})
        else:
            if config.name.split(".")[0] not in timm.list_models():
                near = difflib.get_close_matches(config.name, timm.list_models(), n=5)
                raise ValueError(f"timm has no model {config.name!r}; similar: {', '.join(near) or '-'}")
            try:
                model = timm.create_model(config.name, pretrained=False, **arguments)
            except TypeError as error:  # of an argument that every ViT knows
                raise ValueError(f"backbone {config.name!r} is not a ViT ({error})") from error
        if not isinstance(model, VisionTransformer):
            raise ValueError(f"backbone {config.name!r} is a {type(model).__name__}, not a ViT")
        if not isinstance(model.patch_embed, PatchEmbed):
            raise ValueError(f"backbone {config.name!r} is a hybrid: its patches come from another network")
        model.norm = nn.Identity()
        self.model = model
        self.name = config.name
        patch = model.patch_embed.patch_size[0]
        if config.image_size % patch:
            lower = config.image_size // patch * patch
            raise ValueError(
                f"image size {config.image_size} is not a multiple of the patch size {patch} of "
                f"{config.label}; nearest: {lower} or {lower + patch}"
            )
        self.patch_size: int = patch
        self.grid: int = config.image_size // patch
        # Interpolated position embeddings have been off by one at some sizes (timm#2111).
        assert model.patch_embed.num_patches == self.grid**2, (
            model.patch_embed.num_patches,
            self.grid,
        )
        self.num_patches = self.grid**2
        self.feature_size: int = model.embed_dim
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        return super().train(False)

    @torch.no_grad()
    def forward(self, images_MCHW: Tensor) -> Tensor:
        tokens = self.model.forward_features(images_MCHW)
        return tokens[:, self.model.num_prefix_tokens :]

    @torch.no_grad()
    def features_and_keys(self, images_MCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The features, and the attention keys of the last block, all heads side by side: both `(M, P, F)`."""
        seen: list[Tensor] = []
        projection = self.model.get_submodule(f"blocks.{len(self.model.blocks) - 1}.attn.qkv")
        hook = projection.register_forward_hook(lambda _, __, qkv: seen.append(qkv.chunk(3, dim=-1)[1]))
        try:
            features = self(images_MCHW)
        finally:
            hook.remove()
        return features, seen[0][:, self.model.num_prefix_tokens :]


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` or a PyTorch file, without running any pickled code.

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither format, or a pickle that holds more than tensors and plain values.
    """
    content = read_checkpoint_file(path)
    state = content.get("state_dict", content.get("model", content))
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path}: no tensors found in the file")
    return tensors


def read_checkpoint_file(path: str | Path) -> dict[str, Any]:
    """The whole content of a checkpoint file; errors as in `read_state_dict`.

    PyTorch's own messages advise to turn its protection off, so they are not passed on.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        held = _pickled_objects(path, error)
        if held:
            raise ValueError(
                f"{path}: refused, it is a pickle that holds more than tensors ({held}), and reading such a file "
                "can run any code that its author put there. Ask for a file of the tensors alone; where you trust "
                "the author: torch.save({'state_dict': torch.load(FILE, weights_only=False)['state_dict']}, NEW_FILE)"
            ) from error
        kind = "safetensors" if path.suffix == ".safetensors" else "a PyTorch file"
        raise ValueError(
            f"{path}: can't be read as {kind}: cut off, damaged or something else ({type(error).__name__})"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _pickled_objects(path: Path, error: Exception) -> str:
    """What the unpickler refused, in words; empty where the file is no pickle at all."""
    if not isinstance(error, pickle.UnpicklingError):
        return ""
    named = re.search(r"(?:GLOBAL|global:?|class|function)\s+`?([A-Za-z_][\w]*(?:\.\w+)+)", str(error))
    if named:
        return named[1]
    with path.open("rb") as file:
        # PyTorch's own files are zip archives, or pickles of an old protocol that it knows to read.
        return "a plain pickle" if file.read(1) == b"\x80" else ""


def load_backbone_weights(backbone: Backbone, source: str | Path) -> None:
    """Fills `backbone` from timm's hub (`source="timm"`) or from a local file of timm's key names.

    Position embeddings of another size are resampled by timm; a final norm and a head are ignored.

    Raises:
        FileNotFoundError, ValueError: the file is missing, unreadable, its keys or shapes differ, or a tensor is
            not finite.
        RuntimeError: the hub can't be reached.
    """
    timm = import_timm()
    from timm.models.vision_transformer import checkpoint_filter_fn

    model = backbone.model
    if str(source) == "timm":
        name = backbone.name
        if not name:
            raise ValueError("pretrained weights need a timm name as backbone")
        try:
            donor = timm.create_model(
                name, pretrained=True, img_size=model.patch_embed.img_size, num_classes=0
            )
        except Exception as error:
            raise RuntimeError(
                f"the pretrained weights of {name} could not be downloaded ({type(error).__name__}); "
                "give a local file (backbone_weights: PATH) or random weights (backbone_weights: random)"
            ) from error
        state = donor.state_dict()
    else:
        state = checkpoint_filter_fn(read_state_dict(source), model)
    state = {k: v for k, v in state.items() if not k.startswith(("norm.", "fc_norm.", "head."))}
    check_state_dict(model, state, str(source))
    check_finite(state, str(source))
    model.load_state_dict(state)


def check_state_dict(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Raises one ValueError that lists every missing, unexpected and wrongly shaped key."""
    own = module.state_dict()
    problems = [f"missing {k}" for k in own if k not in state]
    problems += [f"unexpected {k}" for k in state if k not in own]
    problems += [
        f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"{source}: the weights don't fit the model: {shown}")


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Raises ValueError where tensors hold NaN or infinity, as a run leaves them that diverged; it names them."""
    wrong = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise ValueError(
            f"{source}: {len(wrong)} of {len(state)} tensors are not finite ({shown}): the training that made them "
            "diverged; take an earlier checkpoint, or train again with a lower learning rate"
        )
