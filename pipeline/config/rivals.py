"""The keys that a rival system adds to `teacher`: a section each, which only `teacher.system` of its name uses.

Sizes, backbone, normalisation and what is common to all training are where SlotContrast has them.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.config.fields import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Section


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
