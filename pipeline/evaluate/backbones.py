"""A frozen backbone that many models have, held once, and its features of the same frames computed once.

The students of a sweep share a backbone, which is most of their memory and most of the time that scoring one takes.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.models.backbone import Backbone
from pipeline.models.export import hash_weights

FEATURES_LIMIT = 1 << 30  # bytes; what was read least recently is forgotten first


class SharedBackbones:
    """Gives models with equal backbones one of them, which remembers what it gave for which pixels.

    The features are those that each would compute, to the last bit.
    """

    def __init__(self, limit: int = FEATURES_LIMIT) -> None:
        self._limit = limit
        self._held = 0
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()
        self._backbones: dict[str, Backbone] = {}

    def share(self, model: torch.nn.Module) -> None:
        """Puts the first of equal backbones into a model, if it has any."""
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, Backbone):
                    setattr(module, name, self._first_of(child))

    def _first_of(self, backbone: Backbone) -> Backbone:
        whose = f"{backbone.config} {hash_weights(backbone)}"
        if whose not in self._backbones:
            backbone.remember = self._memory_of(whose)
            self._backbones[whose] = backbone
        return self._backbones[whose]

    def _memory_of(self, whose: str) -> Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]:
        def remember(images_MCHW: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
            if (
                images_MCHW.device.type != "cpu"
            ):  # a GPU computes faster than pixels are copied to be looked up
                return compute(images_MCHW)
            pixels = hashlib.blake2b(images_MCHW.contiguous().numpy().data, digest_size=16)
            pixels.update(f"{whose} {tuple(images_MCHW.shape)} {images_MCHW.dtype}".encode())
            key = pixels.digest()
            if key not in self._features:
                self._keep(key, compute(images_MCHW))
            self._features.move_to_end(key)
            return self._features[key]

        return remember

    def _keep(self, key: bytes, features: Tensor) -> None:
        self._features[key] = features
        self._held += features.nbytes
        while self._held > self._limit and len(self._features) > 1:
            _, forgotten = self._features.popitem(last=False)
            self._held -= forgotten.nbytes
