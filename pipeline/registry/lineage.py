"""Where a registered model comes from: its training run, targets, teacher, clips, and every source video.

Each link is read from the manifest of the folder that the link before it names, so that nothing is taken on trust:
what is not there any more is said by name, and the rest is still shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow.parquet as pq

from pipeline import storage, tracking
from pipeline.artifacts.manifests import (
    ClipManifest,
    EvaluationManifest,
    Manifest,
    RunManifest,
    TargetManifest,
)
from pipeline.clips.table import INDEX_FILE, SOURCES_FILE
from pipeline.evaluate.scoring import SCORES
from pipeline.tracking.client import client_of, error_code, optional
from pipeline.tracking.datasets import TRAINING, inputs_of
from pipeline.tracking.logged import find_model
from pipeline.tracking.versions import find_version

SHOWN_VIDEOS = 5  # of a clip set, where not all are asked for
_RUN_KEYS = ("method", "beta", "seed", "steps", "teacher", "trained_on", "git_revision")
_NO_TARGETS = "None"  # what versions of earlier releases say where they had none
_T = TypeVar("_T")
_M = TypeVar("_M", bound=Manifest)


@dataclass
class Lineage:
    """The links from a version back to its videos, each as plain values; None where a link does not apply.

    A link that is missing has the key `missing`, with what is known of it from the link before.
    """

    version: dict[str, Any]
    run: dict[str, Any]
    targets: dict[str, Any] | None
    teacher: dict[str, Any] | None
    clips: dict[str, Any]
    evaluation: dict[str, Any] | None
    evaluation_clips: dict[str, Any] | None
    mlflow: dict[str, Any] | None  # what MLflow holds of the run: its data sets, its logged model with scores
    missing: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """All of it for JSON, with the first few videos of each clip set."""
        links: dict[str, Any] = {name: dict(link) for name, link in self._links() if link is not None}
        for name in ("clips", "evaluation_clips"):
            if links.get(name, {}).get("video_ids"):
                links[name]["video_ids"] = links[name]["video_ids"][:SHOWN_VIDEOS]
        status = "incomplete" if self.missing else "ok"
        return {"status": status, "uri": self.version["uri"], "missing": self.missing, **links}

    def _links(self) -> list[tuple[str, dict[str, Any] | None]]:
        names = ("version", "run", "targets", "teacher", "clips", "evaluation", "evaluation_clips", "mlflow")
        return [(name, getattr(self, name)) for name in names]

    def tree(self, *, all_videos: bool = False) -> str:
        """The same for people: each link below the one that was made of it."""
        aliases = ", ".join(f"@{alias}" for alias in self.version["aliases"])
        lines = [f"{self.version['uri']}{f' ({aliases})' if aliases else ''}, {self.version['created']}"]
        lines += _score_lines(self.evaluation) if self.evaluation else ["  scores: none"]
        if self.evaluation_clips:
            lines += ["  evaluated on", *_clip_lines(self.evaluation_clips, "    ", all_videos)]
        lines += ["  trained by", *_lines(self.run, "    ")]
        lines += ["    from targets", *_lines(self.targets, "      ")] if self.targets else []
        lines += ["      of the teacher", *_lines(self.teacher, "        ")] if self.teacher else []
        lines += ["      of the clips", *_clip_lines(self.clips, "        ", all_videos)]
        lines += _mlflow_lines(self.mlflow) if self.mlflow else []
        if self.missing:
            lines += ["missing:", *(f"  {what}" for what in self.missing)]
        return "\n".join(lines)


def trace(model_uri: str, tracking_uri: str) -> Lineage:
    """The lineage of `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        ValueError: no such model in the registry, or one that was not registered by this pipeline.
        ServerUnavailable, AccessDenied: as MLflow's client.
    """
    version = find_version(model_uri, tracking_uri)
    tags = dict(version.tags)
    if tracking.RUN_TAG not in tags:
        raise ValueError(
            f"{model_uri} was not registered by this pipeline: it has no tag {tracking.RUN_TAG!r}"
        )
    missing: list[str] = []
    client = client_of(tracking_uri)
    aliases = client.get_registered_model(version.name).aliases
    run_uri = tags[tracking.RUN_TAG]
    manifest = _read(RunManifest, run_uri, "the training run", missing)
    run = _run(run_uri, manifest, tags)
    run["mlflow_run"] = version.run_id
    mlflow = _mlflow(client, version.run_id, tracking_uri, missing)
    clips_uri, targets_uri = _inputs(run_uri, manifest, tags, mlflow)
    targets = _read(TargetManifest, targets_uri, "the targets", missing) if targets_uri else None
    teacher_uri = (targets and targets.teacher_uri) or (manifest and manifest.teacher_uri)
    evaluation = _evaluation(tags, missing)
    evaluation_clips = (evaluation or {}).get("clips_uri")
    return Lineage(
        version={
            "uri": f"models:/{version.name}/{version.version}",
            "aliases": sorted(
                alias for alias, number in aliases.items() if str(number) == str(version.version)
            ),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(version.creation_timestamp / 1000)),
        },
        run=run,
        targets=_targets(targets_uri, targets) if targets_uri else None,
        teacher=_teacher(teacher_uri, tags, targets, missing) if teacher_uri else None,
        clips=_clips(clips_uri, missing),
        evaluation=evaluation,
        evaluation_clips=_clips(evaluation_clips, missing) if evaluation_clips else None,
        mlflow=mlflow,
        missing=missing,
    )


def _try(read: Callable[[], _T], what: str, missing: list[str]) -> _T | None:
    """What `read` gives; None, and a word in `missing`, where it can't be had."""
    try:
        return read()
    except (storage.IncompleteError, OSError, ValueError, ImportError) as error:
        gone = isinstance(error, (storage.IncompleteError, FileNotFoundError))
        missing.append(f"{what}: {'it is not there (any more)' if gone else error}")
        return None


def _read(kind: type[_M], uri: str, what: str, missing: list[str]) -> _M | None:
    """A folder's manifest; None, and a word in `missing`, where it can't be had."""
    return _try(lambda: kind.read(uri), f"{what} {uri}", missing)


def _link(uri: str, manifest: Manifest | None) -> dict[str, Any]:
    if manifest is None:
        return {"uri": uri, "fingerprint": storage.name(uri), "missing": True}
    return {"uri": uri, "fingerprint": manifest.fingerprint}


def _run(uri: str, manifest: RunManifest | None, tags: dict[str, str]) -> dict[str, Any]:
    known = {**tags, **(manifest.tags if manifest else {})}
    return {
        **_link(uri, manifest),
        **{key: known[key] for key in _RUN_KEYS if key in known},
        "created": manifest and manifest.created,
        "seconds": manifest and manifest.seconds,
    }


def _mlflow(client: Any, run_id: str | None, tracking_uri: str, missing: list[str]) -> dict[str, Any] | None:
    """What MLflow holds of a run; earlier versions of this pipeline recorded neither data sets nor models there."""
    try:
        run = client.get_run(run_id)
    except Exception as error:
        if error_code(error) not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        missing.append(f"the MLflow run {run_id}: it is not on {tracking_uri} (any more)")
        return None
    held: dict[str, Any] = {"inputs": inputs_of(run), "logged_model": None}
    with optional("the logged model", "read"):
        if (model := find_model(client, run)) is not None:
            scores = [
                {
                    "score": one.key,
                    "value": one.value,
                    "dataset": one.dataset_name,
                    "digest": one.dataset_digest,
                }
                for one in model.metrics or ()
            ]
            known = {"id": model.model_id, "name": model.name, "status": model.status.value}
            held["logged_model"] = {**known, "scores": scores}
    return held


def _inputs(
    run_uri: str, manifest: RunManifest | None, tags: dict[str, str], mlflow: dict[str, Any] | None
) -> tuple[str, str | None]:
    """The clips and targets of a run; where its folder does not name them, MLflow's inputs or its tags do.

    Tags hold fingerprints, by which the folders beside the run's are named.
    """
    root = run_uri.rstrip("/").rsplit("/", 2)[0]
    held = [one for one in (mlflow or {}).get("inputs", ()) if one["context"] == TRAINING and "uri" in one]
    by_kind = {storage.name(one["uri"].rpartition("/")[0]): one["uri"] for one in held}

    def place(kind: str) -> str | None:
        named = tags.get(kind, _NO_TARGETS)
        return by_kind.get(kind) or (storage.join(root, kind, named) if named != _NO_TARGETS else None)

    clips_uri = (manifest and manifest.clips_uri) or place("clips") or storage.join(root, "clips", "unknown")
    return clips_uri, manifest.targets_uri if manifest else place("targets")


def _targets(uri: str, manifest: TargetManifest | None) -> dict[str, Any]:
    keys = {"created", "rows", "views", "rollout", "student_features", "teacher_features", "teacher_uri"}
    known = manifest.model_dump(mode="json", include=keys, exclude_none=True) if manifest else {}
    known.pop("teacher_uri", None)
    return _link(uri, manifest) | known


def _teacher(
    uri: str, tags: dict[str, str], targets: TargetManifest | None, missing: list[str]
) -> dict[str, Any]:
    """The model that the slots came from; its weights are told by the hashes of its files."""
    link = {"uri": uri, "name": tags.get("teacher"), **(targets.teacher if targets else {})}
    there = _try(lambda: storage.exists(uri), f"the teacher {uri}", missing)
    if there is False:
        missing.append(f"the teacher {uri}: it is not there (any more)")
    return link if there else {**link, "missing": True}


def _evaluation(tags: dict[str, str], missing: list[str]) -> dict[str, Any] | None:
    """The scores that the version was compared by, with their protocol; None where it has none."""
    if "evaluation_uri" not in tags:
        return None
    uri = tags["evaluation_uri"]
    manifest = _read(EvaluationManifest, uri, "the evaluation", missing)
    link = _link(uri, manifest)
    scores = {name: float(tags[f"score.{name}"]) for name in SCORES if f"score.{name}" in tags}
    if manifest:
        link |= {"clips_uri": manifest.clips_uri, "videos": manifest.videos, "created": manifest.created}
    rules = manifest and manifest.protocol
    protocol = {"name": rules.name, "in_words": rules.in_words} if rules else {"name": None, "in_words": None}
    return link | {"scores": scores, "protocol": protocol}


def _clips(uri: str, missing: list[str]) -> dict[str, Any]:
    """A clip set with the ids of the videos that it was made of."""
    manifest = _read(ClipManifest, uri, "the clips", missing)
    link = _link(uri, manifest)
    if manifest is None:
        return link
    keys = {"created", "dataset", "settings", "flow", "videos", "clips", "frames", "annotated_videos", "bad"}
    known = manifest.model_dump(mode="json", include=keys)
    link |= {key: value for key, value in known.items() if value is not None}
    # Clip sets of earlier versions did not say what they were made of; their videos they do name.
    file = SOURCES_FILE if manifest.dataset else INDEX_FILE
    place = storage.join(uri, file)
    ids = _try(lambda: _column(place, "video_id"), f"the list of videos {place}", missing)
    if ids is not None:
        link["video_ids"] = ids
    return link | {"sources_recorded": manifest.dataset is not None}


def _column(uri: str, name: str) -> list[str]:
    with storage.open_read(uri) as file:
        return pq.read_table(file, columns=[name]).column(name).to_pylist()


def _score_lines(evaluation: dict[str, Any]) -> list[str]:
    scores = ", ".join(f"{name} {100 * value:.1f}" for name, value in evaluation["scores"].items())
    rules = evaluation["protocol"]
    lines = [f"  scores: {scores or 'none'}"]
    if rules["name"]:
        lines.append(f"    protocol {rules['name']} ({rules['in_words']}), {evaluation['videos']} videos")
    return lines


def _mlflow_lines(held: dict[str, Any]) -> list[str]:
    lines = ["  in MLflow"]
    for one in held["inputs"]:
        lines.append(f"    {one['context'] or 'input'}: {one['name']} ({one['digest']})")
    model = held["logged_model"]
    if model is None:
        return [*lines, "    no logged model"]
    lines.append(f"    logged model {model['name']} ({model['id']}), {model['status'].lower()}")
    for one in (one for one in model["scores"] if one["score"] in SCORES):
        lines.append(f"      {one['score']} {100 * one['value']:.1f} on {one['dataset']} ({one['digest']})")
    return lines


def _lines(link: dict[str, Any], indent: str) -> list[str]:
    lines = [f"{indent}{link['uri']}{' MISSING' if link.get('missing') else ''}"]
    for key, value in link.items():
        if key not in ("uri", "missing", "video_ids", "bad") and value not in (None, ""):
            lines.append(f"{indent}{key}: {_plain(value)}")
    return lines


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(one)}" for key, one in value.items() if one is not None)
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    return str(value)


def _clip_lines(link: dict[str, Any], indent: str, all_videos: bool) -> list[str]:
    lines = _lines({k: v for k, v in link.items() if k != "sources_recorded"}, indent)
    ids = link.get("video_ids", [])
    if link.get("sources_recorded") is False:
        lines.append(f"{indent}sources were not recorded by the version that made these clips; their videos:")
    shown = ids if all_videos else ids[:SHOWN_VIDEOS]
    lines += [f"{indent}- {video_id}" for video_id in shown]
    if len(shown) < len(ids):
        lines.append(f"{indent}  and {len(ids) - len(shown)} more (--videos shows all)")
    lines += [f"{indent}set aside: {bad['video']} ({bad['reason']})" for bad in link.get("bad", [])]
    return lines
