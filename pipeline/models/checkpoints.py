"""Reading and writing slot models: public checkpoint files, and our own folders.

A model folder holds `model.safetensors` and `config.json`; of a slim one see `slim`. Tensor names are those of the
public layout in both formats, where a video model has `.module` in some of them and an image model has not.

Public files are told apart by their keys: SlotContrast, SRL and SlotCurri (`initializer.slots`, MLP
decoder), VideoSAUR (`initializer.mean`, no MLP in slot attention, slot mixer), DINOSAUR (no predictor).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.log import log
from pipeline.models._timm import import_timm
from pipeline.models.backbone import BackboneConfig, check_finite, check_state_dict, read_checkpoint_file
from pipeline.models.initialisation import WithoutDraws
from pipeline.models.slim import (
    CONFIG_KEY,
    BackboneSource,
    FrozenBackbone,
    describe_backbone,
    find_backbone,
    frozen_part,
)
from pipeline.models.slot_model import IMAGENET_MEAN, IMAGENET_STD, SlotModel, SlotModelConfig

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE)
_BACKBONE = "encoder.backbone.model."
_TRAINING_HEADS = ("projector.", "projector2.")
_EMBEDDED_CONFIG = "slotmatch_config"  # an extra entry of the `.ckpt` files that we write


class HintError(ValueError):
    """A hint that a file needs and that is missing or can't be; the message starts with its name."""


@dataclass(frozen=True)
class CheckpointHints:
    """What a public checkpoint file does not tell, so that whoever loads it has to.

    num_heads: attention heads of the ViT. By default width / 64, as in every public ViT.
    num_slots: of models that draw their initial slots, and so can have any number of them; learned
    slots are counted in the file.
    mean, std: the normalisation of RGB values in [0, 1] that the model was trained with, by default
    ImageNet's.
    """

    num_heads: int | None = None
    num_slots: int | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name: the keyword arguments of `load_slot_model`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CheckpointHints:
        """The inverse of `to_dict`, also after a round trip through JSON; what is absent is the default.

        Raises:
            TypeError: names that are no hints.
        """
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)


def load_slot_model(
    path: str | Path,
    *,
    num_heads: int | None = None,
    num_slots: int | None = None,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    backbone: str | Path | None = None,
) -> SlotModel:
    """Builds a model from a checkpoint and loads its weights; in eval mode, on the CPU.

    The keyword arguments are what a public file does not tell, see `CheckpointHints`. They are ignored where
    the file or folder has a config of ours.

    Args:
        path: a folder written by `save_slot_model`, or a public checkpoint file (`.ckpt`, `.pt`,
            `.safetensors`) in the layout that SlotContrast, VideoSAUR and DINOSAUR share.
        backbone: of a slim folder, where its frozen backbone's weights are; by default they are looked for.

    Raises:
        FileNotFoundError: nothing at `path`.
        HintError: a public file needs another `num_heads`, or a `num_slots`.
        BackboneError: a slim folder's backbone is not found, or has other weights.
        ValueError: not a checkpoint, one that holds more than tensors and plain values, or keys that are
            missing, unexpected or of another shape, all of which the message lists; or tensors that are not
            finite.
    """
    path, frozen = Path(path), None
    if path.is_dir():
        for name in MODEL_FILES:
            if not (path / name).is_file():
                raise FileNotFoundError(f"{path} is not a model folder: it has no {name}")
        config, frozen = _parse_config((path / CONFIG_FILE).read_text(), source=str(path / CONFIG_FILE))
        state = _without_training_heads(read_checkpoint_file(path / WEIGHTS_FILE), str(path))
    else:
        content = read_checkpoint_file(path)
        state = content.get("state_dict", content)
        if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
            raise ValueError(f"{path}: has no `state_dict` of tensors")
        state = _without_training_heads(state, str(path))
        if _EMBEDDED_CONFIG in content:
            config, _ = _parse_config(content[_EMBEDDED_CONFIG], source=str(path))
        else:
            config = infer_config(state, CheckpointHints(num_heads, num_slots, mean, std), source=str(path))
            state = _with_resampled_positions(state, config, str(path))
    state = {k: v.float() for k, v in _plain_names(state).items()}
    with WithoutDraws():
        model = SlotModel(config)
    if frozen is not None:
        state |= find_backbone(model.encoder.backbone, frozen, path, backbone)
    check_state_dict(model, state, str(path))
    check_finite(state, str(path))
    model.load_state_dict(state)
    return model.eval()


