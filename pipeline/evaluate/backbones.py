"""A frozen backbone's features of the same frames, computed once for all that read them.

The students of a sweep share a backbone, which is most of their memory and most of the time that scoring one takes; a
student that validates itself while it trains sees the same frames each time.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pipeline.models.backbone import Backbone
from pipeline.models.export import hash_weights

MODELS_LIMIT = 1 << 30  # bytes of features for scoring many models
VALIDATION_LIMIT = 1 << 29  # beside a training


class FeatureMemory:
    """What backbones gave for which pixels, to the last bit; what was read least recently is forgotten first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()

    def of(self, whose: str = "") -> Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]:
        """A `Backbone.remember`; backbones with one name share what they give."""

        def remember(images_MCHW: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
            # A GPU computes faster than pixels are copied to be looked up.
            if images_MCHW.device.type != "cpu":
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


@contextlib.contextmanager
def remembering(model: torch.nn.Module, memory: FeatureMemory) -> Iterator[None]:
    """A model whose frozen backbone asks that memory first, within the block."""
    backbones = [module for module in model.modules() if isinstance(module, Backbone)]
    for backbone in backbones:
        backbone.remember = memory.of()
    try:
        yield
    finally:
        for backbone in backbones:
            backbone.remember = None


class SharedBackbones:
    """Gives models with equal backbones one of them, which remembers what it gave."""

    def __init__(self) -> None:
        self._memory = FeatureMemory(MODELS_LIMIT)
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
            backbone.remember = self._memory.of(whose)
            self._backbones[whose] = backbone
        return self._backbones[whose]
