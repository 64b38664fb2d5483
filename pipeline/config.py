"""Every knob of the pipeline, read from one YAML file plus `section.key=value` overrides.

`load_config` either returns a frozen `Config` or raises a `ConfigError` that names each wrong key, its
value and the nearest valid one. Nothing here touches a disk beyond the YAML file, or starts anything.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
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


class Synthetic(Section):
    """Generated videos (`dataset.kind: synthetic`): real H.264 files with instance masks."""

    videos: PositiveInt = 400
    validation_videos: PositiveInt = 60
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
    decoder_hidden_sizes: tuple[PositiveInt, ...] = (1024, 1024, 1024)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)

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


class Teacher(Model):
    name: str = "SlotContrast"  # in tables
    checkpoint: str | None = None  # a public file or a model folder; None: `jobs.teacher` trains one
    num_heads: PositiveInt | None = None  # of a public file's ViT; None: width / 64
    backbone: str | ViT = "vit_base_patch14_dinov2"
    num_slots: Annotated[int, Field(ge=1, le=256)] | None = 15
    slot_size: PositiveInt | None = 128
    train: Training = Training()


class Student(Model):
    """`num_slots` and `slot_size` left empty are the teacher's."""


class Targets(Section):
    views: PositiveInt = 1  # view 0 is the centre crop without a flip
    crop: Literal["center", "random"] = "center"  # of views 1, 2, …
    min_scale: Annotated[float, Field(gt=0, le=1)] = 1.0  # smallest random crop, of the short side
    flip: Fraction = 0.5  # probability, of views 1, 2, …
    rollout: Literal["forward", "cyclic"] = "forward"
    student_features: bool = False  # also cache the student's frozen features: no ViT in training
    feature_dtype: Literal["float32", "float16"] = "float32"
    batch_size: PositiveInt = 8  # clips in one teacher pass
    verify: Fraction = 0.0  # share of the rows to compute again and compare


class Distill(Training):
    name: str = ""  # two runs that are equal but for the name are different runs
    beta: NonNegativeFloat = 0.2  # weight of the slot distillation loss; 0 needs no teacher
    initial_slots_from_teacher: bool = True
    live_teacher: bool = False  # run the teacher in every step instead of reading cached targets
    fast_decoder: bool = True


PAPER_BETAS = (0.1, 0.2, 0.3, 0.5, 0.8)


class Sweep(Section):
    """Which students `jobs.sweep` trains and compares; as it is, those of the paper's Table 4.

    Every setting is trained from every seed on the same clips. Settings are the crossed values of the grid,
    `grid: {distill.beta: [0.1, 0.2], targets.views: [1, 4]}`, or random draws from it; or `variants`, which have
    names of their own and are used instead of the grid:
    `variants: {no KD: {distill.beta: 0}, K = 4: {targets.views: 4}}`.
    """

    # Key -> values; for `search: random` also ranges {low: 1e-4, high: 1e-2, log: true}.
    grid: dict[str, Any] = {"distill.beta": list(PAPER_BETAS)}
    variants: dict[str, dict[str, Any]] = {}
    seeds: tuple[NonNegativeInt, ...] = (42, 101, 2048)  # of distill.seed
    search: Literal["grid", "random"] = "grid"
    samples: PositiveInt = 10  # settings that a random search draws
    seed: NonNegativeInt = 0  # of these draws
    asha: bool = False  # stops what scores badly (`evaluate.score`) early; needs distill.validate_every
    grace_steps: PositiveInt | None = (
        None  # that ASHA leaves to every trial; None: a quarter of distill.steps
    )
    reduction_factor: Annotated[float, Field(gt=1)] = 3.0  # of 3 trials ASHA lets one go on
    max_concurrent: PositiveInt | None = None  # trials at a time; None: as many as fit the cluster
    register_students: bool = (
        True  # each finished one as a version, the chosen one as a contender for champion
    )


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
    evaluate: Evaluate = Evaluate()
    mlflow: MLflow = MLflow()
    ray: Ray = Ray()
    storage: Storage = Storage()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @property
    def num_slots(self) -> int | None:
        return self.student.num_slots or self.teacher.num_slots

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


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML config and applies overrides of the form `section.key=value`.

    Raises:
        ConfigError: no such file, not YAML, or any key or value that can't be used.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {str(path)!r} can't be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r} is not YAML: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"config file {str(path)!r} must hold sections, not {type(values).__name__}")
    return _with_absolute_paths(resolve_config(values, overrides))


def _with_absolute_paths(config: Config) -> Config:
    """The config with local paths made absolute: Ray's workers run in other folders than the job."""

    def absolute(path: str | None) -> str | None:
        return path if path is None or "://" in path else str(Path(path).expanduser().absolute())

    values = config.model_dump(mode="json")
    values["dataset"]["path"] = absolute(config.dataset.path)
    values["teacher"]["checkpoint"] = absolute(config.teacher.checkpoint)
    values["storage"]["root"] = absolute(config.storage.root)
    if not (config.evaluate.model or "").startswith("models:/"):
        values["evaluate"]["model"] = absolute(config.evaluate.model)
    for name in ("teacher", "student"):
        weights = values[name]["backbone_weights"]
        values[name]["backbone_weights"] = weights if weights in ("timm", "random") else absolute(weights)
    uri = config.mlflow.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri and uri.startswith("sqlite:///"):
        uri = "sqlite:///" + str(absolute(uri.removeprefix("sqlite:///")))
    values["mlflow"]["tracking_uri"] = uri  # as the job's environment has it, for workers that have another
    return Config.model_validate(values)


