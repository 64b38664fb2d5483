"""Products of 32 bits that are computed with 32 bits, whatever the GPU offers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """A block, or a function that it decorates, whose products and convolutions on a GPU are whole fp32.

    TF32 keeps 10 bits of the factors. PyTorch allows it in convolutions, and so in a ViT's patches: targets would be
    off by 1e-3, differently on another GPU or in a batch of another size.
    """
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)
