"""What values can't be together: each check gives one line for every problem."""

from __future__ import annotations

import difflib
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config.models import Model, ViT
from pipeline.config.protocols import choose_protocol
from pipeline.config.rival_checks import check_rival
from pipeline.config.rivals import RIVALS
from pipeline.config.sections import GENERATED_SPLITS, Config, Dataset, NamedSplit, parse_split
from pipeline.config.training import Training, equal_shares
from pipeline.log import has_password

PLACES = 5  # numbers of a slot that a fitted start needs for its place, as `pipeline.models.initialisation` has them


def check_secrets(config: Config) -> list[str]:
    """A config is printed, stored beside every result and shown by MLflow: no place for a password."""
    found = [(key, text) for key, text in _texts(config.model_dump(mode="json")) if has_password(text)]
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if config.mlflow.tracking_uri is None and has_password(uri):
        found.append(("MLFLOW_TRACKING_URI", uri))
    return [
        f"{key}: holds a password, which would be stored and shown with it; leave it out and {_way_out(key, text)}"
        for key, text in found
    ]


def _texts(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a config with its key."""
    if isinstance(values, str):
        yield key, values
    elif isinstance(values, dict):
        for name, value in values.items():
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from _texts(value, key)


def _way_out(key: str, uri: str) -> str:
    if uri.startswith("postgres"):
        return "set PGPASSWORD, or write it to ~/.pgpass"
    if uri.startswith("s3:"):
        return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if key in ("mlflow.tracking_uri", "MLFLOW_TRACKING_URI"):
        return "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    return "give it by the environment"


def check_dataset(config: Config) -> list[str]:
    problems = []
    named = {
        "dataset.split": config.dataset.split,
        "evaluate.split": config.evaluate.split,
        "evidence.split": config.evidence.split,
    }
    for key, split in named.items():
        try:
            name, _ = parse_split(split or "")
        except ValueError as error:
            problems.append(f"{key}: {error}")
            continue
        if config.dataset.kind == "synthetic" and name not in ("", *GENERATED_SPLITS):
            near = difflib.get_close_matches(name, GENERATED_SPLITS, n=1, cutoff=0.0)[0]
            problems.append(
                f"{key}: {name!r} is no generated split ({', '.join(GENERATED_SPLITS)}); nearest: {near}"
            )
    problems += _check_splits(config.dataset)
    if not problems:  # it has to know the folder of the split
        problems += _check_motion(config)
    if config.dataset.kind == "coco" and config.clips.clip_frames != 1:
        problems.append(
            f"clips.clip_frames: {config.clips.clip_frames} frames, but COCO's images are videos of one; "
            "nearest valid: 1"
        )
    return problems


def _check_motion(config: Config) -> list[str]:
    dataset, motion = config.dataset, config.clips.motion
    for key, value, nearest in (("motion", motion, "flow"), ("flow", config.clips.flow, "none")):
        if value == "dataset" and dataset.kind != "movi":
            return [
                f"clips.{key}: dataset is the optical flow of MOVi's records, which dataset.kind={dataset.kind} lacks; "
                f"nearest valid: {nearest}"
            ]
    if motion == "files" and dataset.motion is None:
        return ["clips.motion: files needs dataset.motion, the folder of label images; nearest valid: flow"]
    if motion != "files" and dataset.motion is not None:
        return [f"dataset.motion: is not read with clips.motion={motion}; nearest valid: clips.motion=files"]
    if dataset.kind != "videos" or dataset.motion is None:
        return []
    folder = Path(dataset.path or "", dataset.listed(dataset.split))
    if folder in Path(dataset.motion).parents:
        return [
            f"dataset.motion: {dataset.motion!r} lies among the videos ({folder}), and would be taken for some; move "
            "it beside them"
        ]
    return []


def _check_splits(dataset: Dataset) -> list[str]:
    if dataset.splits and dataset.kind == "synthetic":
        return [
            f"dataset.splits: generated videos have the splits {', '.join(GENERATED_SPLITS)}; nearest valid: {{}}"
        ]
    problems = []
    for name, split in dataset.splits.items():
        if not name or "[" in name or "]" in name:
            problems.append(f"dataset.splits: {name!r} is no name of a split")
        elif split.of in dataset.splits:
            problems.append(
                f"dataset.splits.{name}.of: {split.of!r} must be a split that the data set lists, and "
                "dataset.splits has one of that name"
            )
        elif "[" in split.of:
            problems.append(
                f"dataset.splits.{name}.of: {split.of!r} must be a whole split; nearest valid: {split.of.split('[')[0]}"
            )
    for (one, a), (other, b) in itertools.combinations(dataset.splits.items(), 2):
        if a.of == b.of and max(a.skip, b.skip) < min(_end(a), _end(b)):
            first, after = sorted((a, b), key=lambda split: split.skip)
            name = one if after is a else other
            nearest = f"; nearest valid: skip: {first.skip + first.take}" if first.take else ""
            problems.append(
                f"dataset.splits.{name}.skip: {after.skip} makes {one!r} and {other!r} share videos of {a.of!r}"
                f"{nearest}"
            )
    return problems


def _end(split: NamedSplit) -> float:
    return math.inf if split.take is None else split.skip + split.take


def check_models(config: Config) -> list[str]:
    problems = []
    for name in ("teacher", "student"):
        model: Model = getattr(config, name)
        patch = model.patch_size
        if name == "teacher" and config.teacher.checkpoint:
            continue  # the file decides
        for key, side in (("image_size", model.image_size), ("image_width", model.image_width)):
            if patch and side and side % patch:
                lower = side // patch * patch
                nearest = f"{lower} or {lower + patch}" if lower else str(patch)
                problems.append(
                    f"{name}.{key}: {side} is not a multiple of the patch size {patch}; nearest: {nearest}"
                )
        if isinstance(model.backbone, ViT) and model.backbone.embed_dim % model.backbone.num_heads:
            problems.append(
                f"{name}.backbone.num_heads: {model.backbone.num_heads} does not divide embed_dim "
                f"{model.backbone.embed_dim}"
            )
    for key, teacher in config.teacher.sizes.items():
        student = getattr(config.student, key)
        if key == "slot_size" and config.distill.slot_map:
            continue
        if config.teacher.checkpoint is None and student is not None and student != teacher:
            problems.append(
                f"student.{key}: {student} differs from the teacher's {teacher} (teacher.{key}), and slot "
                f"n is distilled to slot n; nearest valid: {teacher}"
            )
    slot_size = config.student.slot_size or config.teacher.sizes["slot_size"]
    if slot_size % 4:
        problems.append(
            f"student.slot_size: {slot_size} must be a multiple of 4, the predictor's heads; nearest: "
            f"{max(4, slot_size // 4 * 4)}"
        )
    return problems


def _check_distill(config: Config) -> list[str]:
    problems, settings = [], config.distill
    if settings.distils_slots and not settings.beta:
        problems.append(
            f"distill.beta: 0 leaves nothing of distill.method={settings.method}; without distillation: "
            "distill.method=no_kd"
        )
    if settings.fresh_views and not settings.live_teacher:
        problems.append(
            "distill.fresh_views: cached targets hold targets.views views; new ones need distill.live_teacher=true"
        )
    if config.student.cached_features and config.targets.student_features:
        problems.append(
            "student.cached_features: the targets would hold the same features once more; use "
            "targets.student_features=false"
        )
    if config.student.cached_features and settings.live_teacher:
        why = (
            "stored features are of targets.views views, not of new ones (distill.fresh_views)"
            if settings.fresh_views
            else "a live teacher (distill.live_teacher) needs the frames, which stored features spare"
        )
        problems.append(f"student.cached_features: {why}; nearest valid: false")
    has_features = config.teacher.system not in RIVALS  # of those no way is to be named
    given = config.targets.teacher_features or settings.live_teacher
    if settings.method == "feature_kd" and has_features and not given:
        problems.append(
            "distill.method: feature_kd needs the teacher's features: cache them (targets.teacher_features=true) or "
            "run the teacher live (distill.live_teacher=true)"
        )
    problems += _check_teachers_start(config)
    train = config.teacher.train
    if not (train.reconstruction or train.similarity):
        problems.append(
            "teacher.train.reconstruction: 0 leaves nothing to train for; set it, or teacher.train.similarity"
        )
    if train.similarity and config.teacher.cached_features and config.teacher.checkpoint is None:
        problems.append(
            f"teacher.cached_features: teacher.train.similarity: {train.similarity:g} is made of the backbone's "
            "attention keys, which are not stored; nearest valid: false"
        )
    if train.similarity and config.teacher.decoder != "slot_mixer" and config.teacher.checkpoint is None:
        problems.append(
            f"teacher.train.similarity: {train.similarity:g} needs a decoder that predicts similarities; use "
            "teacher.decoder=slot_mixer"
        )
    return problems


def _check_teachers_start(config: Config) -> list[str]:
    """What a student that starts as its teacher does would be refused for when it is built, after teacher and cache."""
    student, teacher, copied = config.student, config.teacher, config.distill.initial_slots_from_teacher
    if student.initialisation != "teacher":
        return []
    start, otherwise = "student.initialisation: teacher", "student.initialisation=soft_kmeans"
    if teacher.system in RIVALS:
        return [
            f"{start}, but {teacher.system} (teacher.system) groups in another way; nearest valid: {otherwise}"
        ]
    if copied is False:
        return [
            f"{start} has its teacher's initial slots too, and is not to copy them; nearest valid: {otherwise}"
        ]
    problems = []
    if config.distill.method == "no_kd" and not copied:
        problems.append(
            f"{start} needs one without distillation too; nearest valid: distill.initial_slots_from_teacher=true, or "
            f"{otherwise}"
        )
    if teacher.checkpoint is None:
        for key in ("corrector_mlp", "predictor"):
            own, other = getattr(student, key), getattr(teacher, key)
            if own != other:
                problems.append(f"student.{key}: {own}, but the teacher's, which it starts as, is {other}")
        if student.slot_size not in (None, teacher.sizes["slot_size"]):
            problems.append(
                f"{start} has slots of its teacher's size, not of {student.slot_size} numbers; nearest valid: "
                f"{otherwise}"
            )
    return problems


def _check_fitted(name: str, model: Model, slot_size: int) -> list[str]:
    """What `fit_start` would refuse when the run begins, after all that it waits for."""
    if model.initialisation != "fitted":
        return []
    problems = []
    if model.initial_slots == "random":
        problems.append(
            f"{name}.initialisation: fitted needs initial slots that are learned ({name}.initial_slots: random); "
            "nearest valid: soft_kmeans"
        )
    if slot_size <= PLACES:
        problems.append(
            f"{name}.slot_size: {slot_size} numbers leave {name}.initialisation=fitted nothing beside the {PLACES} of "
            f"the place; nearest valid: {-(-(PLACES + 1) // 4) * 4}"
        )
    return problems


def _check_workers(name: str, train: Training) -> list[str]:
    problems, fewest = [], train.fewest_workers
    if fewest and train.batch_size % fewest:
        nearest = max(1, round(train.batch_size / fewest)) * fewest
        count = (
            f"any of {train.workers[0]} to {train.workers[1]}" if isinstance(train.workers, tuple) else fewest
        )
        problems.append(
            f"{name}.batch_size: {train.batch_size} can't be shared equally by {count} workers; nearest: {nearest}"
        )
    if isinstance(train.contrast, int) and train.batch_size % train.contrast:
        nearest = equal_shares(train.batch_size, train.contrast)
        problems.append(
            f"{name}.contrast: {train.contrast} shares of a batch of {train.batch_size} would not be equal; nearest "
            f"valid: {nearest}"
        )
    if train.workers_vary and train.alpha and train.contrast == "local":
        word = "auto" if train.workers == "auto" else list(train.workers)  # type: ignore[arg-type]
        problems.append(
            f"{name}.workers: {word} leaves open how many workers there are, and with contrast=local that decides what "
            f"is learned; nearest valid: {name}.contrast=2 (of two workers, whatever their number), or "
            f"{name}.contrast=global"
        )
    return problems


def check_combinations(config: Config) -> list[str]:
    problems = [*_check_distill(config), *check_rival(config)]
    runs: list[tuple[str, Training, Model]] = [
        ("teacher.train", config.teacher.train, config.teacher),
        ("distill", config.distill, config.student),
    ]
    sizes = config.teacher.sizes
    own = config.teacher.checkpoint is None and config.teacher.system == "slotcontrast"
    if own and config.teacher.initialisation == "teacher":
        problems.append("teacher.initialisation: teacher is a student's start; nearest valid: fitted")
    if own:
        problems += _check_fitted("teacher", config.teacher, sizes["slot_size"])
    problems += _check_fitted("student", config.student, config.student.slot_size or sizes["slot_size"])
    for name, train, model in runs:
        problems += _check_workers(name, train)
        if train.alpha and not model.predictor:
            problems.append(
                f"{name}.alpha: {train.alpha:g} contrasts neighbouring frames, but a model without predictor sees "
                "each on its own; nearest valid: 0"
            )
    trains, training = config.evaluate.model is None, config.dataset.split
    if config.dataset.kind == "synthetic":
        training = training or "train"
    if trains and config.evaluate.split == training != "":
        problems.append(f"evaluate.split: {config.evaluate.split!r} is the training split (dataset.split)")
    rules = choose_protocol(config.evaluate)
    if rules.mask_size and rules.mask_stride > 1:
        problems.append(
            f"evaluate.mask_size: {rules.mask_size}, but evaluate.mask_stride ({rules.mask_stride}) also says how "
            f"large masks are (protocol {rules.name}); use evaluate.mask_stride=1, or evaluate.mask_size=0"
        )
    if config.clips.clip_frames < 2 and (config.distill.alpha or config.teacher.train.alpha):
        problems.append(
            "clips.clip_frames: 1 leaves no neighbouring frames for the contrastive loss; use alpha=0"
        )
    return problems