def resolve_config(values: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """A `Config` from nested plain values and overrides; errors as in `load_config`."""
    # A section is None where all that is below its name is commented out.
    values = {k: v for k, v in copy.deepcopy(values).items() if v is not None}
    for override in overrides:
        _apply_override(values, override)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        # A union complains once for each of its members; a mapping was never meant to be a name.
        errors = [e for e in error.errors() if not (e["loc"][-1] == "str" and isinstance(e["input"], dict))]
        raise ConfigError("\n".join(map(_explain, errors))) from None
    problems = [*_check_dataset(config), *_check_models(config), *_check_combinations(config)]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or "." not in key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        value = text
    _assign(values, key, value, override)


def _assign(values: dict[str, Any], key: str, value: Any, override: str) -> None:
    *sections, last = key.split(".")
    node = values
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
    node[last] = value


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """The same config with other values under some keys (`distill.beta`); errors as in `load_config`."""
    values = config.model_dump(mode="json")
    for key, value in overrides.items():
        if "." not in key:
            raise ConfigError(f"{key}: is not of the form section.key")
        _assign(values, key, copy.deepcopy(value), key)
    return _with_absolute_paths(resolve_config(values))


def _explain(error: Any) -> str:
    """One line for one pydantic error: the key, the value, and what would be valid."""
    location = [part for part in error["loc"] if part not in ("str", "ViT")]
    key = ".".join(str(part) for part in location)
    value, kind, limits = error.get("input"), error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        names = _field_names(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.4)
        prefix = ".".join(str(part) for part in location[:-1])
        hint = f"did you mean {'.'.join(filter(None, [prefix, near[0]]))!r}?" if near else ""
        return f"{key}: unknown key (value {value!r}); {hint or 'valid: ' + ', '.join(names)}"
    if kind == "invalid_key":
        return f"{key}: keys must be text"
    if kind == "model_type":
        return f"{key}: {value!r} is not a section of keys and values"
    if kind == "literal_error":
        valid = re.findall(r"'([^']*)'", str(limits.get("expected", "")))
        near = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.0)
        return f"{key}: {value!r} is not one of {', '.join(valid)}; nearest: {near[0] if near else valid[0]}"
    for name, word in (("ge", "at least"), ("le", "at most"), ("gt", "more than"), ("lt", "less than")):
        if name in limits:
            nearest = f"; nearest valid: {limits[name]}" if name in ("ge", "le") else ""
            return f"{key}: {value!r} must be {word} {limits[name]}{nearest}"
    if kind == "missing":
        return f"{key}: is missing (needed beside {', '.join(value) if isinstance(value, dict) else value!r})"
    message = error["msg"].removeprefix("Input should be ").split(", unable")[0]
    return f"{key}: {value!r} is not {message}"


def _field_names(location: Sequence[Any]) -> list[str]:
    model: type[BaseModel] = Config
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else ViT
    return list(model.model_fields)


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


def _check_dataset(config: Config) -> list[str]:
    problems = []
    for key, split in (("dataset.split", config.dataset.split), ("evaluate.split", config.evaluate.split)):
        try:
            parse_split(split or "")
        except ValueError as error:
            problems.append(f"{key}: {error}")
    if config.dataset.kind == "coco" and config.clips.clip_frames != 1:
        problems.append(
            f"clips.clip_frames: {config.clips.clip_frames} frames, but COCO's images are videos of one; "
            "nearest valid: 1"
        )
    return problems


def _check_models(config: Config) -> list[str]:
    problems = []
    for name in ("teacher", "student"):
        model: Model = getattr(config, name)
        patch = model.patch_size
        if name == "teacher" and config.teacher.checkpoint:
            continue  # the file decides
        if patch and model.image_size % patch:
            lower = model.image_size // patch * patch
            nearest = f"{lower} or {lower + patch}" if lower else str(patch)
            problems.append(
                f"{name}.image_size: {model.image_size} is not a multiple of the patch size {patch}; "
                f"nearest: {nearest}"
            )
        if isinstance(model.backbone, ViT) and model.backbone.embed_dim % model.backbone.num_heads:
            problems.append(
                f"{name}.backbone.num_heads: {model.backbone.num_heads} does not divide embed_dim "
                f"{model.backbone.embed_dim}"
            )
    for key in ("num_slots", "slot_size"):
        teacher, student = getattr(config.teacher, key), getattr(config.student, key)
        known = config.teacher.checkpoint is None and teacher is not None
        if known and student is not None and student != teacher:
            problems.append(
                f"student.{key}: {student} differs from the teacher's {teacher} (teacher.{key}), and slot "
                f"n is distilled to slot n; nearest valid: {teacher}"
            )
    slot_size = config.student.slot_size or config.teacher.slot_size
    if slot_size is not None and slot_size % 4:
        problems.append(
            f"student.slot_size: {slot_size} must be a multiple of 4, the predictor's heads; nearest: "
            f"{max(4, slot_size // 4 * 4)}"
        )
    return problems


def _check_combinations(config: Config) -> list[str]:
    problems = []
    for name, train in (("teacher.train", config.teacher.train), ("distill", config.distill)):
        if train.workers and train.batch_size % train.workers:
            nearest = max(1, round(train.batch_size / train.workers)) * train.workers
            problems.append(
                f"{name}.batch_size: {train.batch_size} can't be shared equally by {train.workers} workers; "
                f"nearest: {nearest}"
            )
    trains = config.evaluate.model is None and config.dataset.kind != "synthetic"
    if trains and config.evaluate.split == config.dataset.split != "":
        problems.append(f"evaluate.split: {config.evaluate.split!r} is the training split (dataset.split)")
    if config.clips.clip_frames < 2 and (config.distill.alpha or config.teacher.train.alpha):
        problems.append(
            "clips.clip_frames: 1 leaves no neighbouring frames for the contrastive loss; use alpha=0"
        )
    return problems
