"""DIOD (Kara et al. 2024): slots of moving objects, from a ResNet with a convolutional memory.

Each frame's slots go on from the frame before; slot attention's own masks are the model's. One decoder sees all
slots at once, as a map on which each of them lies where its mask does. The last slot is the background.

Batch norm: the authors never leave training mode, so that all they published normalises with the statistics of the
batch at hand, which in inference is one clip of five frames. So does this by default, in eval mode too; there the
running statistics stay as they are. `batch_statistics=False` normalises with these instead, as eval mode does
elsewhere: then a frame does not depend on later ones, and the masks are others than the authors'.

Shapes: B clips, T frames, N slots, d slot size, (h, w) the grid, P = h * w, (H, W) = (4h, 4w) the input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.pixels import Grid
from pipeline.models.rivals.windows import in_clips
from pipeline.models.segmenter import VideoSegmenter
from pipeline.models.slot_model import SlotModelOutput, with_tuples

STRIDE = 4  # pixels of the input for each of the grid
EPSILON = 1e-8  # which masks have added
SMALLEST_MLP = 128  # width of slot attention's MLP where slots are smaller

State = tuple[list[Tensor], Tensor]  # the memory's maps `(B, d, h, w)`, one a layer, and slots `(B, N, d)`


@dataclass(frozen=True)
class DIODConfig:
    """What is needed to build a `DIOD` before its weights are loaded.

    grid: rows and columns of the masks, to which the weights are bound. widths, blocks: channels and blocks of the
    ResNet's stages. memory_layers: of the convolutional GRU. mean, std: of RGB, whose channels the model then turns
    round. batch_statistics: see this module. clip_frames: a video is cut into clips of so many frames, the last one
    shorter. carried: whether a clip goes on from the slots and the memory of the one before, which is ours; the
    authors' clips all start anew.

    Raises:
        ValueError: fewer than two slots, or clips without frames.
    """

    grid: Grid = (120, 242)
    num_slots: int = 45
    slot_size: int = 64
    widths: tuple[int, ...] = (64, 128, 256, 512)
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    memory_layers: int = 2
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    batch_statistics: bool = True
    clip_frames: int = 5
    carried: bool = False

    def __post_init__(self) -> None:
        if self.num_slots < 2:
            raise ValueError(
                f"num_slots: {self.num_slots}, but DIOD's last slot is the background; nearest valid: 2"
            )
        if self.clip_frames < 1:
            raise ValueError(
                f"clip_frames: {self.clip_frames}, but a clip has frames; nearest valid: 1 (as published: 5)"
            )

    @property
    def input_size(self) -> Grid:
        """Height and width of the input, pixels."""
        return STRIDE * self.grid[0], STRIDE * self.grid[1]

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, and which system they are of."""
        return {"system": "diod", **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DIODConfig:
        """The inverse of `to_dict` without `system`, also after a round trip through JSON."""
        return cls(**with_tuples(values))


@dataclass(frozen=True, kw_only=True)
class DIODOutput(SlotModelOutput):
    """What one forward pass gives.

    masks are slot attention's own, and so is attention: softmax over N, with `EPSILON` added. reconstruction
    `(B, T, 3, H, W)` is of pixels, normalised as the video. backbone_features `(B, T, P, d)` is what the memory gives;
    features `(B, T, P, d)` are slot attention's inputs before its norm. foreground `(B, T, P)`: 1 minus the mask of
    the background. decoder_input `(B, T, d, h, w)`: the slots where their masks are. state: where the next frame
    goes on.
    """

    features: Tensor
    foreground: Tensor
    decoder_input: Tensor
    state: State


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that in eval mode normalises with the batch's own statistics, where it is told to."""

    def __init__(self, channels: int, batch_statistics: bool) -> None:
        super().__init__(channels)
        self.batch_statistics = batch_statistics

    def forward(self, input: Tensor) -> Tensor:
        if self.training or not self.batch_statistics:
            return super().forward(input)
        return F.batch_norm(input, None, None, self.weight, self.bias, training=True, eps=self.eps)


class Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut (He et al. 2016), with torchvision's names."""

    def __init__(self, fan_in: int, channels: int, stride: int, batch_statistics: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, channels, 3, stride, 1, bias=False)
        self.bn1 = BatchNorm(channels, batch_statistics)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = BatchNorm(channels, batch_statistics)
        self.downsample = (
            nn.Sequential(
                nn.Conv2d(fan_in, channels, 1, stride, bias=False), BatchNorm(channels, batch_statistics)
            )
            if stride != 1 or fan_in != channels
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A quarter of the input's size: no pooling, and of the stages only the second has a stride."""

    def __init__(self, widths: Sequence[int], blocks: Sequence[int], batch_statistics: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.bn1 = BatchNorm(widths[0], batch_statistics)
        fan_in = widths[0]
        self.stages = len(widths)
        for stage, (channels, count) in enumerate(zip(widths, blocks, strict=True)):
            layers = []
            for block in range(count):
                stride = 2 if stage == 1 and block == 0 else 1
                layers.append(Block(fan_in, channels, stride, batch_statistics))
                fan_in = channels
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return x


class ConvGRUCell(nn.Module):
    """A gated recurrent unit whose state is a map."""

    def __init__(self, fan_in: int, size: int) -> None:
        super().__init__()
        self.conv_gates = nn.Conv2d(fan_in + size, 2 * size, 3, padding=1)
        self.conv_can = nn.Conv2d(fan_in + size, size, 3, padding=1)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        reset, update = self.conv_gates(torch.cat([x, state], 1)).sigmoid().chunk(2, 1)
        candidate = self.conv_can(torch.cat([x, reset * state], 1)).tanh()
        return (1 - update) * state + update * candidate


class ConvGRU(nn.Module):
    """Layers of memory over the frames of a clip."""

    def __init__(self, fan_in: int, size: int, layers: int) -> None:
        super().__init__()
        self.size = size
        cells = [ConvGRUCell(size if layer else fan_in, size) for layer in range(layers)]
        self.cell_list = nn.ModuleList(cells)

    def forward(self, x_BTCHW: Tensor, states: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """The last layer's maps `(B, T, d, h, w)`, and each layer's last one; without states it begins with zeros."""
        ends = []
        for layer, cell in enumerate(self.cell_list):
            B, _, _, *grid = x_BTCHW.shape
            state = x_BTCHW.new_zeros(B, self.size, *grid) if states is None else states[layer]
            maps = []
            for x_BCHW in x_BTCHW.unbind(1):
                state = cell(x_BCHW, state)
                maps.append(state)
            x_BTCHW = torch.stack(maps, 1)
            ends.append(state)
        return x_BTCHW, ends


class Positions(nn.Module):
    """A learned map of the distances from the four sides, added."""

    grid: Tensor

    def __init__(self, size: int, grid: Grid) -> None:
        super().__init__()
        rows, columns = (torch.linspace(0, 1, side) for side in grid)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        self.register_buffer("grid", torch.stack([y, x, 1 - y, 1 - x], -1)[None])
        self.embedding = nn.Linear(4, size)

    def forward(self, x_MPD: Tensor) -> Tensor:
        return x_MPD + self.embedding(self.grid).flatten(1, 2)


class Encoder(nn.Module):
    """Pixels to maps that remember the frames before."""

    def __init__(self, config: DIODConfig) -> None:
        super().__init__()
        self.resnet = ResNet(config.widths, config.blocks, config.batch_statistics)
        self.convGRU = ConvGRU(config.widths[-1], config.slot_size, config.memory_layers)
        self.encoder_pos = Positions(config.slot_size, config.grid)

    def forward(self, video_BTCHW: Tensor, states: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Maps `(B, T, P, d)` without positions, and the memory's states. All frames are one batch to batch norm."""
        maps = self.resnet(video_BTCHW.flatten(0, 1)).unflatten(0, video_BTCHW.shape[:2])
        maps, states = self.convGRU(maps, states)
        return F.relu(maps).flatten(3).transpose(2, 3), states


class SlotAttention(nn.Module):
    """Slot attention of one round a frame, and one more before the first. Its first slots are fixed numbers."""

    slots: Tensor

    def __init__(self, num_slots: int, size: int) -> None:
        super().__init__()
        hidden = max(size, SMALLEST_MLP)
        self.register_buffer("slots", torch.randn(1, num_slots, size))
        self.to_q, self.to_k, self.to_v = (nn.Linear(size, size) for _ in range(3))
        self.gru = nn.GRUCell(size, size)
        self.fc1, self.fc2 = nn.Linear(size, hidden), nn.Linear(hidden, size)
        self.norm_input, self.norm_slots, self.norm_pre_ff = (nn.LayerNorm(size) for _ in range(3))

    def forward(self, features_BTPD: Tensor, slots_BND: Tensor | None) -> tuple[Tensor, Tensor]:
        """Slots `(B, T, N, d)` and masks `(B, T, N, P)`; without slots, a clip begins."""
        features_BTPD = self.norm_input(features_BTPD)
        keys, values = self.to_k(features_BTPD), self.to_v(features_BTPD)
        if slots_BND is None:
            slots_BND = self.slots.expand(len(features_BTPD), -1, -1)
            slots_BND, _ = self._round(slots_BND, keys[:, 0], values[:, 0])
        slots, masks = [], []
        for keys_BPD, values_BPD in zip(keys.unbind(1), values.unbind(1), strict=True):
            slots_BND, masks_BNP = self._round(slots_BND, keys_BPD, values_BPD)
            slots.append(slots_BND)
            masks.append(masks_BNP)
        return torch.stack(slots, 1), torch.stack(masks, 1)

    def _round(self, slots_BND: Tensor, keys_BPD: Tensor, values_BPD: Tensor) -> tuple[Tensor, Tensor]:
        queries = self.to_q(self.norm_slots(slots_BND)) * slots_BND.shape[-1] ** -0.5
        masks_BNP = (queries @ keys_BPD.transpose(1, 2)).softmax(1) + EPSILON
        updates = masks_BNP / masks_BNP.sum(-1, keepdim=True) @ values_BPD
        slots_BND = self.gru(updates.flatten(0, 1), slots_BND.flatten(0, 1)).view_as(slots_BND)
        return slots_BND + self.fc2(F.relu(self.fc1(self.norm_pre_ff(slots_BND)))), masks_BNP


class Decoder(nn.Module):
    """A map of a quarter of the size to RGB."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(size, size, 4, 2, 1)
        self.conv2 = nn.ConvTranspose2d(size, size, 5, 1, 2)
        self.conv3 = nn.ConvTranspose2d(size, size, 5, 1, 2)
        self.conv4 = nn.ConvTranspose2d(size, size, 4, 2, 1)
        self.conv5 = nn.ConvTranspose2d(size, size, 5, 1, 2)
        self.conv6 = nn.ConvTranspose2d(size, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5):
            x = F.relu(conv(x))
        return self.conv6(x)


class DIOD(VideoSegmenter):
    """DIOD; module names are those of the public files without their prefix. All of it trains but the slots' table."""

    config: DIODConfig
    frame_resizing, mask_resizing = "bilinear", "nearest"
    teaches = True

    def __init__(self, config: DIODConfig) -> None:
        super().__init__()
        self.config = config
        size = config.slot_size
        self.encoder_cnn = Encoder(config)
        self.decoder = Decoder(size)
        self.fc1, self.fc2 = nn.Linear(size, size), nn.Linear(size, size)
        self.slot_attention = SlotAttention(config.num_slots, size)
        self.LN = nn.LayerNorm((config.grid[0] * config.grid[1], size))

    @property
    def input_size(self) -> Grid:
        return self.config.input_size

    @property
    def grid(self) -> Grid:
        return self.config.grid

    def prepare(self, clips: Sequence[np.ndarray | Tensor]) -> Tensor:
        """As `VideoSegmenter.prepare`, but the channels are BGR."""
        return super().prepare(clips).flip(2)

    def forward(self, video: Tensor, *, state: State | None = None) -> DIODOutput:
        """Runs a normalised BGR video `(B, T, 3, H, W)`; with a state, it goes on from there.

        Raises:
            ValueError: a video whose grid the weights are not of.
        """
        if video.ndim != 5 or tuple(-(-side // STRIDE) for side in video.shape[3:]) != self.grid:
            raise ValueError(
                f"video has shape {tuple(video.shape)}, but the weights are of a grid of {self.grid[0]} x "
                f"{self.grid[1]}; expected (B, T, 3, {self.input_size[0]}, {self.input_size[1]})"
            )
        maps, features, slots, masks, state = self._segmented(video, state)
        mixed = (slots.transpose(2, 3) @ masks).unflatten(-1, self.grid)
        frames = self.decoder(mixed.flatten(0, 1))[..., : video.shape[3], : video.shape[4]]
        return DIODOutput(
            slots=slots,
            attention=masks,
            masks=masks,
            reconstruction=frames.unflatten(0, video.shape[:2]),
            backbone_features=maps,
            features=features,
            foreground=1 - masks[:, :, -1],
            decoder_input=mixed,
            state=state,
        )

    def _segmented(
        self, video_BTCHW: Tensor, state: State | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, State]:
        """What comes before the decoder: the memory's maps, features, slots, masks and state, see `DIODOutput`."""
        memory, slots = state or (None, None)
        maps, memory = self.encoder_cnn(video_BTCHW, memory)
        features = self.fc2(F.relu(self.fc1(self.LN(self.encoder_cnn.encoder_pos(maps)))))
        slots, masks = self.slot_attention(features, slots)
        return maps, features, slots, masks, (memory, slots[:, -1])

    @torch.no_grad()
    def target_slots(self, video_BTCHW: Tensor, noise_seeds: Sequence[int]) -> Tensor:
        """Each clip by itself, as batch norm's statistics are its frames', from the fixed slots; nothing is drawn."""
        return torch.cat([self._segmented(clip[None], None)[2] for clip in video_BTCHW])

    @torch.no_grad()
    def stream(
        self,
        chunks: Iterable[np.ndarray],
        *,
        noise_seed: int = 0,
        rollout: str = "forward",
        masks: str = "decoder",
    ) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """As `VideoSegmenter.stream`, in clips of `clip_frames`, whose statistics are those of batch norm.

        A chunk comes out once its last frame's clip is full, or the video at its end. Nothing is drawn. The masks are
        slot attention's, whatever `masks` says, as the decoder has none of its own.
        """
        state: State | None = None

        def run(pixels_TCHW: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal state
            before = state if self.config.carried else None
            _, _, slots, masks, state = self._segmented(pixels_TCHW[None], before)
            return slots[0], masks[0]

        prepared = ((frames, self.prepare([frames])[0]) for frames in chunks)
        yield from in_clips(prepared, self.config.clip_frames, run)
