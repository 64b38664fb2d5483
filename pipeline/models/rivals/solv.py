"""SOLV (Aydemir et al. 2023): each frame is segmented from the slots of a window of frames around it.

A frame's slots start anew from what was learned, each with a place and a size of its own (invariant slot attention,
Biza et al. 2023); a transformer over the window, slot by slot, makes the middle frame's; similar ones are merged; an
MLP decodes frozen ViT features. Slots of different frames are linked afterwards.

Shapes: B videos, T frames, W frames of a window, S slots, d slot size, P patches, K tokens that slot attention sees
(all P, or fewer in training), F backbone feature size; M of whatever is computed at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.backbone import Backbone, BackboneConfig
from pipeline.models.pixels import IMAGENET_MEAN, IMAGENET_STD, Grid
from pipeline.models.rivals.merging import Tracks, clusters, in_tracks, linked, merged
from pipeline.models.rivals.windows import Bound, check_length, delayed, windows
from pipeline.models.segmenter import VideoSegmenter
from pipeline.models.slot_model import SlotModelOutput, with_tuples

ITERATIONS = 3
PLACE_SCALE = 5.0  # a slot's grid is in units of so many of its standard deviations
TEMPORAL_LAYERS, HEADS = 3, 8
DROPOUT = 0.1


@dataclass(frozen=True)
class SOLVConfig:
    """What is needed to build a `SOLV` before its weights are loaded.

    half_window: frames on either side of the one that is segmented. decoder_size: width of the decoder's hidden
    layers. merge_distance: slots are merged below this cosine distance.

    Raises:
        ValueError: fewer than two slots, or slots that the temporal transformer's heads don't divide.
    """

    backbone: BackboneConfig
    num_slots: int = 8
    slot_size: int = 128
    half_window: int = 2
    decoder_size: int = 1024
    merge_distance: float = 0.12
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.num_slots < 2:
            raise ValueError(f"num_slots: {self.num_slots}, but SOLV needs slots to merge; nearest valid: 2")
        if self.slot_size % HEADS:
            nearest = -(-self.slot_size // HEADS) * HEADS
            raise ValueError(
                f"slot_size: {self.slot_size} is no multiple of SOLV's {HEADS} heads; nearest valid: {nearest}"
            )

    @property
    def window(self) -> int:
        """W, frames."""
        return 2 * self.half_window + 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, and which system they are of."""
        return {"system": "solv", **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SOLVConfig:
        """The inverse of `to_dict` without `system`, also after a round trip through JSON."""
        backbone = BackboneConfig(**with_tuples(values["backbone"]))
        return cls(**{**with_tuples(values), "backbone": backbone})


@dataclass(frozen=True, kw_only=True)
class SOLVOutput(SlotModelOutput):
    """What one forward pass gives for T frames; in training T = 1, the middle of the window.

    slots, attention and masks are those after merging: the first `slot_nums` `(B, T)` of a frame, zeros behind them.
    Attention `(B, T, S, K)` sums to 1 over the tokens, not over the slots. slots_temporal `(B, T, S, d)` and
    attention_middle are those before merging, always S and in the order of the learned slots; clusters `(B, T, S)`
    is which merged slot each of them went into. slots_spatial `(B, frames, S, d)` come before temporal binding.
    """

    slot_nums: Tensor
    clusters: Tensor
    slots_temporal: Tensor
    slots_spatial: Tensor
    attention_middle: Tensor


def place_grid(grid: Grid) -> Tensor:
    """(x, y) of each patch, from -1 to 1, `(1, 1, P, 2)`."""
    rows, columns = (torch.linspace(-1, 1, side) for side in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)[None, None]


def places_of(weights_MSK: Tensor, places_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and spread `(M, S, 1, 2)` of normalised attention on places `(M or 1, K, 2)`; a spread of 0 becomes 1."""
    centre = (weights_MSK @ places_MK).unsqueeze(2)
    offsets = places_MK.unsqueeze(1) - centre
    variance = (weights_MSK.unsqueeze(-1) * offsets.square()).sum(2, keepdim=True)
    return centre, torch.where(variance > 0, variance, 1.0).sqrt()


class ResidualMLP(nn.Module):
    """x + LayerNorm -> Linear(4d) -> ReLU -> Linear(d) -> dropout, with the names of the public files."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(size, 4 * size)
        self.layer2 = nn.Linear(4 * size, size)
        self.norm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.layer2(F.relu(self.layer1(self.norm(x)))))


class SpatialBinding(nn.Module):
    """Invariant slot attention within a frame, from learned slots, places `S_p` and sizes `S_s`.

    The grid of places is trained as well.
    """

    def __init__(self, feature_size: int, num_slots: int, size: int, grid: Grid) -> None:
        super().__init__()
        self.abs_grid = nn.Parameter(place_grid(grid))
        self.slots = nn.Parameter(torch.randn(1, num_slots, size) * size**-0.5)
        self.S_s = nn.Parameter(torch.normal(0.1, 0.02, (1, num_slots, 1, 2)).clamp(min=0.01))
        self.S_p = nn.Parameter(2 * torch.rand(1, num_slots, 1, 2) - 1)
        self.h = nn.Linear(2, size)  # of the decoder's relative grid
        self.Q, self.K, self.V = (nn.Linear(size, size, bias=False) for _ in range(3))
        self.norm = nn.LayerNorm(size)
        self.gru = nn.GRUCell(size, size)
        self.mlp = ResidualMLP(size)
        self.g = nn.Linear(2, size)
        self.f = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))
        self.initial_mlp = nn.Sequential(
            nn.LayerNorm(feature_size),
            nn.Linear(feature_size, feature_size),
            nn.ReLU(),
            nn.Linear(feature_size, size),
            nn.LayerNorm(size),
        )
        self.final_layer = nn.Linear(size, size)

    def token_places(self, tokens_MK: Tensor | None) -> Tensor:
        """Places `(M, K, 2)` of the tokens, or `(1, P, 2)` of all."""
        return self.abs_grid[0] if tokens_MK is None else self.abs_grid[0, 0][tokens_MK]

    def relative(self, places_MK: Tensor, centre: Tensor, spread: Tensor) -> Tensor:
        """Places as each slot sees them, `(M, S, K, 2)`."""
        return (places_MK.unsqueeze(1) - centre) / (PLACE_SCALE * spread)

    def forward(self, features_MKF: Tensor, tokens_MK: Tensor | None) -> tuple[Tensor, Tensor]:
        """Slots `(M, S, d)` and attention `(M, S, K)`, which sums to 1 over the tokens."""
        x_MKD = self.initial_mlp(features_MKF)
        places_MK = self.token_places(tokens_MK)
        keys, values = self.K(x_MKD).unsqueeze(1), self.V(x_MKD).unsqueeze(1)
        slots, centre, spread = (p.expand(len(x_MKD), *p.shape[1:]) for p in (self.slots, self.S_p, self.S_s))
        for iteration in range(ITERATIONS + 1):
            where = self.g(self.relative(places_MK, centre, spread))  # (M, S, K, d)
            slots = self.norm(slots) if iteration == ITERATIONS else slots
            queries = self.Q(slots if iteration == ITERATIONS else self.norm(slots))
            logits_MSK = (
                torch.einsum("msd,mskd->msk", queries, self.f(keys + where)) * slots.shape[-1] ** -0.5
            )
            weights_MSK = logits_MSK.softmax(1) + 1e-8
            weights_MSK = weights_MSK / weights_MSK.sum(-1, keepdim=True)
            if iteration == ITERATIONS:
                break
            centre, spread = places_of(weights_MSK, places_MK)
            updates = torch.einsum("msk,mskd->msd", weights_MSK, self.f(values + where))
            slots = self.mlp(self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots))
        return self.final_layer(slots), weights_MSK


