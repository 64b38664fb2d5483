"""The keys that a rival system adds to `teacher`: a section each, which only `teacher.system` of its name uses.

Sizes, backbone, normalisation and what is common to all training are where SlotContrast has them; `RIVALS` says
which of these each system uses. And the keys of `jobs.rivals`, which compares such systems.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.config.fields import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Section

Widths = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class SOLV(Section):
    """SOLV (Aydemir et al. 2023); defaults are its authors'."""

    half_window: PositiveInt = 2
    """frames on either side of the one that is segmented"""
    decoder_size: PositiveInt = 1024
    """width of the decoder's hidden layers"""
    merge_distance: PositiveFloat = 0.12
    """slots are merged below this cosine distance"""
    merging_epochs: PositiveInt = 180
    """equal parts of the training, from never merging in the first to always merging in the last"""
    token_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """of the patches of each frame, drawn anew in every step, that slots are found in while training"""
    published_places: bool = True
    """the decoder's places are taken for tokens of another frame, as in the authors' training; false: of its own"""

    @property
    def window(self) -> int:
        """Frames that are looked at at once."""
        return 2 * self.half_window + 1


class SAVi(Section):
    """SAVi (Kipf et al. 2022); defaults are SAVi-S's, but without boxes and flow."""

    conditioning: Literal["none", "boxes"] = "none"
    """boxes: slots start from those of the first frame's objects, by the clips' masks: as published, and supervision"""
    target: Literal["rgb", "flow"] = "rgb"
    """what is reconstructed: the frame or, as published, optical flow, which the clips have with clips.flow"""
    encoder_channels: Widths = (32, 32, 32, 32)
    """of each layer of the CNN, or of each stage of the ResNet, there in multiples of 32"""
    encoder_blocks: tuple[PositiveInt, ...] = ()
    """of each stage of a ResNet in place of the CNN; SAVi-L: [3, 4, 6, 3]"""
    stride: PositiveInt = 1
    """of the CNN's first layer, pixels; SAVi-M: 2"""
    mlp_size: PositiveInt | None = None
    """hidden size of slot attention's MLP; null: it has none"""
    decoder_grid: PositiveInt = 8
    """rows and columns that slots are broadcast to; layers double them until they are the input's"""
    decoder_channels: Widths = (64, 64, 64, 64)
    """of each of the decoder's layers"""


class STEVE(Section):
    """STEVE (Singh et al. 2022); defaults are its authors' for MOVi-E."""

    stride: PositiveInt = 2
    """pixels from one position of the masks to the next; the authors' at 64 pixels: 1"""
    width: PositiveInt = 192
    """of features and of the token decoder"""
    cnn_width: PositiveInt = 64
    """of the CNN's hidden layers"""
    mlp_size: PositiveInt = 192
    """hidden size of slot attention's MLP"""
    vocabulary: PositiveInt = 4096
    """tokens that there are"""
    predictor_blocks: PositiveInt = 1
    """transformer blocks from a frame's slots to the next frame's first ones"""
    decoder_blocks: PositiveInt = 8
    """transformer blocks of the token decoder"""
    decoder_heads: PositiveInt = 4
    """attention heads of such a block"""
    temperature_steps: PositiveInt = 30_000
    """steps until the dVAE's codes are as hard as they get"""
    half_life: PositiveInt = 250_000
    """steps in which the learning rates of encoder and token decoder halve; the dVAE's stays"""


class DIOD(Section):
    """DIOD (Kara et al. 2024); defaults are its authors'."""

    widths: tuple[PositiveInt, ...] = (64, 128, 256, 512)
    """channels of the ResNet's stages"""
    blocks: tuple[PositiveInt, ...] = (2, 2, 2, 2)
    """blocks of each stage"""
    burn_in: Fraction = 0.8
    """share of the steps, the first ones, that learn from motion segments without a teacher"""
    teacher_decay: Fraction = 0.996
    """of the running average of the model that teaches it afterwards, in a step"""
    confidence: Fraction = 0.9
    """mean foreground that the teacher has to see over a segment, so that it counts"""
    half_life: PositiveInt = 50_000
    """steps in which the learning rate halves"""
    smallest_segment: NonNegativeInt = 50
    """pixels of the model's input; motion segments that have no more are dropped"""
    colours: bool = True
    """the taught model's frames are changed in colour, its teacher's are not"""
    batch_statistics: bool = True
    """batch norm by the statistics of the clip at hand, in inference too"""


class Rivals(Section):
    """Which systems `jobs.rivals` trains on a config's videos, and scores beside its own models."""

    systems: dict[str, str] = Field(default={})
    """the preset of each by a short name: {solv: configs/systems/demo_solv.yaml}"""
    seeds: tuple[NonNegativeInt, ...] = (0, 1, 2)
    """each is trained from every one of them (teacher.train.seed)"""
    train: tuple[str, ...] | None = None
    """what to train now, [solv, diod:0] is SOLV from all seeds and DIOD from one; null: all; []: nothing, only score"""
    document: str | None = None
    """a Markdown file whose marked block is replaced by the table"""


@dataclass(frozen=True)
class Uses:
    """What of `teacher` a system that is trained here uses, beside what all of them do and its own section.

    keys: of `teacher`. training: of `teacher.train`.
    """

    keys: frozenset[str]
    training: frozenset[str] = frozenset({"warmup_steps"})


# Which weights and slots there are, and what decides the run, whatever it trains.
ALL_USE = frozenset(
    {"name", "checkpoint", "system", "image_size", "image_width", "num_slots", "slot_size", "train"}
)
# The number of shares that a contrast has counts as workers in a run's name, also where nothing is contrasted.
ALL_TRAIN_WITH = frozenset(
    {"steps", "batch_size", "learning_rate", "gradient_clip", "seed", "workers", "precision", "contrast"}
)
# What says of a term or a warm-up that there is none, though it is not the default: no harm in saying it.
NONE_OF_IT: dict[str, Any] = {"alpha": 0, "warmup_steps": 0}

# By `teacher.system`, as its builder (`pipeline/models/build_teachers.py`) and its objective (`pipeline/distill/`) do.
RIVALS = {
    "solv": Uses(
        frozenset({"backbone", "backbone_weights", "backbone_blocks", "mean", "std", "save"}), frozenset()
    ),
    "savi": Uses(frozenset({"initial_slots", "num_iterations", "predictor_heads"})),
    "steve": Uses(frozenset({"num_iterations", "predictor_heads"})),
    "diod": Uses(frozenset({"mean", "std"})),
}
