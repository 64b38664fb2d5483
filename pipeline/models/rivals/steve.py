"""STEVE (Singh et al. 2022): slots of CNN features, from which a transformer tells the frame's tokens one by one.

A discrete VAE makes tokens of each frame and learns beside the rest. Slots are drawn for a video's first frame; a
predictor carries them on. Masks are slot attention's.

Shapes: B clips, T frames, N slots, d slot size, D width of features and of the transformer, P positions of the grid,
H x W the input, K = H/4 x W/4 tokens of a frame, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.models.layers import slot_noise
from pipeline.models.pixels import Grid, send
from pipeline.models.rivals.dvae import (
    DVAE,
    TOKEN_SIDE,
    ConvReLU,
    hard_tokens,
    one_hot_codes,
    soft_codes,
)
from pipeline.models.rivals.token_transformers import Predictor, TokenDecoder
from pipeline.models.segmenter import VideoSegmenter
from pipeline.models.slot_model import with_tuples, without_autocast


@dataclass(frozen=True)
class STEVEConfig:
    """What is needed to build a `STEVE` before its weights are loaded; defaults are those for MOVi-E.

    image_size: side of the input. stride: pixels between positions of the grid (1 at 64 x 64). width: D.
    cnn_width: of the CNN's hidden layers. mlp_size: hidden size of slot attention's MLP. num_iterations: of slot
    attention, in every frame. mean, std: pixels in [0, 1].

    Raises:
        ValueError: sizes that don't fit each other.
    """

    num_slots: int = 15
    slot_size: int = 192
    image_size: int = 128
    stride: int = 2
    width: int = 192
    cnn_width: int = 64
    mlp_size: int = 192
    vocabulary: int = 4096
    num_iterations: int = 2
    predictor_blocks: int = 1
    predictor_heads: int = 4
    decoder_blocks: int = 8
    decoder_heads: int = 4
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if self.num_slots < 2:
            raise ValueError(
                f"num_slots: {self.num_slots}, but masks need slots to choose from; nearest valid: 2"
            )
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations: {self.num_iterations}; nearest valid: 1")
        side = TOKEN_SIDE if TOKEN_SIDE % self.stride == 0 else TOKEN_SIDE * self.stride
        for name, value, part, why in (
            ("image_size", self.image_size, side, "that its tokens and positions cover"),
            ("slot_size", self.slot_size, self.predictor_heads, "heads of its predictor"),
            ("width", self.width, self.decoder_heads, "heads of its decoder"),
        ):
            if value % part or not value:
                nearest = max(-(-value // part), 1) * part
                raise ValueError(
                    f"{name}: {value} is no multiple of STEVE's {part} {why}; nearest valid: {nearest}"
                )

    @property
    def grid_side(self) -> int:
        """Positions a row."""
        return self.image_size // self.stride

    @property
    def token_side(self) -> int:
        """Tokens a row."""
        return self.image_size // TOKEN_SIDE

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, and which system they are of."""
        return {"system": "steve", **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> STEVEConfig:
        """The inverse of `to_dict` without `system`, also after a round trip through JSON."""
        return cls(**with_tuples(values))


class TokenDraws(NamedTuple):
    """Draws, exponential of rate 1, `(B * T, V, H/4, W/4)`: for the picture, and for the tokens."""

    soft: Tensor
    hard: Tensor


@dataclass(frozen=True, kw_only=True)
class STEVEOutput:
    """What one forward pass gives; `slots`, `attention` and `masks` as in `SlotModelOutput`.

    masks: slot attention's, the same as `attention`. reconstruction: logits of the tokens `(B, T, K, V)`, each given
    the right ones before it. features: what slot attention sees `(B, T, P, D)`. slots_predicted: what the next frame
    starts from `(B, T, N, d)`. tokens: `(B, T, K)`. dvae_logits: `(B * T, V, H/4, W/4)`. dvae_reconstruction: the
    picture that the dVAE makes of its codes `(B, T, 3, H, W)`, not clamped. There is no frozen backbone, and so none of
    its features.
    """

    slots: Tensor
    attention: Tensor
    masks: Tensor
    reconstruction: Tensor
    features: Tensor
    slots_predicted: Tensor
    tokens: Tensor
    dvae_logits: Tensor
    dvae_reconstruction: Tensor
    backbone_features: None = None
    similarity: None = None


class Places(nn.Module):
    """Adds a projection of (x, y, 1 - x, 1 - y), which are the positions' centres in (0, 1)."""

    pe: Tensor

    def __init__(self, size: int, side: int) -> None:
        super().__init__()
        centres = (torch.arange(side) + 0.5) / side
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        self.register_buffer("pe", torch.stack([x, y, 1 - x, 1 - y])[None])
        self.projection = nn.Conv2d(4, size, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.projection(self.pe)


class SlotAttention(nn.Module):
    """Slot attention within a frame, from drawn slots at first, and the predictor.

    Unlike `layers.SlotAttention` the GRU keeps the slots as they are, not layer-normed; the MLP is left out of the
    last iteration; features have a size of their own.
    """

    def __init__(self, config: STEVEConfig) -> None:
        super().__init__()
        size, width = config.slot_size, config.width
        self.iterations = config.num_iterations
        self.slot_mu = nn.Parameter(torch.empty(1, 1, size))
        self.slot_log_sigma = nn.Parameter(torch.empty(1, 1, size))
        self.norm_inputs, self.norm_slots, self.norm_mlp = (nn.LayerNorm(n) for n in (width, size, size))
        self.project_q = nn.Linear(size, size, bias=False)
        self.project_k, self.project_v = (nn.Linear(width, size, bias=False) for _ in range(2))
        self.gru = nn.GRUCell(size, size)
        self.mlp = nn.Sequential(
            nn.Linear(size, config.mlp_size), nn.ReLU(), nn.Linear(config.mlp_size, size)
        )
        self.predictor = Predictor(size, config.predictor_blocks, config.predictor_heads)

    def forward(self, slots_BND: Tensor, features_BPD: Tensor) -> tuple[Tensor, Tensor]:
        """Slots `(B, N, d)` and the last iteration's softmax over slots `(B, N, P)`."""
        features_BPD = self.norm_inputs(features_BPD)
        keys_BPD = self.project_k(features_BPD) * slots_BND.shape[-1] ** -0.5
        values_BPD = self.project_v(features_BPD)
        attention_BNP = slots_BND
        for iteration in range(self.iterations):
            if iteration:
                slots_BND = slots_BND + self.mlp(self.norm_mlp(slots_BND))
            queries_BND = self.project_q(self.norm_slots(slots_BND))
            attention_BNP = (queries_BND @ keys_BPD.transpose(1, 2)).softmax(1)
            weights_BNP = attention_BNP + 1e-8
            weights_BNP = weights_BNP / weights_BNP.sum(-1, keepdim=True)
            updates_BND = weights_BNP.to(values_BPD.dtype) @ values_BPD
            slots_BND = self.gru(updates_BND.flatten(0, 1), slots_BND.flatten(0, 1)).view_as(slots_BND)
        return slots_BND, attention_BNP


class Encoder(nn.Module):
    """From pixels to features, from these to slots, and from slots to what the token decoder sees of them."""

    def __init__(self, config: STEVEConfig) -> None:
        super().__init__()
        hidden, width = config.cnn_width, config.width
        self.cnn = nn.Sequential(
            ConvReLU(3, hidden, 5, config.stride, 2),
            ConvReLU(hidden, hidden, 5, 1, 2),
            ConvReLU(hidden, hidden, 5, 1, 2),
            nn.Conv2d(hidden, width, 5, 1, 2),
        )
        self.pos = Places(width, config.grid_side)
        self.layer_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.savi = SlotAttention(config)
        self.slot_proj = nn.Linear(config.slot_size, width, bias=False)

    def features(self, frames_MCHW: Tensor) -> Tensor:
        """What slot attention sees of frames, `(M, P, D)`."""
        return self.mlp(self.layer_norm(self.pos(self.cnn(frames_MCHW)).flatten(2).transpose(1, 2)))


class STEVE(VideoSegmenter):
    """The model; its modules have the names of the public files, and all of it trains."""

    config: STEVEConfig
    mask_resizing = "nearest"
    teaches = True

    def __init__(self, config: STEVEConfig) -> None:
        super().__init__()
        self.config = config
        self.dvae = DVAE(config.vocabulary)
        self.steve_encoder = Encoder(config)
        self.steve_decoder = TokenDecoder(
            config.vocabulary, config.token_side**2, config.width, config.decoder_blocks, config.decoder_heads
        )
        _start(self)

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def input_size(self) -> Grid:
        return self.image_size, self.image_size

    @property
    def grid(self) -> Grid:
        return self.config.grid_side, self.config.grid_side

    def slots_from(self, noise_BND: Tensor) -> Tensor:
        """What frame 0 starts from, of standard normal noise `(B, N, d)`."""
        savi = self.steve_encoder.savi
        return savi.slot_mu + savi.slot_log_sigma.exp() * noise_BND

    def initial_slots(self, batch_size: int, noise_seeds: Sequence[int] | None = None) -> Tensor:
        """What frame 0 of B clips starts from, `(B, N, d)`, drawn with a seed for each.

        Raises:
            ValueError: no seeds, or another number of them.
        """
        if noise_seeds is None or len(noise_seeds) != batch_size:
            raise ValueError(
                f"STEVE draws its initial slots: pass initial_slots, or {batch_size} noise_seeds, one a clip, "
                f"not {noise_seeds}"
            )
        sizes = (self.config.num_slots, self.config.slot_size)
        noise = torch.stack([slot_noise(*sizes, seed) for seed in noise_seeds])
        return self.slots_from(send(noise, self.device))

    def features(self, video_BTCHW: Tensor) -> Tensor:
        """What slot attention sees of a video in [0, 1], `(B, T, P, D)`.

        Raises:
            ValueError: a video of another size.
        """
        expected = (3, *self.input_size)
        if video_BTCHW.ndim != 5 or tuple(video_BTCHW.shape[2:]) != expected:
            raise ValueError(f"video has shape {tuple(video_BTCHW.shape)}, expected (B, T, {expected})")
        return self.steve_encoder.features(video_BTCHW.flatten(0, 1)).unflatten(0, video_BTCHW.shape[:2])

    def roll_out(self, features_BTPD: Tensor, initial_slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slots `(B, T, N, d)`, attention `(B, T, N, P)`, and what each next frame starts from `(B, T, N, d)`."""
        savi, state_BND, frames = self.steve_encoder.savi, initial_slots, []
        with without_autocast(features_BTPD.device.type):
            for features_BPD in features_BTPD.to(state_BND.dtype).unbind(1):
                slots_BND, attention_BNP = savi(state_BND, features_BPD)
                state_BND = savi.predictor(slots_BND)
                frames.append((slots_BND, attention_BNP, state_BND))
        slots, attention, predicted = (torch.stack(part, 1) for part in zip(*frames, strict=True))
        return slots, attention, predicted

    def forward(
        self,
        video: Tensor,
        *,
        initial_slots: Tensor | None = None,
        noise_seeds: Sequence[int] | None = None,
        draws: TokenDraws | None = None,
        temperature: float = 1.0,
    ) -> STEVEOutput:
        """All that a training step needs of a video `(B, T, 3, H, W)` in [0, 1].

        initial_slots: `(B, N, d)`, or the noise_seeds they are drawn with. draws: of the tokens; None takes the most
        likely ones, for the dVAE's picture as well. temperature: of the picture's soft codes where they are drawn.

        Raises:
            ValueError: a video of another size, or nothing to draw the initial slots with.
        """
        features = self.features(video)
        if initial_slots is None:
            initial_slots = self.initial_slots(len(video), noise_seeds)
        slots, attention, predicted = self.roll_out(features, initial_slots)
        shape = video.shape[:2]
        logits = self.dvae.encoder(video.flatten(0, 1)).float()  # also under autocast: draws are made of them
        tokens = hard_tokens(logits, None if draws is None else draws.hard)
        if draws is None:
            codes = one_hot_codes(tokens, self.config.vocabulary, self.config.token_side)
        else:
            codes = soft_codes(logits, draws.soft, temperature)
        token_logits = self.steve_decoder(tokens, self.steve_encoder.slot_proj(slots.flatten(0, 1)))
        return STEVEOutput(
            slots=slots,
            attention=attention,
            masks=attention,
            reconstruction=token_logits.unflatten(0, shape),
            features=features,
            slots_predicted=predicted,
            tokens=tokens.unflatten(0, shape),
            dvae_logits=logits,
            dvae_reconstruction=self.dvae.decoder(codes).unflatten(0, shape),
        )

    @torch.no_grad()
    def target_slots(self, video_BTCHW: Tensor, noise_seeds: Sequence[int]) -> Tensor:
        """The corrected ones, from draws of these seeds."""
        initial_slots = self.initial_slots(len(video_BTCHW), noise_seeds)
        return self.roll_out(self.features(video_BTCHW), initial_slots)[0]

    @torch.no_grad()
    def generate(self, slots_BTND: Tensor) -> Tensor:
        """The pictures `(B, T, 3, H, W)` in [0, 1] that slots stand for, token by token: slow."""
        tokens = self.steve_decoder.generate(self.steve_encoder.slot_proj(slots_BTND.flatten(0, 1)))
        codes = one_hot_codes(tokens, self.config.vocabulary, self.config.token_side)
        return self.dvae.decoder(codes).clamp(0, 1).unflatten(0, slots_BTND.shape[:2])

    # --- videos of any length -----------------------------------------------------------------

    @torch.no_grad()
    def stream(
        self,
        chunks: Iterable[np.ndarray],
        *,
        noise_seed: int = 0,
        rollout: str = "forward",
        masks: str = "decoder",
    ) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """As `VideoSegmenter.stream`; whichever `masks` are asked for, they are slot attention's, the only ones.

        Raises:
            ValueError: another roll-out than "forward".
        """
        if rollout != "forward":
            raise ValueError(f"rollout: {rollout!r}, but STEVE never goes back; nearest valid: 'forward'")
        state = self.initial_slots(1, [noise_seed])
        for frames in chunks:
            slots, attention, predicted = self.roll_out(self.features(self.prepare([frames])), state)
            state = predicted[:, -1]
            yield frames, slots[0], attention[0]


@torch.no_grad()
def _start(model: STEVE) -> None:
    """Random weights as published: what is added to a transformer's stream starts small, so that blocks can be many."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.GRUCell):
            nn.init.xavier_uniform_(module.weight_ih)
            nn.init.orthogonal_(module.weight_hh)
            nn.init.zeros_(module.bias_ih)
            nn.init.zeros_(module.bias_hh)
    before_relu: list[Any] = [module.m for module in model.modules() if isinstance(module, ConvReLU)]
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            before_relu += [one for one, other in pairwise(module) if isinstance(other, nn.ReLU)]
    for layer in before_relu:
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    savi = model.steve_encoder.savi
    nn.init.xavier_uniform_(savi.slot_mu)
    nn.init.xavier_uniform_(savi.slot_log_sigma)
    for blocks in (savi.predictor.blocks, model.steve_decoder.tf.blocks):
        added = [layer for block in blocks for layer in block.last_layers()]
        for layer in added:
            layer.weight.mul_(len(added) ** -0.5)
