"""What the forms of SAVi share: slots of CNN features, carried from frame to frame, decoded into pictures.

Shapes: B clips, T frames, N slots, d slot size, P positions of the encoder's grid, C channels there, H x W the input,
(h, w) a grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.models.pixels import Grid
from pipeline.models.segmenter import VideoSegmenter


@dataclass(frozen=True)
class PixelSlotOutput:
    """What one forward pass gives; the first names are those of `SlotModelOutput`.

    slots: `(B, T, N, d)`, before the predictor. attention: `(B, T, N, P)`, softmax over N of slot attention's last
    iteration. masks: `(B, T, N, H * W)`, the decoder's, softmax over N. reconstruction: `(B, T, 3, H, W)`.
    features: slot attention's inputs before its norm, `(B, T, P, C)`. slots_predicted: what later frames start from,
    `(B, T', N, d)`, see the model. There is no frozen backbone, and so none of its features.
    """

    slots: Tensor
    attention: Tensor
    masks: Tensor
    reconstruction: Tensor
    features: Tensor
    slots_predicted: Tensor
    backbone_features: Tensor | None = None
    similarity: Tensor | None = None


def check_slots(num_slots: int, heads: int, slot_size: int) -> None:
    """Raises ValueError for fewer than two slots, or slots that the predictor's heads don't divide."""
    if num_slots < 2:
        raise ValueError(f"num_slots: {num_slots}, but masks need slots to choose from; nearest valid: 2")
    if slot_size % heads:
        nearest = -(-slot_size // heads) * heads
        raise ValueError(
            f"slot_size: {slot_size} is no multiple of the predictor's {heads} heads; nearest valid: {nearest}"
        )


def upsamplings(image_size: int, decoder_grid: int, layers: int) -> int:
    """How many of a decoder's layers double the side of its grid, the first ones, to get to the image's.

    Raises:
        ValueError: it does not get there.
    """
    doubled = [decoder_grid * 2**count for count in range(layers + 1)]
    if image_size not in doubled:
        nearest = min(doubled, key=lambda side: abs(side - image_size))
        raise ValueError(
            f"image_size: {image_size}, but a decoder of {layers} layers from a grid of {decoder_grid} x "
            f"{decoder_grid} gives {', '.join(map(str, doubled))}; nearest valid: {nearest}"
        )
    return doubled.index(image_size)


def encoder_grid(image_size: int, stride: int) -> int:
    """Positions on a side of the encoder's grid.

    Raises:
        ValueError: the stride does not divide the image.
    """
    if stride < 1 or image_size % stride:
        nearest = max(1, round(image_size / max(stride, 1))) * max(stride, 1)
        raise ValueError(
            f"image_size: {image_size} is no multiple of the encoder's stride {stride}; nearest valid: {nearest}"
        )
    return image_size // stride


def coordinates(side: int, low: float) -> Tensor:
    """(y, x) of each position of a square grid, from `low` to 1 inclusive, `(1, side, side, 2)`."""
    line = torch.linspace(low, 1, side)
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)[None]


def broadcast(slots_MD: Tensor, positions_HWD: Tensor) -> Tensor:
    """Slots at every position of a grid, `(M, d, h, w)`; in memory the channels come last.

    Convolutions keep that order, which is their faster one on a CPU: a training step of SAVi takes a fifth less time.
    """
    return (slots_MD[:, None, None] + positions_HWD).permute(0, 3, 1, 2)


def mixed(pictures_MNCHW: Tensor, logits_MNHW: Tensor) -> tuple[Tensor, Tensor]:
    """One picture `(M, 3, H, W)` of those of all slots, and masks `(M, N, H, W)`, softmax over slots."""
    masks = logits_MNHW.float().softmax(1)  # also where autocast gives fewer bits
    return (pictures_MNCHW * masks.unsqueeze(2)).sum(1), masks


class PixelSlots(VideoSegmenter):
    """A segmenter of pictures by spatial-broadcast decoding; its masks are of the input's size.

    The authors score them there, with labels of the nearest pixel.
    """

    frame_resizing = "bilinear"
    mask_resizing = "nearest"
    decoder: nn.Module

    @property
    def input_size(self) -> Grid:
        return self.config.image_size, self.config.image_size

    @property
    def grid(self) -> Grid:
        return self.input_size

    def encode(self, frames_MCHW: Tensor) -> Tensor:
        """Slot attention's inputs `(M, P, C)` of normalised frames."""
        raise NotImplementedError

    def decode_slots(self, slots_MND: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures `(M, 3, H, W)` and masks `(M, N, H, W)` of slots."""
        raise NotImplementedError

    def features(self, video_BTCHW: Tensor) -> Tensor:
        """Slot attention's inputs `(B, T, P, C)` of a normalised video.

        Raises:
            ValueError: a video of another size.
        """
        expected = (3, *self.input_size)
        if video_BTCHW.ndim != 5 or tuple(video_BTCHW.shape[2:]) != expected:
            raise ValueError(
                f"video has shape {tuple(video_BTCHW.shape)}, expected (B, T, {expected}); where the model's file "
                "does not tell the size of its input, the hint image_size does"
            )
        return self.encode(video_BTCHW.flatten(0, 1)).unflatten(0, video_BTCHW.shape[:2])

    def decode(self, slots_BTND: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder makes of slots, `(B, T, 3, H, W)`, and its masks `(B, T, N, H * W)`."""
        pictures, masks = self.decode_slots(slots_BTND.flatten(0, 1))
        shape = slots_BTND.shape[:2]
        return pictures.unflatten(0, shape), masks.flatten(2).unflatten(0, shape)

    # --- videos of any length -----------------------------------------------------------------

    def begin(self, noise_seed: int, boxes: Tensor | None) -> Any:
        """The state before one video's first frame."""
        raise NotImplementedError

    def advance(self, features_BTPC: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Slots `(B, T, N, d)` of frames in turn, and the state after them."""
        raise NotImplementedError

    @torch.no_grad()
    def stream(
        self,
        chunks: Iterable[np.ndarray],
        *,
        noise_seed: int = 0,
        rollout: str = "forward",
        masks: str = "decoder",
        boxes: Tensor | None = None,
    ) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """As `VideoSegmenter.stream`; the state is carried on, so how a video is cut does not change the result.

        boxes: `(K, 4)` of the objects in the first frame, (y0, x0, y1, x1) in [0, 1], where they start the slots.

        Raises:
            ValueError: boxes missing, masks that are not the decoder's, or another roll-out than forward.
        """
        for name, value, valid in (("masks", masks, "decoder"), ("rollout", rollout, "forward")):
            if value != valid:
                raise ValueError(
                    f"{name}: {value!r}, which {type(self).__name__} has not; nearest valid: {valid!r}"
                )
        state = None
        for frames in chunks:
            if state is None:
                state = self.begin(noise_seed, boxes)
            slots, state = self.advance(self.features(self.prepare([frames])), state)
            # One frame at a time: a picture of every slot of a whole chunk would be the peak of all memory.
            decoded = [self.decode_slots(frame)[1][0] for frame in slots[0, :, None]]
            yield frames, slots[0], torch.stack(decoded).flatten(2)
