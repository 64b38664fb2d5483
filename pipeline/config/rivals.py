"""The keys that a rival system adds to `teacher`: a section each, which only `teacher.system` of its name uses.

Sizes, backbone, normalisation and what is common to all training are where SlotContrast has them.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.config.fields import PositiveFloat, PositiveInt, Section


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
