"""What an artifact is: the content that decides it, and so the folder that it lies in.

A folder's name is a hash of its content, so that equal work is found, and a changed input is never mistaken for an
old one. What counts is said once, here: settings as in `counted`, files by their bytes, and other artifacts by their
own fingerprints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from pipeline import storage
from pipeline.artifacts.counted import (
    clip_settings,
    counted,
    counted_fields,
    distill_settings,
    protocol_rules,
    training_settings,
    view_recipe,
)
from pipeline.artifacts.manifests import MODEL_FOLDER, Rules, TargetManifest
from pipeline.artifacts.subjects import backbone_identity, features_identity, model_identity, model_subject
from pipeline.config import Config, ConfigError, Model
from pipeline.config.protocols import choose_protocol
from pipeline.models import CheckpointHints
from pipeline.models.build import checkpoint_hints, load_teacher, student_sizes
from pipeline.models.segmenter import SegmenterConfig
from pipeline.models.systems import parse_config

# Of each kind's files; bump one where their meaning changes, and they are made again.
CLIPS_FORMAT = TARGETS_FORMAT = FEATURES_FORMAT = SWEEP_FORMAT = 1
SCORES_FORMAT = 2


@dataclass(frozen=True)
class Artifact:
    """Where something is or will be, and what decided that."""

    uri: str
    content: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        return storage.name(self.uri)


class Library(Protocol):
    """What has to be looked up in data sets and clip sets to know what is made of them."""

    def sources(self, config: Config, split: str) -> Sequence[tuple[str, str]]:
        """The id and content of each video of a split."""

    def annotated(self, clips_uri: str) -> Sequence[str]:
        """The ids of a published clip set's videos with masks."""


class StudentInputs(NamedTuple):
    """What a student learns from; None where it needs none."""

    teacher_uri: str | None
    targets_uri: str | None


