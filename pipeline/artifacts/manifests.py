"""What the published folders say of themselves: one type for each kind of manifest, which is all that two rooms
must agree about. Folders of earlier versions lack the later fields, which have defaults; what a later version has
added is ignored."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import storage

_M = TypeVar("_M", bound="Manifest")

MODEL_FOLDER = "model"  # in a run's folder


class Manifest(BaseModel):
    """Common to all: what the folder holds, its name, and when it was published (UTC)."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    # What `kind` says in folders of this type.
    kinds: ClassVar[tuple[str, ...]]

    kind: str
    fingerprint: str = ""
    created: str = ""

    @classmethod
    def read(cls: type[_M], uri: str) -> _M:
        """The manifest of a published folder.

        Raises:
            storage.IncompleteError: the folder is missing or unfinished.
            ValueError: it is damaged, or of another kind.
        """
        values = storage.read_manifest(uri)
        kind = values.get("kind", "something else")
        if kind not in cls.kinds:
            raise ValueError(f"{uri} holds {kind}, not {' or '.join(cls.kinds)}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(
                f"{storage.join(uri, storage.MANIFEST)}: damaged, {where}: {first['msg']}; delete the folder and "
                "run again"
            ) from None

    def publish(self, uri: str) -> None:
        """Completes the folder."""
        storage.publish(uri, self.model_dump(mode="json"))


class Part(BaseModel):
    """A section of a manifest."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class GeneratedManifest(Manifest):
    """Of a folder of generated videos."""

    kinds = ("generated",)

    kind: str = "generated"
    settings: dict[str, Any]
    contents: dict[str, str] = {}  # a hash of each video by its id, where the folder is remote


class ShardEntry(Part):
    name: str
    rows: int
    bytes: int = 0


class BadVideoEntry(Part):
    """A video that was set aside."""

    video: str
    path: str = ""
    reason: str


class DatasetEntry(Part):
    kind: str
    name: str
    path: str | None = None
    split: str = ""


class ClipManifest(Manifest):
    """Of a clip set."""

    kinds = ("clips",)

    kind: str = "clips"
    split: str = ""
    dataset: DatasetEntry | None = None  # None: made by a version that did not record it
    settings: dict[str, Any]  # of `clips.*`, as far as they decide the content
    sources: str = ""  # a fingerprint of the videos
    flow: str | None = None  # what computed it, of clips.motion=flow; decides nothing
    videos: int = 0
    clips: int = 0
    frames: int = 0
    annotated_videos: int = 0
    shards: tuple[ShardEntry, ...]
    bad: tuple[BadVideoEntry, ...] = ()

    @property
    def clip_frames(self) -> int:
        return int(self.settings["clip_frames"])

    @property
    def shard_names(self) -> list[str]:
        return [shard.name for shard in self.shards]


class TargetManifest(Manifest):
    """Of a target set; what decided its fingerprint is in it under the names that `artifacts.identity` gives it."""

    kinds = ("targets",)

    kind: str = "targets"
    format: int = 1
    clips: str = ""  # the clip set's fingerprint
    clips_uri: str = ""
    teacher: dict[str, Any] = {}  # hashes of its files, and what they don't tell
    teacher_uri: str = ""
    teacher_config: dict[str, Any]
    rollout: str = "forward"
    views: dict[str, Any]
    student_features: dict[str, Any] | None = None
    teacher_features: str | None = None  # their dtype
    shards: tuple[str, ...] = ()
    rows: int


class FeatureManifest(Manifest):
    """Of the stored features of a backbone, with what decided its fingerprint, as a target set's."""

    kinds = ("features",)

    kind: str = "features"
    format: int = 1
    clips: str  # the clip set's fingerprint
    clips_uri: str = ""
    backbone: dict[str, Any]
    dtype: str
    views: dict[str, Any]
    shards: tuple[str, ...] = ()
    rows: int


class RunManifest(Manifest):
    """Of a finished training run: a student or a teacher."""

    kinds = ("student", "teacher")

    kind: Literal["student", "teacher"] = "student"
    clips_uri: str = ""
    targets_uri: str | None = None
    features_uri: str | None = None
    teacher_uri: str | None = None
    mlflow_run: str
    steps: int = 0
    seconds: float = 0.0
    losses: dict[str, int | float] = {}  # of the last step that was logged, and its number
    tags: dict[str, str] = {}


class Rules(Part):
    """The protocol of an evaluation with what it was applied to: scores compare where `fingerprint` is equal."""

    name: str
    in_words: str = ""
    fingerprint: str
    format: int = 0
    clip_frames: int = 0
    mask_size: int = 0
    crop: str = "central"
    background: str = "ignore"
    ignore_overlaps: bool = False
    rollout: str = "forward"
    masks: str = "decoder"
    mask_stride: int = 1
    objects: str = "all"
    min_object_area: int = 0
    min_objects: int = 0
    matched: bool = False
    clips: str = ""  # the clip set's fingerprint
    videos: int = 0
    video_ids: str = ""  # a fingerprint of them
    warnings: tuple[
        str, ...
    ] = ()  # which of its scores say nothing on these videos, and why; decides nothing


class EvaluationManifest(Manifest):
    """Of the scores of one model, or of one trivial baseline."""

    kinds = ("evaluation",)

    kind: str = "evaluation"
    clips_uri: str = ""
    scores: dict[str, float]  # fractions of 1
    protocol: Rules
    videos: int  # that have an object to score


class TrialEntry(Part):
    """One trial of a finished sweep."""

    setting: str
    values: dict[str, Any]
    seed: int
    run: str  # its folder
    status: Literal["finished", "stopped", "failed"]


class SweepManifest(Manifest):
    """Of a finished sweep."""

    kinds = ("sweep",)

    kind: str = "sweep"
    clips_uri: str
    trials: tuple[TrialEntry, ...]
    best: dict[str, Any] | None = None
