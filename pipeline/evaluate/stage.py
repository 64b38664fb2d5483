"""Stage `evaluate`: scores of models and trivial baselines over a clip set with masks, on Ray Data.

The unit of work is a subject and a shard; its rows are written as they are made, so that a job that was
killed goes on with what is missing. An evaluation is a published folder: one Parquet row a video, and the
means with their protocol in the manifest. Each is recorded as an MLflow run for the report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline import storage
from pipeline.artifacts.identity import Artifacts
from pipeline.artifacts.manifests import EvaluationManifest, Rules
from pipeline.artifacts.once import all_once
from pipeline.clips.library import artifacts_of, open_clips
from pipeline.clips.table import ClipSet, VideoEntry
from pipeline.compute import best_device, map_tasks, one_ray
from pipeline.config import Config
from pipeline.config.protocols import Protocol, choose_protocol
from pipeline.evaluate.backbones import SharedBackbones
from pipeline.evaluate.baselines import BASELINES, Predictor, feature_kmeans
from pipeline.evaluate.degenerate import score_warnings
from pipeline.evaluate.records import VIDEOS_FILE, Evaluation, record_evaluations
from pipeline.evaluate.scoring import (
    VideoScore,
    boxes_of_samples,
    mean_scores,
    model_predictor,
    score_table,
    score_videos,
)
from pipeline.evaluate.subjects import Subject, named_model, of_its_system, own_models, trivial_subjects
from pipeline.evaluate.table import plain_text
from pipeline.log import Progress, log
from pipeline.models import CheckpointHints, SlotModel
from pipeline.models.build import open_model, title_of
from pipeline.models.segmenter import Segmenter

ROWS_FOLDER = "rows"  # what each shard's videos scored, until the whole is published


def evaluate(config: Config) -> dict[str, Any]:
    """Scores `evaluate.model` or the student of this config, beside its teacher and trivial baselines.

    Prints the table; the summary is the student's.

    Raises:
        ConfigError: no split to score on is named, its clips have not been made, or there is no such model.
        storage.IncompleteError: the student has not been trained.
    """
    artifacts = artifacts_of(config)
    models = named_model(config) if config.evaluate.model else own_models(artifacts)
    name, subject = next(iter(models.items()))
    assert subject.model_uri is not None
    # Also without baselines: a file of which the config says too little is refused before Ray starts.
    opened = open_model(subject.model_uri, subject.hints, best_device()).config
    if config.evaluate.model:
        name = title_of(name, opened)
        models = {name: subject}
    models[name] = of_its_system(subject, opened)
    baselines = trivial_subjects(config, opened.num_slots, models)
    clips = open_clips(artifacts.evaluation_clips)
    results = score_subjects(artifacts, clips, {**baselines, **models})
    protocol = results[name].protocol
    print(plain_text(score_table([(n, r.scores) for n, r in results.items()], protocol.warnings)))
    print(f"protocol {protocol.name}: {protocol.in_words}")
    return results[name].summary()


def score_subjects(
    artifacts: Artifacts, clips: ClipSet, subjects: dict[str, Subject]
) -> dict[str, Evaluation]:
    """Scores models and baselines on a clip set with masks, in one pass over it for each.

    The same model under the same protocol is found and reused.

    Raises:
        ValueError: no video of the clip set has masks.
    """
    config = artifacts.config
    if not clips.manifest.annotated_videos:
        raise ValueError(
            f"{clips.uri} has no masks to score against (dataset.kind = {config.dataset.kind}, "
            f"dataset.masks = {config.dataset.masks!r})"
        )
    warnings = score_warnings(clips, choose_protocol(config.evaluate))
    for warning in warnings:
        log(f"evaluate: WARNING, {warning}")
    uris = {name: artifacts.scores_of(s.identity(), clips.uri).uri for name, s in subjects.items()}
    inputs = [clips.uri, *(subject.model_uri for subject in subjects.values())]
    with all_once(uris.values(), "evaluate", files=lambda uri: [VIDEOS_FILE], inputs=inputs) as left:
        # Two names may be one model.
        missing = {uri: name for name, uri in uris.items() if uri in left}
        work = _Scoring(config, clips, [(subjects[name], uri) for uri, name in missing.items()])
        work.run()
        rules = artifacts.rules_on(clips.uri).model_copy(update={"warnings": warnings})
        for uri, name in missing.items():
            work.publish(name, subjects[name], uri, rules)
    if not left:
        log("evaluate: all scores found, reusing them")
    results = {}
    for name, uri in uris.items():
        manifest = EvaluationManifest.read(uri)
        rules = manifest.protocol.model_copy(update={"warnings": warnings})  # earlier versions did not warn
        results[name] = Evaluation(uri, manifest.scores, rules, manifest.videos)
    record_evaluations(config, clips.uri, {n: s.record() for n, s in subjects.items()}, results)
    return results


class ScoreTask:
    """A task that is a class (see `map_tasks`): scores a shard's videos with a model or k-means on its features.

    It keeps the models.
    """

    def __init__(self, clips_uri: str, work: Sequence[tuple[Subject, str]], protocol: Protocol) -> None:
        self.clips = ClipSet(clips_uri)
        self.by_shard = _annotated_videos(self.clips)
        self.work = work
        self.protocol = protocol
        self.device = best_device()
        self.models: dict[tuple[str, CheckpointHints], Segmenter] = {}
        self.backbones = SharedBackbones()

    def _model(self, subject: Subject) -> Segmenter:
        assert subject.model_uri is not None
        key = (subject.model_uri, subject.hints)
        if key not in self.models:
            self.models[key] = open_model(*key, self.device)
            if isinstance(model := self.models[key], torch.nn.Module):
                self.backbones.share(model)
        return self.models[key]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        (subject, uri), videos = self.work[row["subject"]], self.by_shard[row["shard"]]

        def predictor(video: VideoEntry) -> Predictor:
            return subject_predictor(subject, self._model(subject), self.clips, video, self.protocol)

        _score_shard(self.clips, videos, predictor, self.protocol, _rows_uri(uri, row))
        return {"videos": len(videos)}


def subject_predictor(
    subject: Subject, model: Segmenter, clips: ClipSet, video: VideoEntry, protocol: Protocol
) -> Predictor:
    """Labels of what needs a model: its own, or those of k-means on its features."""
    if subject.baseline is None:
        given = boxes_of_samples(model, clips, video, protocol)
        return model_predictor(model, video.video_id, protocol, given)
    assert isinstance(model, SlotModel)  # see `feature_subjects`
    return feature_kmeans(model, subject.num_slots)


def score_baseline(
    row: dict[str, Any], clips_uri: str, work: Sequence[tuple[Subject, str]], protocol: Protocol
) -> dict[str, Any]:
    """A task (see `map_tasks`): scores a shard's videos with one trivial baseline, which needs one CPU."""
    subject, uri = work[row["subject"]]
    assert subject.baseline is not None
    predict = BASELINES[subject.baseline](subject.num_slots)
    clips, by_shard = _opened(clips_uri)
    videos = by_shard[row["shard"]]
    _score_shard(clips, videos, lambda _: predict, protocol, _rows_uri(uri, row))
    return {"videos": len(videos)}


