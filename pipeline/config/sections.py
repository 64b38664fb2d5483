"""The keys, their types and defaults; each default that the paper gives is the paper's."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class ConfigError(ValueError):
    """A config that can't be run; the message has one line per problem."""


_BOOLEAN = (bool, bool | None)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation not in _BOOLEAN:
            raise PydanticCustomError("bool", "a number or text")
        return value


GENERATED_SPLITS = ("train", "validation", "test")


class Synthetic(Section):
    """Generated videos (`dataset.kind: synthetic`): real H.264 files with instance masks."""

    videos: PositiveInt = 400
    validation_videos: PositiveInt = 60
    test_videos: PositiveInt = 60
    frames: PositiveInt = 24
    size: Annotated[int, Field(ge=16, multiple_of=2)] = 96  # pixels
    seed: NonNegativeInt = 0


class Dataset(Section):
    # The layout; what each has below `path` is in the README and in pipeline/clips/sources/.
    kind: Literal["videos", "synthetic", "davis", "ytvis", "ovis", "movi", "coco", "webdataset"] = "videos"
    name: str = ""  # as in tables, "MOVi-E"; the kind where it is empty
    path: str | None = None  # a folder; for data sets in a public layout s3://bucket/prefix too
    split: str = ""  # what to train on, of videos a sub-folder; a slice of it: train[:-300]
    resolution: str = "480p"  # of DAVIS
    masks: str = "masks"  # of videos: sub-folder of label PNGs, masks/<video>/<frame>.png, optional
    seed: NonNegativeInt = 0  # decides the views of each clip
    synthetic: Synthetic = Synthetic()

    @property
    def title(self) -> str:
        return self.name or self.kind


class Clips(Section):
    clip_frames: PositiveInt = 4
    short_side: PositiveInt | None = None  # pixels; None keeps the size
    fps: PositiveFloat | None = None  # None keeps every frame; frames without a clock count as seconds
    max_seconds: PositiveFloat | None = None  # of each video
    codec: Literal["jpeg", "png", "raw"] = "jpeg"
    quality: Annotated[int, Field(ge=1, le=100)] = 95  # of JPEG
    videos_per_shard: PositiveInt = 16
    row_group_mb: PositiveFloat = 1.0
    max_bad_fraction: Fraction = 0.1  # of the videos; more than that fails the job


class ViT(Section):
    """A plain vision transformer that has no timm name."""

    patch_size: PositiveInt
    embed_dim: PositiveInt
    depth: PositiveInt
    num_heads: PositiveInt


class Model(Section):
    backbone: str | ViT = "vit_small_patch14_dinov2"  # a timm name, or a ViT's dimensions
    backbone_weights: str = "timm"  # "timm" (the hub), "random", or a local file
    image_size: PositiveInt = 336
    num_slots: Annotated[int, Field(ge=1, le=256)] | None = None  # labels are bytes
    slot_size: PositiveInt | None = None
    initial_slots: Literal["learned", "random"] = "learned"
    initialisation: Literal["default", "soft_kmeans"] = "default"  # of what trains; the paper's: default
    corrector_mlp: bool = True  # in slot attention; VideoSAUR has none
    predictor: bool = True  # False: an image model such as DINOSAUR, which sees each frame on its own
    decoder: Literal["mlp", "slot_mixer"] = "mlp"  # the slot mixer is VideoSAUR's
    decoder_hidden_sizes: tuple[PositiveInt, ...] = (1024, 1024, 1024)
    decoder_blocks: PositiveInt = 3  # transformer blocks of the slot mixer
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)

    @property
    def decoder_outputs(self) -> tuple[str, ...]:
        """What the decoder gives, as in `SlotModelConfig`."""
        return ("features",)

    @property
    def patch_size(self) -> int | None:
        if isinstance(self.backbone, ViT):
            return self.backbone.patch_size
        match = re.search(r"patch(\d+)", self.backbone)
        return int(match[1]) if match else None


class Training(Section):
    """One run of the training loop; defaults are the paper's (Table 8, MOVi-E)."""

    steps: PositiveInt = 300_000
    batch_size: PositiveInt = 16  # clips a step, over all workers
    learning_rate: PositiveFloat = 4e-4
    warmup_steps: NonNegativeInt = 2500
    gradient_clip: PositiveFloat = 0.05
    alpha: NonNegativeFloat = 1.0  # weight of the slot-slot contrastive loss
    temperature: PositiveFloat = 0.1
    seed: NonNegativeInt = 42
    workers: NonNegativeInt = 1  # 0: in this process, for tests
    cpus_per_worker: PositiveFloat = 0.8  # on a small machine leave some for Ray's own work
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on GPUs, fp32 on CPUs
    loader_threads: PositiveInt = 2
    log_every: PositiveInt = 50
    checkpoint_every: PositiveInt = 1000
    validate_every: NonNegativeInt = 0  # steps; scores a few videos of evaluate.split; 0: never
    keep_checkpoints: PositiveInt = 2
    overlays: PositiveInt = 4  # mask pictures in MLflow over the run, the last one at its end
    max_failures: NonNegativeInt = 3  # restarts of the worker group before the job gives up


