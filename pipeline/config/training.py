"""The keys of a training run: of any, of a teacher's and of a student's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from pipeline.config.fields import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    run_detail,
)


def equal_shares(batch_size: int, most: int, fewest: int = 1) -> int:
    """The largest number of workers from `fewest` to `most` that share a batch equally; 0: there is none."""
    return max((n for n in range(fewest, most + 1) if batch_size % n == 0), default=0)


class Training(Section):
    """One run of the training loop; defaults are the paper's (Table 8, MOVi-E)."""

    steps: PositiveInt = 300_000
    """optimiser steps"""
    batch_size: PositiveInt = 16
    """clips a step, over all workers"""
    learning_rate: PositiveFloat = 4e-4
    """the peak, after the warm-up"""
    decoder_learning_rate: PositiveFloat | None = None
    """the decoder's peak; null: learning_rate"""
    warmup_steps: NonNegativeInt = 2500
    """steps in which the learning rate grows to its peak"""
    gradient_clip: PositiveFloat = 0.05
    """largest norm of the gradient"""
    alpha: NonNegativeFloat = 1.0
    """weight of the slot-slot contrastive loss"""
    temperature: PositiveFloat = 0.1
    """of the slot-slot contrastive loss"""
    seed: NonNegativeInt = 42
    """of the initial weights and the order of the clips"""
    contrast: Literal["global", "local"] | PositiveInt = "global"
    """the slots to contrast: of the whole batch, or each worker's alone; 2: as if there were two workers"""
    workers: NonNegativeInt | Literal["auto"] | tuple[PositiveInt, PositiveInt] = 1
    """Ray Train workers; auto: one a GPU, else one; [1, 8]: as many as there are at the time; 0: in this process"""
    cpus_per_worker: PositiveFloat = run_detail(0.8)
    """on a small machine leave some for Ray's own work"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the machine is good at it (GPUs from Ampere on, some CPUs), else fp32"""
    loader_threads: PositiveInt = run_detail(2)
    """threads of a worker that read clips and targets"""
    log_every: PositiveInt = run_detail(50)
    """steps between two records of the losses"""
    checkpoint_every: PositiveInt = run_detail(1000)
    """steps between two checkpoints"""
    validate_every: NonNegativeInt = run_detail(0)
    """steps; scores a few videos of evaluate.split; 0: never"""
    keep_checkpoints: PositiveInt = run_detail(2)
    """checkpoints that stay, the last ones"""
    overlays: PositiveInt = run_detail(4)
    """mask pictures in MLflow over the run, the last one at its end"""
    max_failures: NonNegativeInt = run_detail(3)
    """restarts of the worker group before the job gives up"""

    @field_validator("contrast", mode="before")
    @classmethod
    def _what_to_contrast(cls, value: Any) -> Any:
        if value in ("global", "local") or (type(value) is int and value >= 1):
            return value
        nearest = max(1, int(value)) if isinstance(value, int | float) else "global"
        raise PydanticCustomError(
            "contrast", f"global, local, or a number of shares; nearest valid: {nearest}"
        )

    @field_validator("workers", mode="before")
    @classmethod
    def _number_of_workers(cls, value: Any) -> Any:
        if value == "auto" or (type(value) is int and value >= 0):
            return value
        nearest = "auto"
        if isinstance(value, int | float):
            nearest = str(max(0, int(value)))
        elif isinstance(value, list | tuple) and len(value) == 2 and all(type(n) is int for n in value):
            if 1 <= value[0] <= value[1]:
                return value
            fewest, most = sorted(max(1, n) for n in value)
            nearest = f"[{fewest}, {most}]"
        raise PydanticCustomError(
            "workers", f"a number of workers, auto, or [fewest, most]; nearest valid: {nearest}"
        )

    @property
    def workers_vary(self) -> bool:
        """Whether the machines decide how many workers there are."""
        return not isinstance(self.workers, int)

    @property
    def fewest_workers(self) -> int:
        """That it can do with, and that share the batch equally; 0: in this process."""
        if isinstance(self.workers, int):
            return self.workers
        if self.workers == "auto":
            return 1
        fewest, most = self.workers
        return next((n for n in range(fewest, most + 1) if self.batch_size % n == 0), fewest)


class TeacherTraining(Training):
    """SlotContrast's objective; with `similarity: 0.1` and `alpha: 0` VideoSAUR's."""

    reconstruction: NonNegativeFloat = 1.0
    """weight of feature reconstruction; VideoSAUR for MOVi: 0"""
    similarity: NonNegativeFloat = 0.0
    """weight of the temporal-similarity loss; needs teacher.decoder=slot_mixer"""
    similarity_temperature: PositiveFloat = 0.075
    """VideoSAUR's for MOVi; YTVIS 0.25, with DINOv2 0.15"""
    similarity_threshold: Annotated[float, Field(ge=-1, le=1)] = 0.0
    """cosines below it don't count"""


class Distill(Training):
    """The student's training."""

    name: str = ""
    """two runs that are equal but for the name are different runs"""
    method: Literal[
        "slotmatch",  # cosine, Eq. 2
        "slotmatch_mse",
        "slotmatch_hungarian",
        "slotmatch_reconstruction_kd",
        "reconstruction_kd",
        "feature_kd",
        "no_kd",  # needs no teacher
    ] = "slotmatch"
    """what is drawn to the teacher's; see configs/methods/"""
    beta: NonNegativeFloat = 0.2
    """weight of the slot distillation loss"""
    reconstruction_kd_weight: PositiveFloat = 1.0
    """weight of the reconstruction distillation loss"""
    feature_kd_weight: PositiveFloat = 1.0
    """weight of the feature distillation loss"""
    matching: Literal["clip", "frame"] = "clip"
    """Hungarian: on a clip's first frame, or frame by frame"""
    slot_map: bool = False
    """learn a linear map from the student's slots to the teacher's slot size"""
    initial_slots_from_teacher: bool | None = None
    """copied at the start; null: with KD, where sizes agree"""
    live_teacher: bool = False
    """run the teacher in every step instead of reading cached targets"""
    fresh_views: bool = False
    """with a live teacher: a new view of every clip in every epoch"""
    measure_bound_every: NonNegativeInt = run_detail(0)
    """steps; with KD, logs Theorem 1's two sides; 0: never"""
    fast_decoder: bool = True
    """the MLP decoder's first layer once for slots and positions: exact, and faster"""

    @property
    def distils(self) -> bool:
        return self.method != "no_kd"

    @property
    def distils_slots(self) -> bool:
        return self.method.startswith("slotmatch")

    @property
    def distils_reconstruction(self) -> bool:
        return self.method.endswith("reconstruction_kd")