@lru_cache(maxsize=1)  # a process of Ray's does one task after the other
def _opened(clips_uri: str) -> tuple[ClipSet, dict[str, list[VideoEntry]]]:
    clips = ClipSet(clips_uri)
    return clips, _annotated_videos(clips)


def _rows_uri(evaluation_uri: str, row: dict[str, Any]) -> str:
    return storage.join(evaluation_uri, ROWS_FOLDER, row["shard"])


def _score_shard(
    clips: ClipSet,
    videos: Sequence[VideoEntry],
    predictor: Callable[[VideoEntry], Predictor],
    protocol: Protocol,
    uri: str,
) -> None:
    """Writes the videos' scores to `uri`, where they are not there yet."""
    if not storage.exists(uri):
        _write_rows(uri, score_videos(clips, videos, predictor, protocol))


@dataclass
class _Scoring:
    """Scores subjects into their folders."""

    config: Config
    clips: ClipSet
    work: list[tuple[Subject, str]]

    def run(self) -> None:
        """Writes the rows of every subject and shard that are not there yet."""
        if not self.work:
            return
        by_shard = _annotated_videos(self.clips)
        done = 0
        rows: dict[Any, list[dict[str, Any]]] = {ScoreTask: [], score_baseline: []}
        for index, (subject, uri) in enumerate(self.work):
            written = set(storage.list_names(storage.join(uri, ROWS_FOLDER)))
            task = score_baseline if subject.model_uri is None else ScoreTask
            rows[task] += [{"subject": index, "shard": shard} for shard in by_shard if shard not in written]
            done += sum(len(videos) for shard, videos in by_shard.items() if shard in written)
        total = len(self.work) * sum(map(len, by_shard.values()))
        arguments = (self.clips.uri, self.work, choose_protocol(self.config.evaluate))
        with one_ray(), Progress("evaluate", total, "videos") as progress:
            progress.skip(done)
            for task, own in rows.items():
                # The largest first: one that begins last leaves the other processes idle. A shard's subjects follow
                # each other, as they may share its features.
                own.sort(key=lambda row: (-len(by_shard[row["shard"]]), row["shard"]))
                for row in map_tasks(self.config, task, own, arguments=arguments):
                    progress.advance(row["videos"])

    def publish(self, name: str, subject: Subject, uri: str, rules: Rules) -> None:
        rows = storage.join(uri, ROWS_FOLDER)
        shards = _annotated_videos(self.clips)
        scores = [score for shard in shards for score in _read_rows(storage.join(rows, shard))]
        scores.sort(key=lambda s: s.video_id)
        try:
            means = mean_scores(scores)
        except ValueError as error:
            way_out = "; try evaluate.min_objects=0 evaluate.min_object_area=0" if rules.min_objects else ""
            raise ValueError(
                f"{self.clips.uri} can't be scored under {rules.in_words}: {error}{way_out}"
            ) from error
        if means["slots_in_use"] < 2 and subject.baseline is None:
            used = means["slots_in_use"]
            log(f"evaluate: WARNING, {name} uses {used:.1f} slots on average: its slots have collapsed")
        _write_rows(storage.join(uri, VIDEOS_FILE), scores)
        EvaluationManifest(
            fingerprint=storage.name(uri),
            created=storage.timestamp(),
            clips_uri=self.clips.uri,
            scores=means,
            protocol=rules,
            videos=sum(score.image_samples > 0 for score in scores),
        ).publish(uri)
        storage.delete(rows)


def _annotated_videos(clips: ClipSet) -> dict[str, list[VideoEntry]]:
    """The videos with masks in each shard that has any."""
    by_shard: dict[str, list[VideoEntry]] = {}
    for video in clips.videos:
        if video.annotated:
            by_shard.setdefault(video.shard, []).append(video)
    return by_shard


def _write_rows(uri: str, scores: list[VideoScore]) -> None:
    with storage.atomic_write(uri) as file:
        # What only some protocols score has no column under the others.
        rows = [{k: v for k, v in asdict(score).items() if v is not None} for score in scores]
        pq.write_table(pa.Table.from_pylist(rows), file)


def _read_rows(uri: str) -> list[VideoScore]:
    with storage.open_read(uri) as file:
        return [VideoScore(**row) for row in pq.read_table(file).to_pylist()]
