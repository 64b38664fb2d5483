"""The keys, their types and defaults; each default that the paper gives is the paper's."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from pipeline.config.fields import (
    ConfigError,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    run_detail,
)
from pipeline.config.models import Student, Teacher
from pipeline.config.rivals import Rivals
from pipeline.config.training import Distill

GENERATED_SPLITS = ("train", "validation", "test")


class Synthetic(Section):
    """Generated videos (`dataset.kind: synthetic`): real H.264 files with instance masks."""

    videos: PositiveInt = 400
    """of the split train"""
    validation_videos: PositiveInt = 60
    """of the split validation"""
    test_videos: PositiveInt = 60
    """of the split test"""
    frames: PositiveInt = 24
    """of each video"""
    size: Annotated[int, Field(ge=16, multiple_of=2)] = 96
    """pixels, width and height"""
    seed: NonNegativeInt = 0
    """decides what the videos show"""


class NamedSplit(Section):
    """A part of a split that the data set lists: some of its videos, in the order of the SHA-256 of their names.

    That order is the same for everybody and has nothing to do with what the videos show.
    """

    of: str
    """the listed split; of videos a sub-folder, or all of them: ''"""
    skip: NonNegativeInt = 0
    """leave out so many, the first ones"""
    take: PositiveInt | None = None
    """and take the next ones; null: all that are left"""

    @property
    def part(self) -> slice:
        return slice(self.skip, None if self.take is None else self.skip + self.take)


class Dataset(Section):
    """What videos there are, and where."""

    kind: Literal["videos", "synthetic", "davis", "ytvis", "ovis", "movi", "coco", "webdataset"] = "videos"
    """the layout; what each has below path: docs/data-sets.md"""
    name: str = ""
    """as in tables, "MOVi-E"; the kind where it is empty"""
    path: str | None = None
    """a folder; for data sets in a public layout s3://bucket/prefix too"""
    split: str = ""
    """what to train on, of videos a sub-folder; a slice of it: train[:-300]"""
    splits: dict[str, NamedSplit] = Field(default={})
    """more splits, made of listed ones: {validation: {of: val, take: 8}, test: {of: val, skip: 8}}"""
    resolution: str = "480p"
    """of DAVIS"""
    masks: str = "masks"
    """of videos: sub-folder of label PNGs, masks/<video>/<frame>.png, optional"""
    motion: str | None = None
    """for clips.motion=files: a folder of label PNGs, <video>/<frame>.png, of any kind of data set"""
    seed: NonNegativeInt = 0
    """decides the views of each clip"""
    synthetic: Synthetic = Synthetic()

    @property
    def title(self) -> str:
        return self.name or self.kind

    def listed(self, split: str) -> str:
        """The listed split that the videos of a split (or of a slice of it) are in."""
        name, _ = parse_split(split)
        return self.splits[name].of if name in self.splits else name


class Clips(Section):
    """How videos become a table of clips."""

    clip_frames: PositiveInt = 4
    """frames of a clip"""
    short_side: PositiveInt | None = None
    """pixels; null keeps the size"""
    pixel_aspect: Literal["square", "stored"] = "square"
    """square shows video files as a player does; stored keeps their columns, whatever shape their pixels have"""
    fps: PositiveFloat | None = None
    """null keeps every frame; frames without a clock count as seconds"""
    max_seconds: PositiveFloat | None = None
    """of each video"""
    codec: Literal["jpeg", "png", "raw"] = "jpeg"
    """how frames are stored"""
    motion: Literal["none", "flow", "masks", "files", "dataset"] = "none"
    """which training pixels move, as DIOD needs: by optical flow (dataset: MOVi's own), all masks, or dataset.motion"""
    flow: Literal["none", "dataset"] = "none"
    """dataset: keep MOVi's own optical flow of the training videos, which a SAVi can reconstruct"""
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """of JPEG"""
    videos_per_shard: PositiveInt = 16
    """videos of a Parquet file"""
    row_group_mb: PositiveFloat = 1.0
    """MB of a row group, the least that is read at once"""
    max_bad_fraction: Fraction = run_detail(0.1)
    """of the videos; more than that fails the job"""


