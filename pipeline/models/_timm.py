"""The one place that imports timm, and the work-around that this sometimes needs.

timm imports torchvision. Some package registries offer torchvision only as a CUDA build; beside a
CPU build of torch its compiled operators fail to load, and `import torchvision` then dies with
"operator torchvision::nms does not exist" before timm is reached. We use no torchvision operator,
so declaring the two missing names is enough. It is done only after that very error: declaring them
beside a working torchvision would make *its* registration fail.
"""

from __future__ import annotations

import sys
import threading
from types import ModuleType

import torch

_importing = threading.Lock()
_declared: torch.library.Library | None = None  # the declarations live as long as this object


def _declare_torchvision_operators() -> None:
    global _declared
    if _declared is None:
        _declared = torch.library.Library("torchvision", "DEF")
        _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def import_timm() -> ModuleType:
    """Returns the `timm` module, also where torchvision's compiled operators can't be loaded."""
    with _importing:
        try:
            import timm
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise
            # A failed import leaves half-initialised modules behind; start again without them.
            for name in [n for n in sys.modules if n.split(".")[0] in ("torchvision", "timm")]:
                del sys.modules[name]
            _declare_torchvision_operators()
            import timm
        return timm
