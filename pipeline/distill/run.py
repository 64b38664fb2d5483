"""What a training run is, and how its models are built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.config.sections import Config, ConfigError, Distill, TeacherTraining, Training
from pipeline.distill.step import Objective, Terms
from pipeline.models.build import build_student, build_teacher, load_teacher, seeded
from pipeline.models.slot_model import SlotModel, SlotModelConfig

OnValidation = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class TrainingSpec:
    """What one training run needs to know; travels to every worker."""

    config: Config
    role: str  # "student" or "teacher"
    run_uri: str
    clips_uri: str
    targets_uri: str | None = None
    teacher_uri: str | None = None
    teacher_config: SlotModelConfig | None = None  # gives the sizes that the student leaves open
    validation_uri: str | None = None  # the clips that `validate_every` scores on
    mlflow_run: str | None = None
    title: str = ""  # what a sweep calls it

    @property
    def settings(self) -> Training:
        return self.config.distill if self.role == "student" else self.config.teacher.train

    @property
    def label(self) -> str:
        name = self.title or (self.config.distill.name if self.role == "student" else "")
        return f"{'distill' if self.role == 'student' else 'teacher'}{f' ({name})' if name else ''}"


def build(spec: TrainingSpec) -> tuple[Objective, SlotModel | None]:
    """What is trained for, with the model to train, and the teacher where it runs live.

    Raises:
        ConfigError: sizes that don't fit, weights that can't be had, or a teacher that does not give what
            the method needs.
    """
    config, settings = spec.config, spec.settings
    if isinstance(settings, Distill):
        return _build_distillation(spec, settings)
    try:
        return Objective(build_teacher(config), terms(settings)), None
    except ValueError as error:
        raise ConfigError(f"teacher: {error}") from error


def _build_distillation(spec: TrainingSpec, settings: Distill) -> tuple[Objective, SlotModel | None]:
    config = spec.config
    teacher = None
    if spec.teacher_uri is not None:
        teacher = load_teacher(config, spec.teacher_uri).requires_grad_(False)
    student = build_student(config, teacher=teacher or spec.teacher_config, seed=settings.seed)
    student.decoder.fast = settings.fast_decoder
    try:
        with seeded(settings.seed):
            objective = Objective(student, terms(settings), teacher=teacher if settings.distils else None)
    except ValueError as error:
        raise ConfigError(f"distill.method={settings.method}: {error}") from error
    if settings.distils and settings.measure_bound_every and objective.teacher_decoder is None:
        raise ConfigError(
            "distill.measure_bound_every: the teacher's decoder reconstructs no features, which Theorem 1 compares; "
            "nearest valid: 0"
        )
    return objective, teacher if settings.distils and settings.live_teacher else None


def terms(settings: Training) -> Terms:
    """What a training section asks to be trained for."""
    common: dict[str, Any] = {"alpha": settings.alpha, "temperature": settings.temperature}
    if isinstance(settings, TeacherTraining):
        return Terms(
            **common,
            reconstruction=settings.reconstruction,
            similarity=settings.similarity,
            similarity_temperature=settings.similarity_temperature,
            similarity_threshold=settings.similarity_threshold,
        )
    assert isinstance(settings, Distill)
    slot_losses = {"slotmatch_mse": "mse", "slotmatch_hungarian": f"hungarian_{settings.matching}"}
    return Terms(
        **common,
        slot_kd=settings.beta if settings.distils_slots else 0.0,
        slot_loss=slot_losses.get(settings.method, "cosine"),
        reconstruction_kd=settings.reconstruction_kd_weight if settings.distils_reconstruction else 0.0,
        feature_kd=settings.feature_kd_weight if settings.method == "feature_kd" else 0.0,
        slot_map=settings.slot_map and settings.distils and settings.method != "feature_kd",
    )