class Targets(Section):
    """What the teacher's cache holds."""

    views: PositiveInt = 1
    """of every clip; view 0 is the centre crop without a flip"""
    crop: Literal["center", "random"] = "center"
    """of views 1, 2, …"""
    min_scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    """smallest random crop, of the short side"""
    flip: Fraction = 0.5
    """probability, of views 1, 2, …"""
    rollout: Literal["forward", "cyclic"] = "forward"
    """cyclic: the teacher infers there and back, as SlotCurri does"""
    student_features: bool = False
    """also cache the student's frozen features: no ViT in training"""
    teacher_features: bool = False
    """also cache the teacher's frozen features, which feature KD needs"""
    feature_dtype: Literal["float32", "float16"] = "float32"
    """as features are stored"""
    batch_size: PositiveInt = run_detail(8)
    """clips in one teacher pass"""
    verify: Fraction = run_detail(0.0)
    """share of the rows to compute again and compare"""


PAPER_BETAS = (0.1, 0.2, 0.3, 0.5, 0.8)


class Sweep(Section):
    """Which students `jobs.sweep` trains and compares; as it is, those of the paper's Table 4.

    Every setting is trained from every seed on the same clips. Settings are the crossed values of the grid,
    `grid: {distill.beta: [0.1, 0.2], targets.views: [1, 4]}`, or random draws from it; or `variants`, which have
    names of their own and are used instead of the grid:
    `variants: {no KD: {distill.method: no_kd}, K = 4: {targets.views: 4}}`.
    """

    grid: dict[str, Any] = Field(default={"distill.beta": list(PAPER_BETAS)})
    """key: values, crossed; for search=random also ranges {low: 1e-4, high: 1e-2, log: true}"""
    variants: dict[str, dict[str, Any]] = Field(default={})
    """name: {key: value}; used instead of the grid"""
    seeds: tuple[NonNegativeInt, ...] = (42, 101, 2048)
    """of distill.seed"""
    seeds_of: dict[str, tuple[NonNegativeInt, ...]] = Field(default={})
    """other seeds of some settings, by their names: {no KD: [0, 1, 2, 3, 4]}"""
    search: Literal["grid", "random"] = "grid"
    """all of the grid, or random draws from it"""
    samples: PositiveInt = 10
    """settings that a random search draws"""
    seed: NonNegativeInt = 0
    """of these draws"""
    asha: bool = False
    """stops what scores badly (evaluate.score) early; needs distill.validate_every"""
    grace_steps: PositiveInt | None = None
    """that ASHA leaves to all; null: a quarter of distill.steps"""
    reduction_factor: Annotated[float, Field(gt=1)] = 3.0
    """of 3 trials ASHA lets one go on"""
    max_concurrent: PositiveInt | None = None
    """trials at a time; null: as many as fit the cluster"""
    register_students: bool = True
    """all that finished; the chosen one contends for champion"""


class Evidence(Section):
    """How `jobs.evidence` scores a sweep's students once more, on videos that nothing was chosen on."""

    split: str | None = None
    """with masks; neither dataset.split nor evaluate.split"""
    scores: tuple[Literal["image_fg_ari", "image_mbo", "video_fg_ari", "video_mbo"], ...] = (
        "video_mbo",
        "video_fg_ari",
    )
    """which scores the claims are held against"""
    masks: tuple[Literal["decoder", "attention"], ...] = ()
    """whose masks are scored, with tables for each; []: evaluate.masks alone"""
    claims: tuple[str, ...] = ()
    """orderings to hold against the scores: SlotMatch > no KD"""
    pictures: tuple[str, ...] = ()
    """settings whose first seeds are drawn on videos of that split, which the last setting's scores choose"""
    document: str | None = None
    """a Markdown file whose marked block is replaced by the tables; FILE.md#NAME: its block of that name"""


