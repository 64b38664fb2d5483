"""`SlotModel`: frames -> slots, masks and reconstructed features.

One architecture in three forms: SlotContrast (Manasyan et al. 2025), whose design SRL, SlotCurri and
SlotMatch's students share; VideoSAUR (Zadaianchuk et al. 2023) with drawn initial slots and a slot
mixer; and the image model DINOSAUR (Seitzer et al. 2023), without a predictor.

Shapes: B clips, T frames, N slots, P patches, F backbone feature size, d slot size, H x W the input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.models.backbone import Backbone, BackboneConfig
from pipeline.models.decoders import Decoder, MLPDecoder, SlotMixerDecoder
from pipeline.models.layers import MLP, LearnedSlots, RandomSlots, SlotAttention, Transformer, slot_noise
from pipeline.models.pixels import IMAGENET_MEAN, IMAGENET_STD, Grid, send
from pipeline.models.segmenter import VideoSegmenter

FIRST_FRAME_ITERATIONS = 3
NEXT_FRAME_ITERATIONS = 2


@dataclass(frozen=True)
class SlotModelConfig:
    """Everything that is needed to build a `SlotModel` before its weights are loaded.

    predictor: False for image models, which start every frame from the initial slots.
    decoder_hidden_sizes: of the MLP decoder's hidden layers, or of the slot mixer's renderer.
    decoder_blocks: transformer blocks of the slot mixer's allocator.
    decoder_outputs: what a position's numbers are, "features" and "similarity" (temporal, VideoSAUR)
    in this order; the MLP decoder gives features alone.
    feature_scale: what backbone features are multiplied by before they are projected and reconstructed.
    """

    backbone: BackboneConfig
    num_slots: int
    slot_size: int
    initializer: str = "learned"  # or "random"
    corrector_mlp: bool = True
    predictor: bool = True
    decoder: str = "mlp"  # or "slot_mixer"
    decoder_hidden_sizes: tuple[int, ...] = (1024, 1024, 1024)
    decoder_blocks: int = 3
    decoder_outputs: tuple[str, ...] = ("features",)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    feature_scale: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name; later fields only where they are set, so that files stay the same."""
        values = asdict(self)
        if self.feature_scale == 1:
            del values["feature_scale"]
        for key in ("stride", "grid", "blocks", "image_width"):
            if values["backbone"][key] is None:
                del values["backbone"][key]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SlotModelConfig:
        """The inverse of `to_dict`, also after a round trip through JSON; what is absent is the default."""
        backbone = BackboneConfig(**with_tuples(values["backbone"]))
        return cls(**{**with_tuples(values), "backbone": backbone})


def with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def without_autocast(device: str) -> contextlib.AbstractContextManager[None]:
    """A block in which autocast casts nothing."""
    if not torch.amp.is_autocast_available(device):  # "meta"
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


@dataclass(frozen=True)
class SlotModelOutput:
    """What one forward pass gives.

    slots: `(B, T, N, d)`, before the predictor. attention: `(B, T, N, P)`, softmax over N.
    masks: `(B, T, N, P)`, the decoder's, softmax over N. reconstruction and backbone_features:
    `(B, T, P, F)`, on the model's scale (`SlotModel.scaled`). similarity: `(B, T, P, P)`, logits of which
    positions of the next frame are like this one. What a decoder does not give is None.
    """

    slots: Tensor
    attention: Tensor
    masks: Tensor
    reconstruction: Tensor | None
    backbone_features: Tensor
    similarity: Tensor | None = None


class Encoder(nn.Module):
    """Backbone and the trained projection LayerNorm -> Linear(2F) -> ReLU -> Linear(d)."""

    def __init__(self, config: SlotModelConfig) -> None:
        super().__init__()
        self.backbone = Backbone(config.backbone)
        size = self.backbone.feature_size
        self.output_transform = MLP([size, 2 * size, config.slot_size], norm=True)


class Processor(nn.Module):
    """Slot attention within a frame (corrector) and the step to the next one (predictor).

    Image models have no predictor: each frame is corrected on its own from the initial slots.
    """

    def __init__(self, config: SlotModelConfig) -> None:
        super().__init__()
        self.corrector = SlotAttention(config.slot_size, mlp=config.corrector_mlp)
        self.predictor = Transformer(config.slot_size, num_blocks=1) if config.predictor else None


