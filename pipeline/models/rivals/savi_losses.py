"""What SAVi is trained with: squared errors of pictures, optical flow as pictures, a prior of noise.

Shapes: B clips, T frames, N slots, d slot size, H x W the pictures.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOW_SCALE = 50.0  # lengths from 1 / FLOW_SCALE of a picture's diagonal on are of full saturation
PRIOR_VARIANCE = 0.01


def picture_loss(reconstruction_BTCHW: Tensor, target_BTCHW: Tensor) -> Tensor:
    """Squared error summed over T, 3, H and W, averaged over the clips alone; no gradient reaches the target."""
    return (reconstruction_BTCHW - target_BTCHW.detach()).square().sum() / len(target_BTCHW)


def noise_prior_loss(distribution: Tensor) -> Tensor:
    """How far variances are from 0.01, of `(B, T, N, 2d)` means and log-variances: KL, summed over d, else averaged.

    The prior has the same means, which so have no part in it.
    """
    log_ratio = distribution.chunk(2, -1)[1] - math.log(PRIOR_VARIANCE)
    return 0.5 * (log_ratio.exp() - 1 - log_ratio).sum(-1).mean()


@torch.no_grad()
def flow_as_rgb(flow: Tensor) -> Tensor:
    """Optical flow (x, y) in pixels, `(…, 2, H, W)`, as pictures `(…, 3, H, W)` in [0, 1], in steps of 8 bits.

    The direction is the hue, the length the saturation: white stands still.
    """
    x, y = flow.unbind(-3)
    hue = (torch.atan2(y, x) / math.pi + 1) / 2
    diagonal = math.hypot(*flow.shape[-2:])
    saturation = (torch.hypot(x, y) * FLOW_SCALE / diagonal).clamp(0, 1)
    sector = torch.stack([(hue * 6 + shift) % 6 for shift in (5, 3, 1)], -3)
    missing = torch.minimum(sector, 4 - sector).clamp(0, 1)  # of each colour, where the saturation is full
    colours = 1 - saturation.unsqueeze(-3) * missing
    return (colours * 255.5).floor() / 255  # TensorFlow's way to 8 bits