class Artifacts:
    """All that is made of a config: each property is found out when it is first asked for, and then kept."""

    def __init__(self, config: Config, library: Library, *, clips_uri: str | None = None) -> None:
        """
        Args:
            clips_uri: a published clip set to train on, instead of the one that the config's videos make.
        """
        self.config, self.library = config, library
        self._rules: dict[str, dict[str, Any]] = {}  # by the clip set's URI
        if clips_uri is not None:
            self.clips = Artifact(clips_uri, {})

    def of(self, config: Config) -> Artifacts:
        """Those of another config on the same clips, as another trial of a sweep."""
        return Artifacts(config, self.library, clips_uri=self.clips.uri)

    def _place(self, kind: str, content: Mapping[str, Any]) -> Artifact:
        root = storage.absolute(self.config.storage.root)
        return Artifact(storage.join(root, kind, storage.fingerprint(content)), content)

    def clips_of(self, split: str) -> Artifact:
        """The clip set of a split."""
        content = {
            "format": CLIPS_FORMAT,
            "settings": clip_settings(self.config, split),
            "decoder": _decoder(),
            "sources": [list(source) for source in self.library.sources(self.config, split)],
        }
        return self._place("clips", content)

    @cached_property
    def clips(self) -> Artifact:
        """What is trained on."""
        return self.clips_of(self.config.dataset.split)

    @cached_property
    def evaluation_clips(self) -> Artifact:
        """What is scored on.

        Raises:
            ConfigError: the config names no split.
        """
        if self.config.evaluate.split is None:
            raise ConfigError("evaluate.split: is not set; name the split whose videos have masks")
        return self.clips_of(self.config.evaluate.split)

    @cached_property
    def teacher_run(self) -> Artifact:
        """The training of a teacher, where the config gives none."""
        section = self.config.teacher
        content = {
            "clips": self.clips.fingerprint,
            "model": {
                **counted(section, but={"name", "checkpoint", "num_heads", "train", "backbone_weights"}),
                **section.sizes,
            },
            "backbone": backbone_identity(section),
            "train": training_settings(section.train),
            "views": view_recipe(self.config),
        }
        if section.cached_features:
            content["features"] = self.config.targets.feature_dtype
        return self._place("teachers", content)

    def features(self, section: Model) -> Artifact:
        """The stored features of a section's backbone: one place for all teachers and students that have it."""
        content = {
            "format": FEATURES_FORMAT,
            "clips": self.clips.fingerprint,
            "backbone": features_identity(section),
            "dtype": self.config.targets.feature_dtype,
            "views": view_recipe(self.config),
        }
        return self._place("features", content)

    @cached_property
    def teacher(self) -> Artifact:
        """The teacher's model: `teacher.checkpoint`, or what `teacher_run` makes; it need not be there."""
        if self.config.teacher.checkpoint:
            uri = storage.pinned(storage.absolute(self.config.teacher.checkpoint))
            return Artifact(uri, {"checkpoint": uri, "hints": counted_fields(checkpoint_hints(self.config))})
        return Artifact(storage.join(self.teacher_run.uri, MODEL_FOLDER), self.teacher_run.content)

    def require_teacher(self) -> str:
        """The teacher's place, after making sure that something is there.

        Raises:
            ConfigError: no model there.
        """
        checkpoint = self.config.teacher.checkpoint
        if storage.exists(self.teacher.uri):
            return self.teacher.uri
        if checkpoint:
            raise ConfigError(
                f"teacher.checkpoint: there is no file or folder {checkpoint!r}{storage.nearest(checkpoint)}"
            )
        raise ConfigError(
            "there is no teacher of these clips and settings: train one (python -m jobs.teacher CONFIG), or name one "
            "that you have (teacher.checkpoint=PATH)"
        )

    @cached_property
    def targets(self) -> Artifact:
        """The teacher's slots of all clips.

        Raises:
            ConfigError: no teacher, whose files decide them.
        """
        settings = self.config.targets
        content: dict[str, Any] = {
            "format": TARGETS_FORMAT,
            "clips": self.clips.fingerprint,
            "teacher": self._teacher_identity,
            "rollout": settings.rollout,
            "views": view_recipe(self.config),
            "student_features": None,
            "teacher_features": settings.feature_dtype if settings.teacher_features else None,
        }
        if settings.student_features:
            content["student_features"] = {
                **backbone_identity(self.config.student),
                "dtype": settings.feature_dtype,
            }
        return self._place("targets", content)

    @cached_property
    def _teacher_identity(self) -> dict[str, Any]:
        return model_identity(self.teacher.uri, checkpoint_hints(self.config))

    @cached_property
    def _known_teacher(self) -> str | None:
        """The teacher's place, where the student has anything of it: what it learns, its start, its sizes."""
        config = self.config
        if config.distill.distils or config.distill.initial_slots_from_teacher or config.teacher.checkpoint:
            return self.require_teacher()
        there = config.targets.student_features and storage.exists(self.teacher.uri)
        return self.teacher.uri if there else None

    @cached_property
    def student_inputs(self) -> StudentInputs:
        """What the student learns from.

        Raises:
            ConfigError: a teacher is needed and not there.
        """
        config, settings = self.config, self.config.distill
        if self._known_teacher is None:
            return StudentInputs(None, None)
        # Without KD the cache only spares the student its backbone, where it has been filled with features.
        cached = not settings.live_teacher and (
            settings.distils or (config.targets.student_features and storage.is_complete(self.targets.uri))
        )
        taught = settings.distils or settings.initial_slots_from_teacher
        return StudentInputs(self._known_teacher if taught else None, self.targets.uri if cached else None)

    @cached_property
    def teacher_config(self) -> SegmenterConfig | None:
        """The teacher's design, which gives the sizes that the student leaves open; None without a teacher.

        Raises:
            ConfigError: a teacher is needed and not there.
        """
        if self._known_teacher is None:
            return None
        # From the targets where they are there: a public file has to be read for it.
        if not self.config.distill.live_teacher and storage.is_complete(self.targets.uri):
            return parse_config(TargetManifest.read(self.targets.uri).teacher_config)[1]
        return load_teacher(self.config, self._known_teacher).config

    @cached_property
    def student(self) -> Artifact:
        """The training run of the student; raises as `student_inputs`, or where it doesn't fit the teacher."""
        config = self.config
        stored = config.targets.student_features or config.student.cached_features
        content: dict[str, Any] = {
            "clips": self.clips.fingerprint,
            "student": counted(config.student, but={"backbone_weights", "num_slots", "slot_size"}),
            "sizes": student_sizes(config, self.teacher_config),
            "backbone": backbone_identity(config.student),
            "features": config.targets.feature_dtype if stored else None,
            "distill": distill_settings(config.distill),
            "views": view_recipe(config),
        }
        if config.distill.distils and config.distill.live_teacher:
            content["teacher"] = [self._teacher_identity, config.targets.rollout]
        elif config.distill.distils:
            content["targets"] = self.targets.fingerprint
        elif config.distill.initial_slots_from_teacher:
            content["teacher"] = self._teacher_identity
        return self._place("students", content)

    @property
    def teacher_settings(self) -> str:
        """A fingerprint of all that decides a teacher that is trained here but its seed."""
        content = self.teacher_run.content
        settings = {key: value for key, value in content["train"].items() if key != "seed"}
        return storage.fingerprint({**content, "train": settings})

    @property
    def student_settings(self) -> str:
        """A fingerprint of all that decides the student but its seed and name: equal for the seeds of one setting."""
        content = self.student.content
        settings = {key: value for key, value in content["distill"].items() if key not in ("seed", "name")}
        return storage.fingerprint({**content, "distill": settings})

    @property
    def student_model(self) -> str:
        """The finished student's model folder."""
        return storage.join(self.student.uri, MODEL_FOLDER)

    def rules_on(self, clips_uri: str) -> Rules:
        """What two scores under this config's protocol on a clip set have in common."""
        protocol, content = choose_protocol(self.config.evaluate), self._rules_on(clips_uri)
        return Rules(**{**asdict(protocol), **content}, in_words=protocol.in_words())

    def _rules_on(self, clips_uri: str) -> dict[str, Any]:
        if clips_uri not in self._rules:
            ids = list(self.library.annotated(clips_uri))
            content = {
                "format": SCORES_FORMAT,
                **protocol_rules(choose_protocol(self.config.evaluate)),
                "clips": storage.name(clips_uri),
                "videos": len(ids),
                "video_ids": storage.fingerprint(ids),
            }
            self._rules[clips_uri] = {**content, "fingerprint": storage.fingerprint(content)}
        return self._rules[clips_uri]

    def scores_of(self, subject: Mapping[str, Any], clips_uri: str) -> Artifact:
        """The evaluation of a model or baseline, known by `model_subject` or `baseline_subject`, on a clip set."""
        return self._place("evaluations", {**self._rules_on(clips_uri), **subject})

    @cached_property
    def evaluation(self) -> Artifact:
        """The finished student's scores on the evaluation split, whose clips must be there.

        Raises:
            ConfigError: no split is named, or the student is not there.
        """
        subject = model_subject(self.student_model, CheckpointHints())
        return self.scores_of(subject, self.evaluation_clips.uri)

    def sweep(self, trials: Sequence[tuple[str, int, str]]) -> Artifact:
        """The sweep over trials of (setting, seed, the student's fingerprint)."""
        settings = self.config.sweep
        rules = [settings.grace_steps, settings.reduction_factor, self.config.distill.validate_every]
        content = {
            "format": SWEEP_FORMAT,
            "trials": [list(trial) for trial in trials],
            "asha": rules if settings.asha else None,
            "clips": self.evaluation_clips.fingerprint,
            "evaluate": counted(self.config.evaluate, but={"model"}),
        }
        return self._place("sweeps", content)

    def generated(self, settings: Any) -> Artifact:
        """A folder of generated videos; `settings` is the dataclass `SyntheticSettings`."""
        content = counted_fields(settings)
        return self._place("generated", {**content, "format": CLIPS_FORMAT, "av": _decoder()["av"]})


def _decoder() -> dict[str, Any]:
    """What decodes videos, whose versions may differ in the last bit."""
    import av

    codecs = {name: version for name, version in av.library_versions.items() if "codec" in name}
    return {"av": av.__version__, **codecs}
