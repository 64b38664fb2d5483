"""What a training run is, and how its models are built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pipeline import storage
from pipeline.config import Config, ConfigError, Distill, Model, TeacherTraining, Training
from pipeline.distill.objective import TrainingObjective
from pipeline.distill.step import Objective, Terms
from pipeline.distill.systems import OBJECTIVES
from pipeline.models import BackboneSource, SlotModel, VideoSegmenter
from pipeline.models.build import build_student, copies_initial_slots, load_teacher, seeded
from pipeline.models.build_teachers import build_teacher
from pipeline.models.segmenter import SegmenterConfig
from pipeline.models.slim import STORE_FOLDER

OnValidation = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Run:
    """What one training run needs to know; travels to every worker.

    Made by `Run.student` and `Run.teacher`: all that differs between the two is decided there.
    """

    kind: Literal["student", "teacher"]
    stage: str  # the job that trains it
    config: Config
    settings: Training  # the config's section that says how
    terms: Terms
    builder: Callable[[Run], tuple[TrainingObjective, VideoSegmenter | None]]  # of `build`
    uri: str
    clips_uri: str
    targets_uri: str | None = None
    features_uri: str | None = None  # of the backbone's stored features, which are read instead of the frames
    teacher_uri: str | None = None
    teacher_config: SegmenterConfig | None = None  # gives the sizes that the student leaves open
    views: int | None = None  # that each clip has; None: a new one in every epoch
    bound_every: int = 0  # steps between measurements of Theorem 1; 0: never
    slim: BackboneSource | None = None  # of models that are saved without their frozen backbone
    public_checkpoint: bool = False  # whether the model is published in the public layout as well
    name: str = ""  # the user's
    title: str = ""  # what a sweep calls it
    workers: int | tuple[int, int] = 0  # as the machines have them; see `Training.workers`
    validation_uri: str | None = None  # the clips that `validate_every` scores on
    mlflow_run: str | None = None

    @classmethod
    def student(
        cls,
        config: Config,
        uri: str,
        clips_uri: str,
        *,
        targets_uri: str | None,
        teacher_uri: str | None,
        teacher_config: SegmenterConfig | None,
        features_uri: str | None = None,
        title: str = "",
    ) -> Run:
        """Distillation into a student, from cached targets or a live teacher; or training without one."""
        settings = config.distill
        return cls(
            kind="student",
            stage="distill",
            config=config,
            settings=settings,
            terms=student_terms(settings),
            builder=_build_student,
            uri=uri,
            clips_uri=clips_uri,
            targets_uri=targets_uri,
            features_uri=features_uri,
            teacher_uri=teacher_uri,
            teacher_config=teacher_config,
            views=None if settings.fresh_views else config.targets.views,
            slim=_slim(config, config.student),
            bound_every=settings.measure_bound_every if settings.distils else 0,
            name=settings.name,
            title=title,
        )

    @classmethod
    def teacher(cls, config: Config, uri: str, clips_uri: str, *, features_uri: str | None = None) -> Run:
        """Training of a teacher on the clips alone."""
        return cls(
            kind="teacher",
            stage="teacher",
            config=config,
            settings=config.teacher.train,
            terms=teacher_terms(config.teacher.train),
            builder=_build_teacher,
            uri=uri,
            clips_uri=clips_uri,
            features_uri=features_uri,
            views=config.targets.views,
            slim=_slim(config, config.teacher),
            public_checkpoint=config.teacher.save == "whole",  # which holds the backbone
        )

    @property
    def section(self) -> Model:
        """The config's section that says which model."""
        return self.config.teacher if self.kind == "teacher" else self.config.student

    @property
    def has_teachers_slots(self) -> bool:
        """Whether its initial slots are a teacher's, as `build_student` copies them."""
        if self.teacher_uri is None or self.teacher_config is None:
            return False
        return copies_initial_slots(self.config, self.teacher_config)

    @property
    def label(self) -> str:
        """What messages call it."""
        name = self.title or self.name
        return f"{self.stage} ({name})" if name else self.stage

    @property
    def run_name(self) -> str:
        """What MLflow calls it, where it has no title."""
        return self.name or f"{self.kind}-{storage.name(self.uri)[:8]}"


def _slim(config: Config, section: Model) -> BackboneSource | None:
    """Where the backbone of a model that is saved without it comes from, and is kept."""
    if section.save == "whole":
        return None
    weights = section.backbone_weights
    place = weights if weights in ("timm", "random") else storage.absolute(weights)
    store = storage.join(storage.absolute(config.storage.root), STORE_FOLDER)
    return BackboneSource(place, store)


def build(run: Run) -> tuple[TrainingObjective, VideoSegmenter | None]:
    """What is trained for, with the model to train, and the teacher where it runs live.

    Raises:
        ConfigError: sizes that don't fit, weights that can't be had, or a teacher that does not give what
            the method needs.
    """
    return run.builder(run)