class Evaluate(Section):
    """What is scored and how; a rule left empty is the protocol's."""

    split: str | None = None
    """the videos with masks to score on; null: nothing to score"""
    model: str | None = None
    """a folder, a public file or models:/NAME@ALIAS; null: this config's student"""
    protocol: Literal["paper", "slotcontrast", "videosaur", "savi", "steve", "solv", "diod"] = "slotcontrast"
    """decides each rule below that is left empty"""
    clip_frames: NonNegativeInt | None = None
    """frames of a sample; 0: whole videos"""
    mask_size: NonNegativeInt | None = None
    """pixels; 0: as the clips are"""
    mask_stride: PositiveInt | None = None
    """masks at one of so many pixels of the clips' rows and columns; 1: all"""
    crop: Literal["central", "full", "content"] | None = None
    """the central square, the whole frame, or the frame without black borders"""
    background: Literal["ignore", "object"] | None = None
    """left out of the scores, or scored as one more object"""
    ignore_overlaps: bool | None = None
    """leave out pixels that belong to several objects"""
    rollout: Literal["forward", "cyclic"] | None = None
    """cyclic: the model infers there and back"""
    masks: Literal["decoder", "attention"] | None = None
    """whose masks are scored"""
    objects: Literal["all", "first"] | None = None
    """first: those of a sample's first frame; what comes later is background"""
    min_object_area: NonNegativeInt | None = None
    """pixels of the clips; what has fewer in a frame is background there"""
    min_objects: NonNegativeInt | None = None
    """samples of fewer are left out"""
    matched: bool | None = None
    """SOLV's scores beside the others, of slots matched one to one to objects"""
    score: Literal["image_fg_ari", "image_mbo", "video_fg_ari", "video_mbo"] = "video_mbo"
    """the score that students are compared by"""
    teacher: bool = True
    """score the teacher as well"""
    baselines: bool = True
    """and trivial segmentations"""
    feature_kmeans: bool = False
    """and k-means on the frozen features of teacher and student, the baseline that is hardest to beat"""
    validation_videos: PositiveInt = 8
    """that validate_every of a training looks at"""


class MLflow(Section):
    """Where runs and models are recorded."""

    tracking_uri: str | None = None
    """null: $MLFLOW_TRACKING_URI, else SQLite under storage.root"""
    experiment: str = "slotmatch"
    """the experiment of all runs"""
    model_name: str = "slotmatch"
    """the registered model"""
    weights_licence: str = ""
    """of the students' weights, as their model cards say it: CC-BY-4.0; empty: not stated"""
    system_metrics: bool = False
    """log how busy the machine is while it trains; needs psutil"""


class Ray(Section):
    """Where jobs run, and on how much."""

    address: str | None = None
    """null: $RAY_ADDRESS, else a local Ray"""
    num_cpus: PositiveInt | None = None
    """of a local Ray"""
    gpus: NonNegativeInt = 0
    """to ask an autoscaling cluster for, and to wait for; 0: use those that are there"""
    teacher_cpus: PositiveFloat = 0.8
    """of a process that caches or evaluates on machines without GPUs"""


class Storage(Section):
    """Where all that is made is kept."""

    root: str = "runs"
    """a folder or s3://bucket/prefix"""
    cache: str | None = run_detail(None)
    """a folder on each node's own disk for decoded frames; null: $SLOTMATCH_CACHE, else ~/.cache/slotmatch"""
    cache_gb: NonNegativeFloat = run_detail(100.0)
    """GB that decoded frames may take there; 0: none are kept"""


class Config(Section):
    """All that decides what is made, and how."""

    dataset: Dataset = Dataset()
    clips: Clips = Clips()
    teacher: Teacher = Teacher()
    student: Student = Student()
    targets: Targets = Targets()
    distill: Distill = Distill()
    sweep: Sweep = Sweep()
    evidence: Evidence = Evidence()
    rivals: Rivals = Rivals()
    evaluate: Evaluate = Evaluate()
    mlflow: MLflow = MLflow()
    ray: Ray = Ray()
    storage: Storage = Storage()

    def clips_of(self, split: str) -> Clips:
        """How the clips of a split are made: only those that are trained on have motion segments and flow."""
        trained_on = split == self.dataset.split
        return self.clips if trained_on else self.clips.model_copy(update={"motion": "none", "flow": "none"})

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