def _without_training_heads(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors that inference uses; SRL's files have two heads more."""
    heads = [k for k in state if k.startswith(_TRAINING_HEADS)]
    if heads:
        names = sorted({k.partition(".")[0] for k in heads})
        log(f"{source}: ignored {len(heads)} tensors of heads that only training uses ({', '.join(names)})")
    return {k: v for k, v in state.items() if not k.startswith(_TRAINING_HEADS)}


def _parse_config(text: str, *, source: str) -> tuple[SlotModelConfig, FrozenBackbone | None]:
    """The config, and what it says of a backbone that is not in the file."""
    try:
        values = json.loads(text)
        frozen = values.pop(CONFIG_KEY, None)
        return SlotModelConfig.from_dict(values), frozen and FrozenBackbone.from_dict(frozen)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source}: not the config of a slot model ({type(error).__name__}: {error})"
        ) from error


def save_slot_model(
    model: SlotModel,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    slim: BackboneSource | None = None,
) -> None:
    """Writes `model.safetensors` (weights stored as `dtype`) and `config.json` into `folder`.

    Args:
        slim: leave the frozen backbone out, which comes from there and is named by its hash.

    Raises:
        ValueError: weights that are not finite, as `dtype` has them; then nothing is written.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    state = {k: v.detach().to("cpu", dtype).contiguous() for k, v in model.state_dict().items()}
    check_finite(state, f"the model to be saved as {str(dtype).removeprefix('torch.')}")
    config = model.config.to_dict()
    if slim is not None:
        config[CONFIG_KEY] = describe_backbone(model.state_dict(), slim)
        left_out = frozen_part(state)
        state = {key: value for key, value in state.items() if key not in left_out}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def save_public_checkpoint(model: SlotModel, path: str | Path, *, step: int = 0) -> None:
    """Writes one `.ckpt` file in the public layout, which `load_slot_model` reads as well.

    Our config travels along as a JSON string; other readers ignore it.

    Raises:
        ValueError: weights that are not finite; then nothing is written.
    """
    check_finite(model.state_dict(), "the model to be saved")
    image_model = not model.config.predictor
    state = {k if image_model else _video_name(k): v.detach().cpu() for k, v in model.state_dict().items()}
    content = {"state_dict": state, "epoch": 0, "global_step": step}
    torch.save({**content, _EMBEDDED_CONFIG: json.dumps(model.config.to_dict())}, path)


def _plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {re.sub(r"^(encoder|processor|decoder)\.module\.", r"\1.", k): v for k, v in state.items()}


def _video_name(key: str) -> str:
    return re.sub(r"^(encoder|processor|decoder)\.", r"\1.module.", key)


class _Shapes:
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


def infer_config(state: Mapping[str, Tensor], hints: CheckpointHints, *, source: str) -> SlotModelConfig:
    """The architecture that tensors of the public layout belong to, from their names and shapes.

    Raises:
        ValueError: nothing of a slot model there.
        HintError: what shapes don't tell was not given.
    """
    shapes = _Shapes(_plain_names(state), source)
    corrector = "processor.corrector.to_q.weight"
    slot_size = shapes.size(("initializer.slots", 2), ("initializer.mean", 2), (corrector, 0))
    drawn = not shapes.has("initializer.slots") and shapes.has("initializer.")
    if drawn and hints.num_slots is None:
        raise HintError(
            f"num_slots: must be given, as {source} draws its initial slots and works with any number of them "
            "(public VideoSAUR: 11 for MOVi-C, 15 for MOVi-E, 7 for YTVIS; DINOSAUR on COCO: 7)"
        )
    backbone, num_patches = _infer_backbone(shapes, hints.num_heads)
    video = shapes.has("processor.predictor.") or any(".module." in k for k in state)
    return SlotModelConfig(
        backbone=backbone,
        num_slots=(hints.num_slots or 1) if drawn else shapes.size(("initializer.slots", 1), default=1),
        slot_size=slot_size,
        initializer="random" if drawn else "learned",
        corrector_mlp=shapes.has("processor.corrector.mlp."),
        predictor=video,
        mean=tuple(hints.mean),
        std=tuple(hints.std),
        **_infer_decoder(shapes, num_patches),
    )


def _infer_decoder(shapes: _Shapes, num_patches: int) -> dict[str, Any]:
    if shapes.has("decoder.mlp.") or not shapes.has("decoder.allocator."):
        return {"decoder_hidden_sizes": tuple(shapes.linear_sizes("decoder.mlp.layers.")[:-1])}
    features = shapes.size((_BACKBONE + "patch_embed.proj.weight", 0), (_BACKBONE + "pos_embed", 2))
    kinds = {
        features + num_patches: ("features", "similarity"),
        num_patches: ("similarity",),
        features: ("features",),
    }
    transform = "decoder.output_transform."
    size = shapes.size((transform + "weight", 0), (transform + "bias", 0), default=features + num_patches)
    return {
        "decoder": "slot_mixer",
        "decoder_hidden_sizes": tuple(shapes.linear_sizes("decoder.renderer.layers.")) or (1024,),
        "decoder_blocks": shapes.count(r"decoder\.allocator\.blocks\.(\d+)\."),
        # Any other size is named, with what was expected, when the weights are compared.
        "decoder_outputs": kinds.get(size, ("features", "similarity")),
    }


def _infer_backbone(shapes: _Shapes, num_heads: int | None) -> tuple[BackboneConfig, int]:
    """The ViT, and the number of its patches."""
    patch_embedding, positions = _BACKBONE + "patch_embed.proj.weight", _BACKBONE + "pos_embed"
    width = shapes.size((patch_embedding, 0), (positions, 2))
    patch = shapes.size((patch_embedding, 2), default=16)
    if num_heads and width % num_heads:
        raise HintError(f"num_heads: {num_heads} does not divide the width {width} of the checkpoint's ViT")
    if num_heads is None and width % 64:
        raise HintError(
            f"num_heads: must be given, as the ViT's width {width} is not a multiple of 64 and the checkpoint's "
            "shapes don't tell its heads"
        )
    class_token = shapes.has(_BACKBONE + "cls_token")
    registers = shapes.size((_BACKBONE + "reg_token", 1), default=0)
    embedded = shapes.size((positions, 1), default=0)
    num_patches = shapes.size(("decoder.pos_emb", -2), default=max(embedded - class_token - registers, 1))
    class_token = class_token or embedded == num_patches + registers + 1  # where its key is missing
    grid = max(1, round(num_patches**0.5))
    blocks = re.escape(_BACKBONE) + r"blocks\.(\d+)\."
    # Models with registers add position embeddings to the patches alone.
    patches_alone = embedded == num_patches or (
        embedded != num_patches + class_token + registers and math.isqrt(embedded) ** 2 == embedded
    )
    arguments: dict[str, Any] = {
        "patch_size": patch,
        "embed_dim": width,
        "depth": shapes.count(blocks),
        "num_heads": num_heads or width // 64,
        "mlp_ratio": shapes.size((_BACKBONE + "blocks.0.mlp.fc1.weight", 0), default=4 * width) / width,
        "qkv_bias": bool(shapes.count(blocks + r"attn\.qkv\.bias")),
        "init_values": 1.0 if shapes.count(blocks + r"ls\d\.gamma") else None,
        "class_token": class_token,
        "reg_tokens": registers,
        "no_embed_class": patches_alone and class_token,
    }
    return BackboneConfig(name=None, image_size=grid * patch, arguments=arguments), grid**2


def _with_resampled_positions(
    state: Mapping[str, Tensor], config: SlotModelConfig, source: str
) -> dict[str, Tensor]:
    """The tensors with the ViT's position embeddings at the size of the decoder's grid.

    SlotContrast's MOVi models and DINOSAUR's run a ViT of 518 pixels at 336 and 224. Their files have the
    embeddings of 37 x 37 patches, which timm resamples in every pass (`dynamic_img_size`): the same
    function does it once here.
    """
    key = next((k for k in state if re.fullmatch(r"encoder\.(module\.)?backbone\.model\.pos_embed", k)), "")
    arguments = config.backbone.arguments or {}
    prefix = 0 if arguments["no_embed_class"] else arguments["class_token"] + arguments["reg_tokens"]
    stored = state[key].shape[1] - prefix if key and state[key].ndim == 3 else 0
    side, grid = math.isqrt(max(stored, 0)), config.backbone.image_size // arguments["patch_size"]
    if not side or side**2 != stored or side == grid:
        return dict(state)
    import_timm()
    from timm.layers import resample_abs_pos_embed

    log(f"{source}: position embeddings resampled from {side} x {side} to {grid} x {grid} patches")
    resampled = resample_abs_pos_embed(state[key], [grid, grid], [side, side], num_prefix_tokens=prefix)
    return {**state, key: resampled}