def _build_teacher(run: Run) -> tuple[TrainingObjective, None]:
    model, section = build_teacher(run.config), run.config.teacher
    if section.system in OBJECTIVES:
        return OBJECTIVES[section.system](model, section), None
    assert isinstance(model, SlotModel)
    try:
        return Objective(model, run.terms, decoder_rate=_decoder_rate(run)), None
    except ValueError as error:
        raise ConfigError(f"teacher: {error}") from error


def _decoder_rate(run: Run) -> float:
    own = run.settings.decoder_learning_rate
    return 1.0 if own is None else own / run.settings.learning_rate


def _check_components(student: SlotModel, teacher: SlotModel) -> None:
    """A fitted student that has its teacher's initial slots: they lie in the components of the teacher's features.

    Raises:
        ConfigError: the student's features are known to be others.
    """
    own, other = student.config.backbone, teacher.config.backbone
    sizes = [model.encoder.backbone.feature_size for model in (student, teacher)]
    named = own.name and other.name and own.name != other.name
    if named or own.blocks != other.blocks or sizes[0] != sizes[1]:
        raise ConfigError(
            f"student.initialisation: fitted, with initial slots from the teacher, which lie in the features of "
            f"{other.label} and not of {own.label}; nearest valid: soft_kmeans, or "
            "distill.initial_slots_from_teacher=false"
        )


def _check_teachers_start(run: Run, student: SlotModel) -> None:
    """A student with `initialisation: teacher`: what `start_as_teacher` needs, before all that it waits for.

    Raises:
        ConfigError: no teacher to start from, or one whose slot attention has other parts.
    """
    if not run.has_teachers_slots:
        raise ConfigError(
            "student.initialisation: teacher starts from a teacher's slots, which must be of SlotContrast's kind and "
            "of the student's slot_size; nearest valid: student.initialisation=soft_kmeans"
        )
    assert run.teacher_config is not None
    for key in ("corrector_mlp", "predictor"):
        own, other = getattr(student.config, key), getattr(run.teacher_config, key)
        if own != other:
            raise ConfigError(
                f"student.{key}: {own} differs from the teacher's {other}, whose slot attention the student starts "
                f"with (student.initialisation=teacher); nearest valid: {other}"
            )


def _build_student(run: Run) -> tuple[TrainingObjective, VideoSegmenter | None]:
    config, settings = run.config, run.config.distill
    teacher = None
    if run.teacher_uri is not None:
        teacher = load_teacher(config, run.teacher_uri).requires_grad_(False)
    student = build_student(config, teacher=teacher or run.teacher_config, seed=settings.seed)
    if config.student.initialisation == "fitted" and run.has_teachers_slots:
        assert isinstance(teacher, SlotModel)
        _check_components(student, teacher)
    if config.student.initialisation == "teacher":
        _check_teachers_start(run, student)
    student.decoder.fast = settings.fast_decoder
    try:
        with seeded(settings.seed):
            objective = Objective(
                student,
                run.terms,
                teacher=teacher if settings.distils else None,
                decoder_rate=_decoder_rate(run),
            )
    except ValueError as error:
        raise ConfigError(f"distill.method={settings.method}: {error}") from error
    if run.bound_every and objective.teacher_decoder is None:
        raise ConfigError(
            "distill.measure_bound_every: the teacher's decoder reconstructs no features, which Theorem 1 compares; "
            "nearest valid: 0"
        )
    return objective, teacher if settings.distils and settings.live_teacher else None


def teacher_terms(settings: TeacherTraining) -> Terms:
    """What a teacher is trained for."""
    return Terms(
        **_common_terms(settings),
        reconstruction=settings.reconstruction,
        similarity=settings.similarity,
        similarity_temperature=settings.similarity_temperature,
        similarity_threshold=settings.similarity_threshold,
    )


def student_terms(settings: Distill) -> Terms:
    """What a student is trained for, by `distill.method`."""
    slot_losses = {"slotmatch_mse": "mse", "slotmatch_hungarian": f"hungarian_{settings.matching}"}
    return Terms(
        **_common_terms(settings),
        slot_kd=settings.beta if settings.distils_slots else 0.0,
        slot_loss=slot_losses.get(settings.method, "cosine"),
        reconstruction_kd=settings.reconstruction_kd_weight if settings.distils_reconstruction else 0.0,
        feature_kd=settings.feature_kd_weight if settings.method == "feature_kd" else 0.0,
        slot_map=settings.slot_map and settings.distils and settings.method != "feature_kd",
    )


def _common_terms(settings: Training) -> dict[str, Any]:
    contrast = settings.contrast
    return {
        "alpha": settings.alpha,
        "temperature": settings.temperature,
        "contrast_shares": contrast if isinstance(contrast, int) else int(contrast == "global"),
    }