class TemporalBinding(nn.Module):
    """A transformer over each slot's W frames."""

    def __init__(self, size: int, window: int) -> None:
        super().__init__()
        self.pos_embed_temporal = nn.Parameter(torch.randn(1, window, 1, size) * size**-0.5)
        layer = nn.TransformerEncoderLayer(size, HEADS, 4 * size, DROPOUT, batch_first=True)
        self.slot_transformer = nn.TransformerEncoder(layer, TEMPORAL_LAYERS, enable_nested_tensor=False)

    def forward(self, slots_MWSD: Tensor, present_MW: Tensor) -> Tensor:
        """The middle frame's slots `(M, S, d)`; frames that are not present are not looked at."""
        M, W, S, _ = slots_MWSD.shape
        sequences = (slots_MWSD + self.pos_embed_temporal).transpose(1, 2).flatten(0, 1)
        absent = ~present_MW.bool().repeat_interleave(S, 0)
        return self.slot_transformer(sequences, src_key_padding_mask=absent)[:, W // 2].view(M, S, -1)


class SlotDecoder(nn.Module):
    """Slots at every position, five linear layers, mixed by the masks that are their last number's softmax."""

    def __init__(self, size: int, hidden: int, feature_size: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(size, hidden)
        self.layer2, self.layer3, self.layer4 = (nn.Linear(hidden, hidden) for _ in range(3))
        self.layer5 = nn.Linear(hidden, feature_size + 1)

    def forward(self, x_MSPD: Tensor, valid_MS: Tensor) -> tuple[Tensor, Tensor]:
        """Features `(M, P, F)` and masks `(M, S, P)`, which are 0 where a slot is not valid."""
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x_MSPD = F.relu(layer(x_MSPD))
        # The masks sum to one, so the last layer's features need the mixed slots alone, its logit all of them.
        weight, bias = self.layer5.weight, self.layer5.bias
        logits_MSP = x_MSPD @ weight[-1] + bias[-1]
        masks_MSP = logits_MSP.masked_fill(~valid_MS.unsqueeze(-1), -torch.inf).softmax(1)
        mixed_MPH = torch.einsum("msp,msph->mph", masks_MSP.to(x_MSPD.dtype), x_MSPD)
        return F.linear(mixed_MPH, weight[:-1], bias[:-1]), masks_MSP


class SOLV(VideoSegmenter):
    """The model; its own modules have the names of the public files. The backbone is frozen, the rest trains."""

    config: SOLVConfig
    frame_resizing = "bilinear"
    teaches = True

    def __init__(self, config: SOLVConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.backbone)
        features, size = self.backbone.feature_size, config.slot_size
        self.pos_dec = nn.Parameter(torch.randn(1, self.backbone.num_patches, size) * size**-0.5)
        self.s_bind = SpatialBinding(features, config.num_slots, size, self.grid)
        self.t_bind = TemporalBinding(size, config.window)
        self.dec = SlotDecoder(size, config.decoder_size, features)

    @property
    def input_size(self) -> Grid:
        return self.config.backbone.input_size

    @property
    def grid(self) -> Grid:
        return self.backbone.grid

    def backbone_features(self, video_BTCHW: Tensor) -> Tensor:
        """Frozen features `(B, T, P, F)` of a normalised video."""
        return self.backbone(video_BTCHW.flatten(0, 1)).unflatten(0, video_BTCHW.shape[:2])

    def forward(
        self, video: Tensor | None = None, *, backbone_features: Tensor | None = None, merge: bool = True
    ) -> SOLVOutput:
        """Every frame of a normalised video `(B, T, 3, H, W)`, or of its features `(B, T, P, F)`, from its window.

        Raises:
            ValueError: fewer frames than a window has.
        """
        if backbone_features is None:
            assert video is not None
            backbone_features = self.backbone_features(video)
        B, T = backbone_features.shape[:2]
        spatial, temporal, weights = self._of_whole_videos(backbone_features)
        output = self._decoded(temporal, weights, [merge] * (B * T))
        shaped = {name: value.unflatten(0, (B, T)) for name, value in output.items()}
        return SOLVOutput(**shaped, backbone_features=backbone_features, slots_spatial=spatial)

    def _of_whole_videos(self, features_BTPF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slots before temporal binding `(B, T, S, d)`, after it `(B * T, S, d)`, and attention `(B * T, S, P)`.

        Raises:
            ValueError: fewer frames than a window has.
        """
        half = self.config.half_window
        check_length(features_BTPF.shape[1], half)
        slots, weights = self.s_bind(features_BTPF.flatten(0, 1), None)
        spatial = slots.unflatten(0, features_BTPF.shape[:2])
        seen, present = zip(*(windows(video_slots, half, half, half) for video_slots in spatial), strict=True)
        return spatial, self.t_bind(torch.cat(seen), torch.cat(present)), weights

    @torch.no_grad()
    def target_slots(self, video_BTCHW: Tensor, noise_seeds: Sequence[int]) -> Tensor:
        """Those before merging, of which every frame has S, linked over the frames; nothing is drawn.

        Raises:
            ValueError: fewer frames than a window has.
        """
        temporal = self._of_whole_videos(self.backbone_features(video_BTCHW))[1]
        return torch.stack([linked(slots) for slots in temporal.unflatten(0, video_BTCHW.shape[:2])])

    def middle_frame(
        self,
        frames_BWCHW: Tensor,
        present_BW: Tensor,
        tokens_MK: Tensor,
        *,
        merge_B: Tensor | None = None,
        as_published: bool = True,
    ) -> SOLVOutput:
        """A training step's pass: the middle frames of windows, from some of their tokens.

        present_BW: which frames are within the video; the others are zeros. tokens_MK: the kept tokens of each of
        the M = B * W frames, see `drawn_tokens`. merge_B: which items may merge slots (None: all), see
        `merge_probability`. as_published: the decoder's places are taken for tokens of other frames of the batch, as
        in the authors' training; else of the middle frame's own.
        """
        B, W = frames_BWCHW.shape[:2]
        target = self.backbone(frames_BWCHW[:, W // 2])
        slots, weights = self.s_bind(
            self.backbone.features_of_tokens(frames_BWCHW.flatten(0, 1), tokens_MK), tokens_MK
        )
        spatial = slots.unflatten(0, (B, W))
        own = tokens_MK.unflatten(0, (B, W))[:, W // 2]
        output = self._decoded(
            self.t_bind(spatial, present_BW),
            weights.unflatten(0, (B, W))[:, W // 2],
            [True] * B if merge_B is None else merge_B.tolist(),
            tokens_MK[:B] if as_published else own,
        )
        shaped = {name: value.unsqueeze(1) for name, value in output.items()}
        return SOLVOutput(**shaped, backbone_features=target.unsqueeze(1), slots_spatial=spatial)

    def _decoded(
        self, slots_MSD: Tensor, weights_MSK: Tensor, merge: list[bool], tokens_MK: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Of frames' slots before merging: what `SOLVOutput` says of them, without B and T."""
        S = self.config.num_slots
        found = [
            clusters(slots, self.config.merge_distance) if may_merge else torch.arange(S)
            for slots, may_merge in zip(slots_MSD, merge, strict=True)
        ]
        clusters_MS = torch.stack(found).to(slots_MSD.device)
        slot_nums = clusters_MS.amax(1) + 1
        slots, weights = merged(slots_MSD, weights_MSK, clusters_MS)
        valid = torch.arange(S, device=slots.device) < slot_nums[:, None]
        where = places_of(weights, self.s_bind.token_places(tokens_MK))
        relative = self.s_bind.relative(self.s_bind.token_places(None), *where)
        at_positions = slots.unsqueeze(2) + self.pos_dec.unsqueeze(1) + self.s_bind.h(relative)
        reconstruction, masks = self.dec(at_positions, valid)
        return {
            "slots": slots,
            "attention": weights,
            "masks": masks,
            "reconstruction": reconstruction,
            "slot_nums": slot_nums,
            "clusters": clusters_MS,
            "slots_temporal": slots_MSD,
            "attention_middle": weights_MSK,
        }

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
        """As `VideoSegmenter.stream`, half a window behind its input; nothing is drawn or carried from frame to frame.

        Slots are linked into tracks, of which several slots of a frame can be one (`in_tracks`): rows n, n + N, n + 2N
        and so on of slots and masks belong to track n, and are zeros where it has no more slots.

        Raises:
            ValueError: a video that is shorter than a window, or `masks` that are not the decoder's.
        """
        if masks != "decoder":
            raise ValueError(
                f"masks: {masks!r}, but SOLV's masks are its decoder's; nearest valid: 'decoder'"
            )
        tracks = Tracks()
        for frames, seen, present, weights in delayed(self._bound(chunks), self.config.half_window):
            output = self._decoded(self.t_bind(seen, present), weights, [True] * len(frames))
            yield frames, *in_tracks(output["slots"], output["masks"], output["slot_nums"].tolist(), tracks)

    def _bound(self, chunks: Iterable[np.ndarray]) -> Iterator[Bound]:
        for frames in chunks:
            yield frames, *self.s_bind(self.backbone_features(self.prepare([frames]))[0], None)

    def label_maps(self, masks_TNP: Tensor, size: Grid) -> Tensor:
        """Track of every pixel, `(T, *size)` uint8: the masks resized, then argmax over slots."""
        return super().label_maps(masks_TNP, size) % self.config.num_slots
