"""What STEVE's training needs beside the model: its draws, its losses, and its three learning rates (Adam).

Shapes: B clips, T frames, H x W the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.rivals.schedules import steve_learning_rate, steve_temperature
from pipeline.models.rivals.steve import STEVE, STEVEOutput, TokenDraws

# By the names of the model's parts; the dVAE's stays, the others go with `steve_learning_rate`.
RATES = {"dvae": 3e-4, "steve_encoder": 1e-4, "steve_decoder": 3e-4}
CLIP_LARGEST = 0.05  # all gradients are scaled so that no entry is larger (infinity norm)


def rates(step: int, warmup: int = 30_000, half_life: int = 250_000) -> dict[str, float]:
    """The learning rate of each part of the model at a step."""
    factor = steve_learning_rate(step, warmup, half_life)
    return {part: rate if part == "dvae" else rate * factor for part, rate in RATES.items()}


def draw_tokens(model: STEVE, frames: int, seed: int) -> TokenDraws:
    """The draws for so many frames, on the model's device: the same for a seed on one kind of device."""
    generator = torch.Generator(model.device).manual_seed(seed)
    shape = (frames, model.config.vocabulary, model.config.token_side, model.config.token_side)
    soft, hard = (torch.empty(shape, device=model.device).exponential_(generator=generator) for _ in range(2))
    return TokenDraws(soft, hard)


def losses(output: STEVEOutput, video: Tensor) -> dict[str, Tensor]:
    """Summed over a frame, averaged over B and T; what is trained is their sum.

    cross_entropy: of the tokens; it has no gradient in the dVAE. dvae: squared error of its picture of the video
    `(B, T, 3, H, W)` in [0, 1].
    """
    frames = output.tokens.shape[0] * output.tokens.shape[1]
    logits, tokens = output.reconstruction.flatten(0, 2).float(), output.tokens.flatten()
    return {
        "cross_entropy": F.cross_entropy(logits, tokens, reduction="sum") / frames,
        "dvae": F.mse_loss(output.dvae_reconstruction.float(), video, reduction="sum") / frames,
    }


def training_losses(
    model: STEVE,
    video: Tensor,
    step: int,
    *,
    noise_seeds: Sequence[int],
    seed: int,
    temperature_steps: int = 30_000,
) -> dict[str, Tensor]:
    """The losses of a video `(B, T, 3, H, W)` in [0, 1] at a step.

    noise_seeds: of the initial slots, one a clip. seed: of the tokens. temperature_steps: within which the dVAE's
    codes become hard, see `steve_temperature`.
    """
    output = model(
        video,
        noise_seeds=noise_seeds,
        draws=draw_tokens(model, video.shape[0] * video.shape[1], seed),
        temperature=steve_temperature(step, temperature_steps),
    )
    return losses(output, video)
