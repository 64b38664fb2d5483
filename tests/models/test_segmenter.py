"""What all video segmenters share: rectangular inputs and masks that are resized as a system says."""

import numpy as np
import pytest
import torch
from tiny_models import tiny_vit

from pipeline.models import BackboneConfig, VideoSegmenter
from pipeline.models.backbone import Backbone
from pipeline.models.pixels import input_pixels


class Halves(VideoSegmenter):
    """Masks of 2 x 3 positions of an input of 4 x 6 pixels."""

    grid, input_size = (2, 3), (4, 6)


@pytest.mark.parametrize(("mode", "border"), [("nearest", 4), ("bilinear", 6)])
def test_label_maps_are_resized_as_the_system_says(mode, border):
    """Positions are at pixels 1.5, 5.5 and 9.5; in between, 0.8 ahead becomes 0.1 behind after 8/9 of the way."""
    model = Halves()
    model.mask_resizing = mode
    row = torch.tensor([[0.9, 0.45, 0.1], [0.1, 0.55, 0.9]])
    found = model.label_maps(row.repeat(1, 2)[None], (4, 12))
    assert found.dtype == torch.uint8
    assert found.tolist() == [[[0] * border + [1] * (12 - border)] * 4]


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_frames_become_a_rectangle(mode):
    frames = np.random.default_rng(0).integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
    pixels = input_pixels(frames, (4, 6), mode=mode)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(frames).permute(0, 3, 1, 2) / 255, (4, 6), mode=mode, antialias=True
    )
    torch.testing.assert_close(pixels, expected.clamp(0, 1))


def test_a_rectangular_backbone():
    backbone = Backbone(BackboneConfig(None, 16, tiny_vit(), image_width=40))
    assert backbone.grid == (2, 5)
    assert backbone(torch.zeros(1, 3, 16, 40)).shape == (1, 10, 16)
    with pytest.raises(ValueError, match="image size 41 is not a multiple of the patch size 8"):
        Backbone(BackboneConfig(None, 16, tiny_vit(), image_width=41))
