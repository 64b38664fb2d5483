"""SlotFormer's SAVi ("StoSAVi", Wu et al. 2023): learned first slots, noise on slots where it is stochastic.

Like `savi`, with PyTorch's padding; each frame's slots go through a kernel layer before slot attention, and the
predictor works at the start of a frame, on the last one's. Module names are those of the public files.

Shapes: B clips, T frames, N slots, d slot size, P positions of the encoder's grid, C channels there, H x W the input;
M of whatever is computed at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.pixels import send
from pipeline.models.rivals.pixel_slots import (
    PixelSlotOutput,
    PixelSlots,
    broadcast,
    check_slots,
    coordinates,
    encoder_grid,
    mixed,
    upsamplings,
)
from pipeline.models.rivals.savi_losses import noise_prior_loss
from pipeline.models.slot_model import with_tuples

KERNEL = 5  # side of the convolutions' kernels
DROPOUT = 0.1
PRIOR_WEIGHT = 1e-4
KERNEL_LAYERS = ("linear", "mlp", None)
PREDICTORS = ("transformer", "mlp")


@dataclass(frozen=True)
class StoSAViConfig:
    """What is needed to build a `StoSAVi` before its weights are loaded.

    image_size: side of the input, pixels. stride: of the encoder's first layer. mlp_size: hidden size of slot
    attention's MLP, and of the LSTM. kernel: the layer before slot attention, "linear", "mlp" or None (as in
    SlotDiffusion). stochastic: whether noise is added there. predictor: "transformer" of `predictor_layers`, with an
    LSTM behind it where `rnn`, or "mlp"; predictor_hidden: its width. decoder_grid: side of the grid that slots are
    broadcast to. decoder_channels: of each of its layers.

    Raises:
        ValueError: sizes that don't fit each other, another kernel or predictor, noise without a kernel layer.
    """

    image_size: int = 64
    num_slots: int = 7
    slot_size: int = 128
    encoder_channels: tuple[int, ...] = (64,) * 4
    stride: int = 1
    num_iterations: int = 2
    mlp_size: int = 256
    kernel: str | None = "mlp"
    stochastic: bool = False
    predictor: str = "transformer"
    predictor_layers: int = 2
    predictor_heads: int = 4
    predictor_hidden: int = 512
    rnn: bool = True
    decoder_grid: int = 8
    decoder_channels: tuple[int, ...] = (64,) * 4
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        heads = self.predictor_heads if self.predictor == "transformer" else 1
        check_slots(self.num_slots, heads, self.slot_size)
        for name, value, valid in (
            ("kernel", self.kernel, KERNEL_LAYERS),
            ("predictor", self.predictor, PREDICTORS),
        ):
            if value not in valid:
                raise ValueError(f"{name}: {value!r}; nearest valid: {', '.join(map(str, valid))}")
        if self.stochastic and self.kernel is None:
            raise ValueError("stochastic: the noise is the kernel layer's; nearest valid: kernel: linear")
        encoder_grid(self.image_size, self.stride)
        upsamplings(self.image_size, self.decoder_grid, len(self.decoder_channels))

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, and which system they are of."""
        return {"system": "stosavi", **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StoSAViConfig:
        """The inverse of `to_dict` without `system`, also after a round trip through JSON."""
        return cls(**with_tuples(values))


@dataclass(frozen=True, kw_only=True)
class StoSAViOutput(PixelSlotOutput):
    """As `PixelSlotOutput`; slots_predicted are those that frames 1 … start from, `(B, T - 1, N, d)`.

    kernel_distribution: `(B, T, N, 2d)`, means and log-variances before slot attention; None without a kernel layer.
    """

    kernel_distribution: Tensor | None


class State(NamedTuple):
    """Between two frames: the last one's slots `(B, N, d)` (None before the first), and the LSTM's state."""

    slots: Tensor | None = None
    memory: tuple[Tensor, Tensor] | None = None
    draws: torch.Generator | None = None  # of one video that is streamed


class Positions(nn.Module):
    """What is added at each position of a grid, `(h, w, C)`: a linear map of y, x, 1 - y and 1 - x."""

    grid: Tensor

    def __init__(self, side: int, size: int) -> None:
        super().__init__()
        places = coordinates(side, 0)
        self.register_buffer("grid", torch.cat([places, 1 - places], -1))
        self.dense = nn.Linear(4, size)

    def forward(self) -> Tensor:
        return self.dense(self.grid[0])


class SlotAttention(nn.Module):
    """With the slots as they are for the GRU's hidden state, and an MLP in every iteration."""

    def __init__(self, size: int, mlp_size: int) -> None:
        super().__init__()
        self.norm_inputs = nn.LayerNorm(size)
        self.project_q = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, size, bias=False))
        self.project_k, self.project_v = (nn.Linear(size, size, bias=False) for _ in range(2))
        self.gru = nn.GRUCell(size, size)
        self.mlp = nn.Sequential(
            nn.LayerNorm(size), nn.Linear(size, mlp_size), nn.ReLU(), nn.Linear(mlp_size, size)
        )

    def keys_and_values(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Of features `(…, P, d)`; the keys have the logits' scale."""
        inputs = self.norm_inputs(features)
        return self.project_k(inputs) * inputs.shape[-1] ** -0.5, self.project_v(inputs)

    def forward(self, slots_BND: Tensor, keys_BPD: Tensor, values_BPD: Tensor) -> tuple[Tensor, Tensor]:
        """Slots after one iteration, and its softmax over slots `(B, N, P)`."""
        attention_BNP = (self.project_q(slots_BND) @ keys_BPD.transpose(1, 2)).softmax(1)
        weights_BNP = attention_BNP + 1e-6
        weights_BNP = weights_BNP / weights_BNP.sum(-1, keepdim=True)
        updates_BND = weights_BNP @ values_BPD
        slots_BND = self.gru(updates_BND.flatten(0, 1), slots_BND.flatten(0, 1)).view_as(slots_BND)
        return slots_BND + self.mlp(slots_BND), attention_BNP


class SlotTransformer(nn.Module):
    """Pre-norm transformer layers over the slots."""

    def __init__(self, config: StoSAViConfig) -> None:
        super().__init__()
        size, heads, hidden = config.slot_size, config.predictor_heads, config.predictor_hidden
        layer = nn.TransformerEncoderLayer(size, heads, hidden, DROPOUT, norm_first=True, batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(
            layer, config.predictor_layers, enable_nested_tensor=False
        )

    def forward(self, slots_BND: Tensor, memory: None) -> tuple[Tensor, None]:
        return self.transformer_encoder(slots_BND), None


class RecurrentTransformer(nn.Module):
    """The same, and behind it an LSTM over time, of each slot."""

    def __init__(self, config: StoSAViConfig) -> None:
        super().__init__()
        self.base_predictor = SlotTransformer(config)
        self.rnn = nn.LSTM(config.slot_size, config.mlp_size)
        self.out_projector = nn.Linear(config.mlp_size, config.slot_size)

    def forward(
        self, slots_BND: Tensor, memory: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        slots_BND, _ = self.base_predictor(slots_BND, None)
        hidden, memory = self.rnn(slots_BND.flatten(0, 1)[None], memory)
        return self.out_projector(hidden[0]).view_as(slots_BND), memory


class ResidualMLP(nn.Module):
    """x + MLP of x, where x is layer-normed before both."""

    def __init__(self, config: StoSAViConfig) -> None:
        super().__init__()
        size, hidden = config.slot_size, config.predictor_hidden
        self.ln = nn.LayerNorm(size)
        self.mlp = nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, size))

    def forward(self, slots_BND: Tensor, memory: None) -> tuple[Tensor, None]:
        slots_BND = self.ln(slots_BND)
        return slots_BND + self.mlp(slots_BND), None


def kernel_layer(kind: str, size: int, out: int) -> nn.Sequential:
    if kind == "linear":
        return nn.Sequential(nn.Linear(size, out))
    return nn.Sequential(nn.Linear(size, out), nn.LayerNorm(out), nn.ReLU(), nn.Linear(out, out))


def clip_noise(draws: torch.Generator, frames: int, num_slots: int, slot_size: int) -> Tensor:
    """Standard normal noise `(T, N, d)` of a clip's next frames, whose draws don't depend on how many these are."""
    return torch.stack([torch.randn((num_slots, slot_size), generator=draws) for _ in range(frames)])


class StoSAVi(PixelSlots):
    """The model; everything trains but a layer that is not used."""

    config: StoSAViConfig
    teaches = True

    def __init__(self, config: StoSAViConfig) -> None:
        super().__init__()
        self.config = config
        size = config.slot_size
        self.init_latents = nn.Parameter(torch.randn(1, config.num_slots, size) * size**-0.5)
        if config.kernel is not None:
            self.kernel_dist_layer = kernel_layer(config.kernel, size, 2 * size)
            # Never used, but in the public files.
            self.prior_slot_layer = kernel_layer("mlp", size, size).requires_grad_(False)
        self.slot_attention = SlotAttention(size, config.mlp_size)
        self._add_encoder(config)
        self._add_decoder(config)
        recurrent = RecurrentTransformer if config.rnn else SlotTransformer
        self.predictor = ResidualMLP(config) if config.predictor == "mlp" else recurrent(config)

    def _add_encoder(self, config: StoSAViConfig) -> None:
        channels, size = config.encoder_channels, config.slot_size
        self.encoder = nn.Sequential()
        for index, (before, own) in enumerate(zip((3, *channels), channels, strict=False)):
            stride = config.stride if index == 0 else 1
            layer = nn.Conv2d(before, own, KERNEL, stride, padding=KERNEL // 2)
            last = index == len(channels) - 1
            self.encoder.append(nn.Sequential(layer) if last else nn.Sequential(layer, nn.ReLU()))
        self.encoder_pos_embedding = Positions(encoder_grid(config.image_size, config.stride), channels[-1])
        self.encoder_out_layer = nn.Sequential(
            nn.LayerNorm(channels[-1]), nn.Linear(channels[-1], size), nn.ReLU(), nn.Linear(size, size)
        )

    def _add_decoder(self, config: StoSAViConfig) -> None:
        channels, size = config.decoder_channels, config.slot_size
        doubling = upsamplings(config.image_size, config.decoder_grid, len(channels))
        self.decoder_pos_embedding = Positions(config.decoder_grid, size)
        self.decoder = nn.Sequential()
        for index, (before, own) in enumerate(zip((size, *channels), channels, strict=False)):
            stride = 2 if index < doubling else 1
            layer = nn.ConvTranspose2d(before, own, KERNEL, stride, KERNEL // 2, output_padding=stride - 1)
            self.decoder.append(nn.Sequential(layer, nn.ReLU()))
        self.decoder.append(nn.Conv2d(channels[-1], 4, 1))

    def encode(self, frames_MCHW: Tensor) -> Tensor:
        maps = self.encoder(frames_MCHW).permute(0, 2, 3, 1) + self.encoder_pos_embedding()
        return self.encoder_out_layer(maps.flatten(1, 2))

    def decode_slots(self, slots_MND: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.decoder(broadcast(slots_MND.flatten(0, 1), self.decoder_pos_embedding()))
        maps = maps.unflatten(0, slots_MND.shape[:2])
        return mixed(maps[:, :, :3], maps[:, :, 3])

    def noise(self, draws: Sequence[torch.Generator], frames: int) -> Tensor | None:
        """Of the next frames of clips, `(B, T, N, d)`; None where the model is not stochastic."""
        if not self.config.stochastic:
            return None
        sizes = (self.config.num_slots, self.config.slot_size)
        return send(torch.stack([clip_noise(own, frames, *sizes) for own in draws]), self.device)

    def roll_out(
        self, features_BTPD: Tensor, state: State, noise_BTND: Tensor | None
    ) -> tuple[dict[str, list[Tensor]], State]:
        """Slots, attention, predicted slots and kernel distributions of frames in turn, and the state after them."""
        found: dict[str, list[Tensor]] = {"slots": [], "attention": [], "predicted": [], "distribution": []}
        keys, values = self.slot_attention.keys_and_values(features_BTPD)
        slots, memory = state.slots, state.memory
        for t in range(features_BTPD.shape[1]):
            if slots is None:
                slots = self.init_latents.expand(len(features_BTPD), -1, -1)
            else:
                slots, memory = self.predictor(slots, memory)
                found["predicted"].append(slots)
            if self.config.kernel is not None:
                found["distribution"].append(self.kernel_dist_layer(slots))
                slots, log_variance = found["distribution"][-1].chunk(2, -1)
                if noise_BTND is not None:
                    slots = slots + (log_variance / 2).exp() * noise_BTND[:, t]
            attention = slots
            for _ in range(self.config.num_iterations):
                slots, attention = self.slot_attention(slots, keys[:, t], values[:, t])
            found["slots"].append(slots)
            found["attention"].append(attention)
        return found, State(slots, memory, state.draws)

    def forward(
        self, video: Tensor, *, noise: Tensor | None = None, noise_seeds: Sequence[int] | None = None
    ) -> StoSAViOutput:
        """Runs a normalised video `(B, T, 3, H, W)`.

        noise: `(B, T, N, d)`, standard normal, of a stochastic model; or noise_seeds, one a clip, that it follows from.

        Raises:
            ValueError: a video of another size, noise missing, or noise for a model that is not stochastic.
        """
        if noise is not None and not self.config.stochastic:
            raise ValueError(
                "noise: given, but this model is not stochastic; the hint stochastic says that it is"
            )
        features = self.features(video)
        if self.config.stochastic and noise is None:
            if noise_seeds is None:
                raise ValueError("this StoSAVi is stochastic: pass noise_seeds or noise")
            noise = self.noise([torch.Generator().manual_seed(seed) for seed in noise_seeds], video.shape[1])
        found, _ = self.roll_out(features, State(), noise)
        slots, attention = (torch.stack(found[name], 1) for name in ("slots", "attention"))
        predicted, distribution = (
            torch.stack(found[name], 1) if found[name] else None for name in ("predicted", "distribution")
        )
        pictures, masks = self.decode(slots)
        return StoSAViOutput(
            slots=slots,
            attention=attention,
            masks=masks,
            reconstruction=pictures,
            features=features,
            slots_predicted=slots[:, :0] if predicted is None else predicted,
            kernel_distribution=distribution,
        )

    def losses(
        self, video: Tensor, *, noise: Tensor | None = None, noise_seeds: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """A training step's losses by name: their sum is minimised. Arguments and errors as in `forward`."""
        output = self(video, noise=noise, noise_seeds=noise_seeds)
        losses = {"reconstruction": F.mse_loss(output.reconstruction, video)}
        if self.config.stochastic and output.kernel_distribution is not None:
            losses["noise_prior"] = PRIOR_WEIGHT * noise_prior_loss(output.kernel_distribution)
        return losses

    @torch.no_grad()
    def target_slots(self, video_BTCHW: Tensor, noise_seeds: Sequence[int]) -> Tensor:
        """Those after slot attention; noise is drawn where the model is stochastic.

        Raises:
            ValueError: a video of another size.
        """
        draws = [torch.Generator().manual_seed(seed) for seed in noise_seeds]
        noise = self.noise(draws, video_BTCHW.shape[1])
        return torch.stack(self.roll_out(self.features(video_BTCHW), State(), noise)[0]["slots"], 1)

    def begin(self, noise_seed: int, boxes: Tensor | None) -> State:
        return State(draws=torch.Generator().manual_seed(noise_seed))

    def advance(self, features_BTPC: Tensor, state: State) -> tuple[Tensor, State]:
        assert state.draws is not None
        noise = self.noise([state.draws], features_BTPC.shape[1])
        found, state = self.roll_out(features_BTPC, state, noise)
        return torch.stack(found["slots"], 1), state