class TeacherTraining(Training):
    """SlotContrast's objective; with `similarity: 0.1` and `alpha: 0` VideoSAUR's."""

    reconstruction: NonNegativeFloat = 1.0  # weight of feature reconstruction; VideoSAUR for MOVi: 0
    similarity: NonNegativeFloat = 0.0  # weight of the temporal-similarity loss; needs decoder: slot_mixer
    similarity_temperature: PositiveFloat = 0.075  # VideoSAUR: MOVi; 0.25 YTVIS, 0.15 with DINOv2
    similarity_threshold: Annotated[float, Field(ge=-1, le=1)] = 0.0  # cosines below it don't count


class Teacher(Model):
    """`num_slots` and `slot_size` left empty are the checkpoint's; of a teacher that is trained here see `sizes`.

    A public file does not tell its ViT's heads, its normalisation and, where initial slots are drawn, their
    number: `num_heads`, `mean`, `std` and `num_slots` do.
    """

    name: str = "SlotContrast"  # in tables
    checkpoint: str | None = None  # a public file or a model folder; None: `jobs.teacher` trains one
    num_heads: PositiveInt | None = None  # of a public file's ViT; None: width / 64
    backbone: str | ViT = "vit_base_patch14_dinov2"
    train: TeacherTraining = TeacherTraining()

    @property
    def decoder_outputs(self) -> tuple[str, ...]:
        weights = {"features": self.train.reconstruction, "similarity": self.train.similarity}
        return tuple(name for name, weight in weights.items() if weight)

    @property
    def sizes(self) -> dict[str, int]:
        """`num_slots` and `slot_size` of a teacher that is trained here; the paper's for MOVi-E by default.

        Not defaults of the keys themselves, which would count as said of every public file.
        """
        return {"num_slots": self.num_slots or 15, "slot_size": self.slot_size or 128}


class Student(Model):
    """`num_slots` and `slot_size` left empty are the teacher's."""


class Targets(Section):
    views: PositiveInt = 1  # view 0 is the centre crop without a flip
    crop: Literal["center", "random"] = "center"  # of views 1, 2, …
    min_scale: Annotated[float, Field(gt=0, le=1)] = 1.0  # smallest random crop, of the short side
    flip: Fraction = 0.5  # probability, of views 1, 2, …
    rollout: Literal["forward", "cyclic"] = "forward"
    student_features: bool = False  # also cache the student's frozen features: no ViT in training
    teacher_features: bool = False  # also cache the teacher's frozen features, which feature KD needs
    feature_dtype: Literal["float32", "float16"] = "float32"
    batch_size: PositiveInt = 8  # clips in one teacher pass
    verify: Fraction = 0.0  # share of the rows to compute again and compare


class Distill(Training):
    name: str = ""  # two runs that are equal but for the name are different runs
    method: Literal[
        "slotmatch",  # cosine, Eq. 2
        "slotmatch_mse",
        "slotmatch_hungarian",
        "slotmatch_reconstruction_kd",
        "reconstruction_kd",
        "feature_kd",
        "no_kd",  # needs no teacher
    ] = "slotmatch"
    beta: NonNegativeFloat = 0.2  # weight of the slot distillation loss
    reconstruction_kd_weight: PositiveFloat = 1.0
    feature_kd_weight: PositiveFloat = 1.0
    matching: Literal["clip", "frame"] = "clip"  # Hungarian: on a clip's first frame, or frame by frame
    slot_map: bool = False  # a learned linear map from the student's slots to the teacher's slot size
    initial_slots_from_teacher: bool | None = None  # copied at the start; None: with KD, where sizes agree
    live_teacher: bool = False  # run the teacher in every step instead of reading cached targets
    fresh_views: bool = False  # with a live teacher: a new view of every clip in every epoch
    measure_bound_every: NonNegativeInt = 0  # steps; with KD, logs Theorem 1's two sides; 0: never
    fast_decoder: bool = True

    @property
    def distils(self) -> bool:
        return self.method != "no_kd"

    @property
    def distils_slots(self) -> bool:
        return self.method.startswith("slotmatch")

    @property
    def distils_reconstruction(self) -> bool:
        return self.method.endswith("reconstruction_kd")


PAPER_BETAS = (0.1, 0.2, 0.3, 0.5, 0.8)


