"""STEVE's discrete VAE: a picture as a grid of tokens, one for every 4 x 4 pixels, and back.

Shapes: M frames, V the vocabulary, h x w the grid of tokens, 4h x 4w the picture. Modules have the names of the public
files.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKEN_SIDE = 4  # pixels
WIDTH = 64


class ConvReLU(nn.Module):
    """A convolution and a ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.m = nn.Conv2d(inputs, outputs, kernel, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.m(x))


def _doubled() -> list[nn.Module]:
    """Twice the rows and columns, each of four pixels from channels of its own."""
    return [
        ConvReLU(WIDTH, WIDTH, 3, padding=1),
        ConvReLU(WIDTH, WIDTH),
        ConvReLU(WIDTH, WIDTH),
        ConvReLU(WIDTH, 4 * WIDTH),
        nn.PixelShuffle(2),
    ]


class DVAE(nn.Module):
    """Pictures `(M, 3, 4h, 4w)` to logits of tokens `(M, V, h, w)`, and (soft) one-hot codes of that shape back."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            ConvReLU(3, WIDTH, TOKEN_SIDE, TOKEN_SIDE),
            *(ConvReLU(WIDTH, WIDTH) for _ in range(6)),
            nn.Conv2d(WIDTH, vocabulary, 1),
        )
        self.decoder = nn.Sequential(
            ConvReLU(vocabulary, WIDTH), *_doubled(), *_doubled(), nn.Conv2d(WIDTH, 3, 1)
        )


def gumbel(exponential: Tensor) -> Tensor:
    """Gumbel noise of draws from the exponential distribution of rate 1."""
    return -(exponential + torch.finfo(exponential.dtype).tiny).log()


def soft_codes(logits_MVHW: Tensor, exponential_MVHW: Tensor, temperature: float) -> Tensor:
    """A draw of each position's token, relaxed so that it has a gradient (Gumbel-softmax)."""
    return ((logits_MVHW.log_softmax(1) + gumbel(exponential_MVHW)) / temperature).softmax(1)


@torch.no_grad()
def hard_tokens(logits_MVHW: Tensor, exponential_MVHW: Tensor | None) -> Tensor:
    """A draw of each position's token, or the most likely one, `(M, h * w)` row by row."""
    scores = logits_MVHW if exponential_MVHW is None else logits_MVHW + gumbel(exponential_MVHW)
    return scores.argmax(1).flatten(1)


def one_hot_codes(tokens_MK: Tensor, vocabulary: int, side: int) -> Tensor:
    """Codes `(M, V, h, w)` of the tokens of square pictures, `side` of them a row."""
    return F.one_hot(tokens_MK, vocabulary).float().transpose(1, 2).unflatten(2, (side, side))