class SlotModel(VideoSegmenter):
    """An object-centric video model; module names are those of the public checkpoints.

    The backbone is frozen, everything else trains.
    """

    teaches = True

    def __init__(self, config: SlotModelConfig) -> None:
        super().__init__()
        self.config = config
        initializers = {"learned": LearnedSlots, "random": RandomSlots}
        if config.initializer not in initializers:
            raise ValueError(f"initializer must be one of {list(initializers)}, not {config.initializer!r}")
        self.initializer = initializers[config.initializer](config.num_slots, config.slot_size)
        self.encoder = Encoder(config)
        self.processor = Processor(config)
        self.decoder = self._build_decoder(config)

    def _build_decoder(self, config: SlotModelConfig) -> Decoder:
        patches, features = self.encoder.backbone.num_patches, self.encoder.backbone.feature_size
        sizes = {"features": features, "similarity": patches}
        outputs = config.decoder_outputs
        if outputs not in (("features",), ("features", "similarity"), ("similarity",)):
            raise ValueError(f"decoder_outputs must be of {list(sizes)}, in this order, not {outputs!r}")
        hidden = config.decoder_hidden_sizes
        if config.decoder == "mlp":
            if outputs != ("features",):
                raise ValueError(f"an MLP decoder has the outputs ('features',), not {outputs!r}")
            return MLPDecoder(patches, config.slot_size, features, hidden)
        if config.decoder == "slot_mixer":
            size = sum(sizes[name] for name in outputs)
            return SlotMixerDecoder(patches, config.slot_size, size, hidden, config.decoder_blocks)
        raise ValueError(f"decoder must be 'mlp' or 'slot_mixer', not {config.decoder!r}")

    @property
    def image_size(self) -> int:
        return self.config.backbone.image_size

    @property
    def input_size(self) -> Grid:
        return self.config.backbone.input_size

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches; P is their product."""
        return self.encoder.backbone.grid

    @property
    def reconstructs(self) -> bool:
        """Whether the decoder gives features, as all do but VideoSAUR's for MOVi."""
        return "features" in self.config.decoder_outputs

    @property
    def predicts_similarity(self) -> bool:
        return "similarity" in self.config.decoder_outputs

    # --- from pixels to slots ---------------------------------------------------------------

    def backbone_features(self, video_BTCHW: Tensor) -> Tensor:
        """Frozen features `(B, T, P, F)` of a normalised video, as the backbone gives them."""
        return self.encoder.backbone(video_BTCHW.flatten(0, 1)).unflatten(0, video_BTCHW.shape[:2])

    def scaled(self, backbone_features: Tensor) -> Tensor:
        """Features times the model's `feature_scale`: what is projected, and what the decoder reconstructs."""
        scale = self.config.feature_scale
        return backbone_features if scale == 1 else backbone_features * scale

    def project(self, backbone_features: Tensor) -> Tensor:
        """Slot attention's inputs `(…, P, d)` of features `(…, P, F)` as the backbone gives them."""
        return self.encoder.output_transform(self.scaled(backbone_features))

    def features_and_keys(self, video_BTCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Frozen features, and the last block's attention keys, both `(B, T, P, F)`, of a normalised video."""
        features, keys = self.encoder.backbone.features_and_keys(video_BTCHW.flatten(0, 1))
        shape = video_BTCHW.shape[:2]
        return features.unflatten(0, shape), keys.unflatten(0, shape)

    def initial_slots(self, batch_size: int, noise_seeds: Sequence[int] | None = None) -> Tensor:
        """Slots `(B, N, d)` that frame 0 starts from; `noise_seeds` (one a clip) where drawn."""
        noise = None
        if isinstance(self.initializer, RandomSlots) and noise_seeds is not None:
            sizes = (self.config.num_slots, self.config.slot_size)
            noise = send(torch.stack([slot_noise(*sizes, seed) for seed in noise_seeds]), self.device)
        return self.initializer(batch_size, noise)

    def roll_out(
        self, backbone_features: Tensor, initial_slots: Tensor | None = None, rollout: str = "forward"
    ) -> tuple[Tensor, Tensor]:
        """Slots `(B, T, N, d)` and attention `(B, T, N, P)` from features `(B, T, P, F)`.

        `rollout="cyclic"` (SlotCurri) goes on from the last frame's prediction back to frame 0 and
        lets those slots replace the forward ones; the last frame keeps its own. Without a predictor
        both are the same: no frame knows of another.
        """
        if rollout not in ("forward", "cyclic"):
            raise ValueError(f"rollout must be 'forward' or 'cyclic', not {rollout!r}")
        features_BTPD = self.project(backbone_features)
        state = self.initial_slots(len(features_BTPD)) if initial_slots is None else initial_slots
        # Slots go round and round, so that roundings of autocast would add up; and they are few, so that its casts
        # would take longer than it saves.
        with without_autocast(features_BTPD.device.type):
            slots, attention = self._roll(features_BTPD.to(state.dtype), state, rollout)
        return torch.stack(slots, 1), torch.stack(attention, 1)

    def _roll(
        self, features_BTPD: Tensor, state_BND: Tensor, rollout: str
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Slots and attention of each frame of a whole clip."""
        slots, attention, state_BND = self.advance(features_BTPD, state_BND, first=True)
        if rollout == "cyclic" and self.processor.predictor is not None:
            for t in range(features_BTPD.shape[1] - 2, -1, -1):
                slots[t], attention[t] = self.processor.corrector(
                    state_BND, features_BTPD[:, t], NEXT_FRAME_ITERATIONS
                )
                state_BND = self.processor.predictor(slots[t])
        return slots, attention

    def advance(
        self, features_BTPD: Tensor, state_BND: Tensor, *, first: bool
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Slots and attention of each frame, and the state that starts the frame after them."""
        slots, attention = [], []
        predictor = self.processor.predictor
        for t in range(features_BTPD.shape[1]):
            first_frame = predictor is None or (first and t == 0)
            iterations = FIRST_FRAME_ITERATIONS if first_frame else NEXT_FRAME_ITERATIONS
            slots_BND, attention_BNP = self.processor.corrector(state_BND, features_BTPD[:, t], iterations)
            if predictor is not None:
                state_BND = predictor(slots_BND)
            slots.append(slots_BND)
            attention.append(attention_BNP)
        return slots, attention, state_BND

    def decode(self, slots_BTND: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's outputs `(B, T, P, C)`, see `decoder_outputs`, and masks `(B, T, N, P)`."""
        outputs, masks = self.decoder(slots_BTND.flatten(0, 1))
        shape = slots_BTND.shape[:2]
        return outputs.unflatten(0, shape), masks.unflatten(0, shape)

    def forward(
        self,
        video: Tensor | None = None,
        *,
        initial_slots: Tensor | None = None,
        rollout: str = "forward",
        backbone_features: Tensor | None = None,
    ) -> SlotModelOutput:
        """Runs a normalised float video `(B, T, 3, H, W)`, or features computed before, as the backbone gives them.

        Raises:
            ValueError: neither or both of video and features, or a video of another size.
        """
        if (video is None) == (backbone_features is None):
            raise ValueError("pass a video or its backbone_features, and not both")
        if backbone_features is None:
            assert video is not None
            expected = (3, *self.input_size)
            if video.ndim != 5 or tuple(video.shape[2:]) != expected:
                raise ValueError(f"video has shape {tuple(video.shape)}, expected (B, T, {expected})")
            backbone_features = self.backbone_features(video)
        slots, attention = self.roll_out(backbone_features, initial_slots, rollout)
        outputs, masks = self.decode(slots)
        return SlotModelOutput(
            slots,
            attention,
            masks,
            reconstruction=outputs[..., : backbone_features.shape[-1]] if self.reconstructs else None,
            backbone_features=self.scaled(backbone_features),
            similarity=outputs[..., -masks.shape[-1] :] if self.predicts_similarity else None,
        )

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
        """Runs a video that comes in chunks of uint8 frames `(t, h, w, 3)`, in constant memory.

        Slots are carried from chunk to chunk, so how the video is cut does not change the result.
        Yields `(frames, slots (t, N, d), masks (t, N, P))` for each chunk; the masks are the decoder's
        or, with `masks="attention"`, slot attention's, which needs no decoding. The cyclic roll-out
        (see `roll_out`) holds the whole video's frames and projected features, since it goes back.
        """
        back = rollout == "cyclic" and self.processor.predictor is not None
        rolled = self._stream_cyclic if back else self._stream_forward
        for frames, slots_TND, attention_TNP in rolled(chunks, noise_seed):
            yield (
                frames,
                slots_TND,
                attention_TNP if masks == "attention" else self.decode(slots_TND[None])[1][0],
            )

    def _project(self, frames: np.ndarray) -> Tensor:
        """Frames `(t, h, w, 3)` uint8 to slot attention's inputs `(1, t, P, d)`."""
        return self.project(self.backbone_features(self.prepare([frames])))

    def _stream_forward(
        self, chunks: Iterable[np.ndarray], noise_seed: int
    ) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        state: Tensor | None = None
        for frames in chunks:
            features = self._project(frames)
            first = state is None
            if state is None:
                state = self.initial_slots(1, [noise_seed])
            slots, attention, state = self.advance(features, state, first=first)
            yield frames, torch.cat(slots), torch.cat(attention)

    def _stream_cyclic(
        self, chunks: Iterable[np.ndarray], noise_seed: int
    ) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        frames, features = [], []
        for chunk in chunks:
            frames.append(chunk)
            features.append(self._project(chunk))
        if not frames:
            return
        start = self.initial_slots(1, [noise_seed])
        slots, attention = self._roll(torch.cat(features, 1), start, "cyclic")
        lengths = [len(chunk) for chunk in frames]
        yield from zip(
            frames, torch.cat(slots).split(lengths), torch.cat(attention).split(lengths), strict=True
        )
