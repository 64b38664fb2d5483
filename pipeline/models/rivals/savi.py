"""SAVi (Kipf et al. 2022): slots of CNN features, corrected in every frame and predicted for the next.

The slots of a video's first frame are made of boxes of its objects, learned, or drawn; a spatial-broadcast decoder
gives optical flow (as published) or the frame itself. What its authors' JAX model computes.

Shapes: B clips, T frames, N slots, d slot size, P positions of the encoder's grid, C channels there, H x W the input,
K boxes; M of whatever is computed at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.layers import slot_noise
from pipeline.models.pixels import send
from pipeline.models.rivals.pixel_slots import (
    PixelSlotOutput,
    PixelSlots,
    broadcast,
    check_slots,
    encoder_grid,
    mixed,
    upsamplings,
)
from pipeline.models.rivals.savi_layers import (
    Attention,
    GRUCell,
    Positions,
    ResNet,
    SameConv,
    Upsampling,
    convolutions,
    layer_norm,
    two_layers,
)
from pipeline.models.rivals.savi_losses import flow_as_rgb, picture_loss
from pipeline.models.slot_model import with_tuples, without_autocast

KERNEL = 5  # side of all kernels but the ResNet's
# Numbers that a first slot is made of, by what tells it; the others are made of nothing, or learned.
CUES = {"boxes": 4, "centres": 2}
INITIALIZERS = (*CUES, "learned", "drawn")
TARGETS = ("rgb", "flow")


@dataclass(frozen=True)
class SAViConfig:
    """What is needed to build a `SAVi` before its weights are loaded; defaults are SAVi-S's, without boxes.

    image_size: side of the input, pixels. initializer: what the first frame's slots are: "boxes" or "centres" of
    objects, behind one slot for the background, "learned", or "drawn". target: what is reconstructed, the frames
    ("rgb") or "flow". encoder_channels: of each layer of the CNN, whose first has the `stride`; where there are
    encoder_blocks, of each stage of a ResNet that has so many of them (SAVi-L: 64, 128, 256, 512 and 3, 4, 6, 3), and
    whose later stages halve the grid. encoder_hidden, initializer_hidden, predictor_hidden: of MLPs.
    mlp_size: hidden size of slot attention's, None: it has none. decoder_grid: side of the grid that slots are
    broadcast to. decoder_channels: of each of its layers.

    Raises:
        ValueError: sizes that don't fit each other, or another initializer or target.
    """

    image_size: int = 64
    num_slots: int = 24
    slot_size: int = 128
    initializer: str = "learned"
    target: str = "rgb"
    encoder_channels: tuple[int, ...] = (32,) * 4
    encoder_blocks: tuple[int, ...] = ()
    stride: int = 1
    encoder_hidden: int = 64
    initializer_hidden: int = 256
    num_iterations: int = 1
    mlp_size: int | None = None
    predictor_heads: int = 4
    predictor_hidden: int = 256
    decoder_grid: int = 8
    decoder_channels: tuple[int, ...] = (64,) * 4
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        check_slots(self.num_slots, self.predictor_heads, self.slot_size)
        for name, value, valid in (
            ("initializer", self.initializer, INITIALIZERS),
            ("target", self.target, TARGETS),
        ):
            if value not in valid:
                raise ValueError(f"{name}: {value!r}; nearest valid: {', '.join(valid)}")
        encoder_grid(self.image_size, self.encoder_stride)
        upsamplings(self.image_size, self.decoder_grid, len(self.decoder_channels))

    @property
    def encoder_stride(self) -> int:
        """Pixels from one position of the encoder's grid to the next."""
        return 2 ** (len(self.encoder_blocks) - 1) if self.encoder_blocks else self.stride

    @property
    def conditional(self) -> bool:
        """Whether the first slots are made of what is given with a video."""
        return self.initializer in CUES

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, and which system they are of."""
        return {"system": "savi", **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SAViConfig:
        """The inverse of `to_dict` without `system`, also after a round trip through JSON."""
        return cls(**with_tuples(values))


class Encoder(nn.Module):
    """Frames `(M, 3, H, W)` to slot attention's inputs `(M, P, C)`."""

    def __init__(self, config: SAViConfig) -> None:
        super().__init__()
        channels = config.encoder_channels
        if config.encoder_blocks:
            self.resnet = ResNet(channels, config.encoder_blocks)
        else:
            strides = (config.stride, *[1] * (len(channels) - 1))
            layers = zip((3, *channels), channels, strides, strict=False)
            self.cnn = convolutions([SameConv(before, own, KERNEL, stride) for before, own, stride in layers])
        self.position = Positions(config.image_size // config.encoder_stride, channels[-1])
        self.mlp = two_layers(channels[-1], config.encoder_hidden, channels[-1], norm=True)

    def forward(self, frames_MCHW: Tensor) -> Tensor:
        maps = (self.resnet if hasattr(self, "resnet") else self.cnn)(frames_MCHW)
        return self.mlp(maps.permute(0, 2, 3, 1) + self.position()).flatten(1, 2)


class Initializer(nn.Module):
    """What the first slots are made of: a table, an MLP of boxes or centres, or nothing where they are drawn."""

    def __init__(self, config: SAViConfig) -> None:
        super().__init__()
        size = config.slot_size
        if config.conditional:
            self.mlp = two_layers(CUES[config.initializer], config.initializer_hidden, size)
        elif config.initializer == "learned":
            self.state_init = nn.Parameter(torch.randn(config.num_slots, size) * size**-0.5)


class SlotAttention(nn.Module):
    """The corrector: the GRU's hidden state is the slots as they are, and nothing is added to the attention."""

    def __init__(self, config: SAViConfig) -> None:
        super().__init__()
        inputs, size = config.encoder_channels[-1], config.slot_size
        self.norm_slots, self.norm_inputs = layer_norm(size), layer_norm(inputs)
        self.q = nn.Linear(size, size, bias=False)
        self.k, self.v = (nn.Linear(inputs, size, bias=False) for _ in range(2))
        self.gru = GRUCell(size)
        self.mlp = two_layers(size, config.mlp_size, size, norm=True) if config.mlp_size else None

    def keys_and_values(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Of features `(…, P, C)`, both `(…, P, d)`; the keys have the logits' scale."""
        inputs = self.norm_inputs(features)
        return self.k(inputs) * self.q.in_features**-0.5, self.v(inputs)

    def forward(self, slots_BND: Tensor, keys_BPD: Tensor, values_BPD: Tensor) -> tuple[Tensor, Tensor]:
        """Slots after one iteration, and its softmax over slots `(B, N, P)`."""
        logits_BNP = self.q(self.norm_slots(slots_BND)) @ keys_BPD.transpose(1, 2)
        attention_BNP = logits_BNP.softmax(1)
        weights_BNP = attention_BNP / (attention_BNP.sum(-1, keepdim=True) + 1e-8)
        slots_BND = self.gru(weights_BNP @ values_BPD, slots_BND)
        return slots_BND if self.mlp is None else slots_BND + self.mlp(slots_BND), attention_BNP


class Predictor(nn.Module):
    """A post-norm transformer block over the slots: what the next frame starts from."""

    def __init__(self, config: SAViConfig) -> None:
        super().__init__()
        size = config.slot_size
        self.attention = Attention(size, config.predictor_heads)
        self.norm_attention, self.norm_mlp = layer_norm(size), layer_norm(size)
        self.mlp = two_layers(size, config.predictor_hidden, size)

    def forward(self, slots_BND: Tensor) -> Tensor:
        slots_BND = self.norm_attention(slots_BND + self.attention(slots_BND))
        return self.norm_mlp(slots_BND + self.mlp(slots_BND))


class Decoder(nn.Module):
    """Slots `(M, N, d)` to pictures `(M, 3, H, W)` and masks `(M, N, H, W)`."""

    def __init__(self, config: SAViConfig) -> None:
        super().__init__()
        size, channels = config.slot_size, config.decoder_channels
        doubling = upsamplings(config.image_size, config.decoder_grid, len(channels))
        self.position = Positions(config.decoder_grid, size)
        self.cnn = convolutions(
            [
                (Upsampling if index < doubling else SameConv)(before, own, KERNEL)
                for index, (before, own) in enumerate(zip((size, *channels), channels, strict=False))
            ]
        )
        self.alpha_logits = nn.Linear(channels[-1], 1)
        self.readout = nn.Linear(channels[-1], 3)

    def forward(self, slots_MND: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.cnn(broadcast(slots_MND.flatten(0, 1), self.position()))
        read = [
            F.conv2d(maps, layer.weight[..., None, None], layer.bias).unflatten(0, slots_MND.shape[:2])
            for layer in (self.readout, self.alpha_logits)
        ]
        return mixed(read[0], read[1].squeeze(2))


class SAVi(PixelSlots):
    """The model; everything trains. Of its outputs, `slots_predicted` are what the frame after each starts from."""

    config: SAViConfig

    def __init__(self, config: SAViConfig) -> None:
        super().__init__()
        self.config = config
        self.teaches = not config.conditional  # students' slots start from nothing that a video comes with
        self.start_boxes = config.num_slots - 1 if config.initializer == "boxes" else 0
        self.encoder = Encoder(config)
        self.initializer = Initializer(config)
        self.corrector = SlotAttention(config)
        self.predictor = Predictor(config)
        self.decoder = Decoder(config)

    def encode(self, frames_MCHW: Tensor) -> Tensor:
        return self.encoder(frames_MCHW)

    def decode_slots(self, slots_MND: Tensor) -> tuple[Tensor, Tensor]:
        return self.decoder(slots_MND)

    def initial_slots(
        self,
        batch_size: int,
        noise_seeds: Sequence[int] | None = None,
        boxes: Tensor | None = None,
    ) -> Tensor:
        """Slots `(B, N, d)` that frame 0 starts from.

        noise_seeds: one a clip, where slots are drawn. boxes: `(B, K, 4)` of frame 0, (y0, x0, y1, x1) in [0, 1], or
        centres (y, x); zeros are none; or `(B, T, K, 4)`, of which frame 0's are taken. Others look at neither.

        Raises:
            ValueError: what the slots are made of is missing.
        """
        sizes = (self.config.num_slots, self.config.slot_size)
        if self.config.initializer == "learned":
            return self.initializer.state_init.expand(batch_size, *sizes)
        if self.config.initializer == "drawn":
            if noise_seeds is None:
                raise ValueError("this SAVi draws its first slots: pass noise_seeds or initial_slots")
            return send(torch.stack([slot_noise(*sizes, seed) for seed in noise_seeds]), self.device)
        if boxes is None:
            raise ValueError(
                f"boxes: missing, but this SAVi is conditional on {self.config.initializer} of the objects in a "
                "video's first frame; nearest valid: pass boxes, or use a SAVi with learned or drawn slots"
            )
        boxes = boxes[:, 0] if boxes.ndim == 4 else boxes
        return self.initializer.mlp(F.pad(boxes, (0, 0, 1, 0)))  # a box of zeros for the background

    def roll_out(self, features_BTPC: Tensor, state_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slots `(B, T, N, d)`, attention `(B, T, N, P)` and predicted slots `(B, T, N, d)`, from the first slots."""
        slots, attention, predicted = [], [], []
        with without_autocast(features_BTPC.device.type):
            keys, values = self.corrector.keys_and_values(features_BTPC.to(state_BND.dtype))
            for t in range(features_BTPC.shape[1]):
                for _ in range(self.config.num_iterations):
                    state_BND, attention_BNP = self.corrector(state_BND, keys[:, t], values[:, t])
                slots.append(state_BND)
                attention.append(attention_BNP)
                state_BND = self.predictor(state_BND)
                predicted.append(state_BND)
        return torch.stack(slots, 1), torch.stack(attention, 1), torch.stack(predicted, 1)

    def forward(
        self,
        video: Tensor,
        *,
        boxes: Tensor | None = None,
        noise_seeds: Sequence[int] | None = None,
        initial_slots: Tensor | None = None,
    ) -> PixelSlotOutput:
        """Runs a normalised video `(B, T, 3, H, W)`; the others as `initial_slots` has them.

        Raises:
            ValueError: a video of another size, or what the first slots are made of is missing.
        """
        features = self.features(video)
        if initial_slots is None:
            initial_slots = self.initial_slots(len(video), noise_seeds, boxes)
        slots, attention, predicted = self.roll_out(features, initial_slots)
        pictures, masks = self.decode(slots)
        return PixelSlotOutput(slots, attention, masks, pictures, features, predicted)

    def losses(
        self,
        video: Tensor,
        *,
        flow: Tensor | None = None,
        boxes: Tensor | None = None,
        noise_seeds: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """A training step's losses by name: their sum is minimised.

        flow: `(B, T, 2, H, W)`, (x, y) in pixels of the input, where it is reconstructed; the others as in `forward`.

        Raises:
            ValueError: flow is missing; and as `forward`.
        """
        if self.config.target == "flow" and flow is None:
            raise ValueError(
                "flow: missing, but this SAVi reconstructs it; nearest valid: clips with flow, or target: rgb"
            )
        target = flow_as_rgb(flow) if self.config.target == "flow" and flow is not None else video
        output = self(video, boxes=boxes, noise_seeds=noise_seeds)
        return {"reconstruction": picture_loss(output.reconstruction, target)}

    @torch.no_grad()
    def target_slots(self, video_BTCHW: Tensor, noise_seeds: Sequence[int]) -> Tensor:
        """The corrected ones.

        Raises:
            ValueError: a video of another size, or this SAVi is conditional.
        """
        initial_slots = self.initial_slots(len(video_BTCHW), noise_seeds)
        return self.roll_out(self.features(video_BTCHW), initial_slots)[0]

    def begin(self, noise_seed: int, boxes: Tensor | None) -> Tensor:
        return self.initial_slots(1, [noise_seed], None if boxes is None else boxes[None])

    def advance(self, features_BTPC: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        slots, _, predicted = self.roll_out(features_BTPC, state)
        return slots, predicted[:, -1]
