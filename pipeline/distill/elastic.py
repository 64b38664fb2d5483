"""Ray Train's elastic worker groups, of sizes that share a batch equally.

Ray starts as many workers as there is room for, whatever their number. No public setting holds it to some numbers, so
that this reaches into its own parts, as they are in Ray 2.60.
"""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from pipeline.config.training import equal_shares


class EqualShares(ElasticScalingPolicy):
    """As many workers as there is room for and as share a batch equally, within those of the `ScalingConfig`."""

    def __init__(self, scaling_config: ScalingConfig, batch_size: int) -> None:
        super().__init__(scaling_config)
        self._batch_size = batch_size

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        return equal_shares(self._batch_size, super()._count_possible_workers(reserved_resources))


class ElasticTrainer(TorchTrainer):
    """A `TorchTrainer` whose groups have the sizes of `EqualShares`."""

    def __init__(self, *arguments: Any, batch_size: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._batch_size = batch_size

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        scaling: Any = self.scaling_config
        policy = EqualShares(scaling, self._batch_size)
        return super()._initialize_and_run_controller(**{**options, "scaling_policy": policy})