class Sweep(Section):
    """Which students `jobs.sweep` trains and compares; as it is, those of the paper's Table 4.

    Every setting is trained from every seed on the same clips. Settings are the crossed values of the grid,
    `grid: {distill.beta: [0.1, 0.2], targets.views: [1, 4]}`, or random draws from it; or `variants`, which have
    names of their own and are used instead of the grid:
    `variants: {no KD: {distill.method: no_kd}, K = 4: {targets.views: 4}}`.
    """

    # Key -> values; for `search: random` also ranges {low: 1e-4, high: 1e-2, log: true}.
    grid: dict[str, Any] = {"distill.beta": list(PAPER_BETAS)}
    variants: dict[str, dict[str, Any]] = {}
    seeds: tuple[NonNegativeInt, ...] = (42, 101, 2048)  # of distill.seed
    search: Literal["grid", "random"] = "grid"
    samples: PositiveInt = 10  # settings that a random search draws
    seed: NonNegativeInt = 0  # of these draws
    asha: bool = False  # stops what scores badly (`evaluate.score`) early; needs distill.validate_every
    grace_steps: PositiveInt | None = None  # that ASHA leaves to all; None: a quarter of distill.steps
    reduction_factor: Annotated[float, Field(gt=1)] = 3.0  # of 3 trials ASHA lets one go on
    max_concurrent: PositiveInt | None = None  # trials at a time; None: as many as fit the cluster
    register_students: bool = True  # all that finished; the chosen one contends for champion


class Evidence(Section):
    """How `jobs.evidence` scores a sweep's students once more, on videos that nothing was chosen on."""

    split: str | None = None  # with masks; neither dataset.split nor evaluate.split
    scores: tuple[Literal["image_fg_ari", "image_mbo", "video_fg_ari", "video_mbo"], ...] = (
        "video_mbo",
        "video_fg_ari",
    )
    claims: tuple[str, ...] = ()  # orderings to hold against the scores, "SlotMatch > no KD"
    document: str | None = None  # a Markdown file whose marked block is replaced by the tables


class Evaluate(Section):
    """What is scored and how; a rule left empty is the protocol's (see pipeline/protocols.py)."""

    split: str | None = None  # the videos with masks to score on; None: nothing to score
    model: str | None = None  # a folder, a public file or models:/NAME@ALIAS; None: this config's student
    protocol: Literal["paper", "slotcontrast", "videosaur"] = "slotcontrast"
    clip_frames: NonNegativeInt | None = None  # 0: whole videos
    mask_size: NonNegativeInt | None = None  # pixels; 0: as the clips are
    crop: Literal["central", "full"] | None = None
    background: Literal["ignore", "object"] | None = None
    ignore_overlaps: bool | None = None
    rollout: Literal["forward", "cyclic"] | None = None
    masks: Literal["decoder", "attention"] | None = None
    score: Literal["image_fg_ari", "image_mbo", "video_fg_ari", "video_mbo"] = "video_mbo"
    teacher: bool = True  # score the teacher as well
    baselines: bool = True  # and trivial segmentations
    validation_videos: PositiveInt = 8  # that `validate_every` of a training looks at


class MLflow(Section):
    tracking_uri: str | None = None  # None: $MLFLOW_TRACKING_URI, else SQLite under storage.root
    experiment: str = "slotmatch"
    model_name: str = "slotmatch"


class Ray(Section):
    address: str | None = None  # None: $RAY_ADDRESS, else a local Ray
    num_cpus: PositiveInt | None = None  # of a local Ray
    gpus: NonNegativeInt = (
        0  # to ask an autoscaling cluster for, and to wait for; 0: use those that are there
    )
    teacher_cpus: PositiveFloat = 0.8  # a cache or evaluation actor on machines without GPUs


class Storage(Section):
    root: str = "runs"  # a folder or s3://bucket/prefix


class Config(Section):
    dataset: Dataset = Dataset()
    clips: Clips = Clips()
    teacher: Teacher = Teacher()
    student: Student = Student()
    targets: Targets = Targets()
    distill: Distill = Distill()
    sweep: Sweep = Sweep()
    evidence: Evidence = Evidence()
    evaluate: Evaluate = Evaluate()
    mlflow: MLflow = MLflow()
    ray: Ray = Ray()
    storage: Storage = Storage()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @property
    def tracking_uri(self) -> str:
        if self.mlflow.tracking_uri:
            return self.mlflow.tracking_uri
        if os.environ.get("MLFLOW_TRACKING_URI"):
            return os.environ["MLFLOW_TRACKING_URI"]
        if "://" in self.storage.root:
            raise ConfigError(
                f"mlflow.tracking_uri: must be set when storage.root is remote ({self.storage.root}); "
                "for a local SQLite file: mlflow.tracking_uri=sqlite:///mlflow.db"
            )
        return f"sqlite:///{Path(self.storage.root).absolute() / 'mlflow.db'}"


def parse_split(text: str) -> tuple[str, slice]:
    """A split's name and which of its videos are meant, as in TFDS: `val`, `train[:-300]`, `[10:20]`.

    Raises ValueError for anything else in brackets.
    """
    match = re.fullmatch(r"([^\[\]]*)(?:\[(-?\d+)?:(-?\d+)?\])?", text)
    if match is None:
        raise ValueError(
            f"{text!r} is no split or slice of one; valid: 'train[:-300]', 'train[-300:]', 'val'"
        )
    start, stop = (int(bound) if bound else None for bound in match.groups()[1:])
    return match[1], slice(start, stop)
