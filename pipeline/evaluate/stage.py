"""Stage `evaluate`: FG-ARI and mBO of models and trivial baselines over a clip set with masks, on Ray Data.

The unit of work is a subject and a shard; its rows are written as they are made, so that a job that was
killed goes on with what is missing. An evaluation is a published folder: one Parquet row a video, and the
means with their protocol in the manifest. Each is recorded as an MLflow run for the report.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import records, storage
from pipeline.artifacts.once import lease
from pipeline.clips.stage import _published_clips
from pipeline.clips.table import ClipSet, VideoEntry
from pipeline.compute import actor_options, best_device, ray_session
from pipeline.config import Config
from pipeline.config.protocols import Protocol, choose_protocol, describe_protocol
from pipeline.config.sections import ConfigError
from pipeline.evaluate.baselines import BASELINES, Predictor
from pipeline.evaluate.records import VIDEOS_FILE
from pipeline.evaluate.scoring import SCORES, VideoScore, mean_scores, model_predictor, score_video
from pipeline.evaluate.subjects import Subject, _named_model, _own_models, baseline_subjects
from pipeline.log import Progress, log
from pipeline.models import SlotModel
from pipeline.models.build import load_model

ROWS_FOLDER = "rows"  # what each shard's videos scored, until the whole is published


class _ScoreActor:
    """A Ray Data actor that scores a shard's videos with one of the subjects, whose models it keeps."""

    def __init__(self, clips_uri: str, subjects: list[Subject], folders: list[str], protocol: Protocol):
        self.clips = ClipSet(clips_uri)
        self.by_shard = _annotated_videos(self.clips)
        self.subjects = subjects
        self.folders = folders
        self.protocol = protocol
        self.device = best_device()
        self.models: dict[int, SlotModel] = {}

    def _predictor(self, index: int, video: VideoEntry) -> Predictor:
        subject = self.subjects[index]
        if subject.baseline is not None:
            return BASELINES[subject.baseline](subject.num_slots)
        if index not in self.models:
            assert subject.model_uri is not None
            self.models[index] = load_model(subject.model_uri, subject.hints).to(self.device)
        return model_predictor(self.models[index], video.video_id, self.protocol)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        index, shard = row["subject"], row["shard"]
        videos, uri = self.by_shard[shard], storage.join(self.folders[index], ROWS_FOLDER, shard)
        # Ray runs a task again whose answer was lost with its node, though its rows may be there.
        if not storage.exists(uri):
            scores = [
                score_video(self.clips, video, self._predictor(index, video), self.protocol)
                for video in videos
            ]
            _write_rows(uri, scores)
        return {"videos": len(videos)}


def _annotated_videos(clips: ClipSet) -> dict[str, list[VideoEntry]]:
    """The videos with masks in each shard that has any."""
    by_shard: dict[str, list[VideoEntry]] = {}
    for video in clips.videos:
        if video.annotated:
            by_shard.setdefault(video.shard, []).append(video)
    return by_shard


def _write_rows(uri: str, scores: list[VideoScore]) -> None:
    with storage.atomic_write(uri) as file:
        pq.write_table(pa.Table.from_pylist([asdict(s) for s in scores]), file)


def _read_rows(uri: str) -> list[VideoScore]:
    with storage.open_read(uri) as file:
        return [VideoScore(**row) for row in pq.read_table(file).to_pylist()]


def evaluate(config: Config, clips_uri: str, subjects: dict[str, Subject]) -> dict[str, dict[str, Any]]:
    """Scores models and baselines on a clip set, all in one pass over it for each.

    Returns for each name `scores`, `protocol`, the number of `videos` with an object to score, and `uri`,
    where all this and the rows of each video are. The same model under the same protocol is found and reused.

    Raises:
        ValueError: no video of the clip set has masks.
    """
    clips = ClipSet(clips_uri)
    if not clips.manifest["annotated_videos"]:
        raise ValueError(
            f"{clips_uri} has no masks to score against (dataset.kind = {config.dataset.kind}, "
            f"dataset.masks = {config.dataset.masks!r})"
        )
    protocol = choose_protocol(config.evaluate)
    rules = describe_protocol(protocol, clips)
    folder = storage.join(storage.absolute(config.storage.root), "evaluations")
    content = {key: value for key, value in rules.items() if key not in ("name", "in_words")}
    uris = {
        name: storage.join(folder, storage.fingerprint({**content, **subject.identity()}))
        for name, subject in subjects.items()
    }
    if all(storage.is_complete(uri) for uri in uris.values()):
        log("evaluate: all scores found, reusing them")
    else:
        with ExitStack() as leases:
            for uri in sorted(set(uris.values())):  # in one order, so that two jobs can't wait for each other
                if not storage.is_complete(uri):
                    leases.enter_context(lease(uri, "evaluate"))
            # Two names may be one model.
            missing = {uris[name]: name for name in subjects if not storage.is_complete(uris[name])}
            _run(config, clips, protocol, [(subjects[name], uri) for uri, name in missing.items()])
            for uri, name in missing.items():
                _publish(name, uri, clips, rules)
    results = {}
    for name, uri in uris.items():
        manifest = storage.read_manifest(uri)
        results[name] = {"uri": uri, **{key: manifest[key] for key in ("scores", "protocol", "videos")}}
    records.record_evaluations(config, clips_uri, {n: s.record() for n, s in subjects.items()}, results)
    return results


def _publish(name: str, uri: str, clips: ClipSet, rules: dict[str, Any]) -> None:
    rows = storage.join(uri, ROWS_FOLDER)
    scores = [score for shard in _annotated_videos(clips) for score in _read_rows(storage.join(rows, shard))]
    scores.sort(key=lambda s: s.video_id)
    try:
        means = mean_scores(scores)
    except ValueError as error:
        raise ValueError(f"{clips.uri} can't be scored under {rules['in_words']}: {error}") from error
    if means["slots_in_use"] < 2 and name not in BASELINES:
        used = means["slots_in_use"]
        log(f"evaluate: WARNING, {name} uses {used:.1f} slots on average: its slots have collapsed")
    _write_rows(storage.join(uri, VIDEOS_FILE), scores)
    storage.publish(
        uri,
        {
            "kind": "evaluation",
            "fingerprint": storage.name(uri),
            "created": storage.timestamp(),
            "clips_uri": clips.uri,
            "scores": means,
            "protocol": rules,
            "videos": sum(score.image_samples > 0 for score in scores),
        },
    )
    storage.delete(rows)


def _run(config: Config, clips: ClipSet, protocol: Protocol, work: list[tuple[Subject, str]]) -> None:
    """Writes the rows of every subject and shard that are not there yet."""
    by_shard = _annotated_videos(clips)
    rows, done = [], 0
    for index, (_, uri) in enumerate(work):
        written = set(storage.list_names(storage.join(uri, ROWS_FOLDER)))
        rows += [{"subject": index, "shard": shard} for shard in by_shard if shard not in written]
        done += sum(len(videos) for shard, videos in by_shard.items() if shard in written)
    total = len(work) * sum(map(len, by_shard.values()))
    with Progress("evaluate", total, "videos") as progress:
        progress.skip(done)
        for row in _score_on_ray(config, clips, protocol, work, rows):
            progress.advance(row["videos"])


def _score_on_ray(
    config: Config,
    clips: ClipSet,
    protocol: Protocol,
    work: list[tuple[Subject, str]],
    rows: list[dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    if not rows:
        return
    with ray_session(config):
        import ray

        options = actor_options(config, len(rows))
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        subjects, folders = [s for s, _ in work], [uri for _, uri in work]
        yield from dataset.map(
            _ScoreActor,  # type: ignore[arg-type]
            fn_constructor_args=(clips.uri, subjects, folders, protocol),
            **options,
        ).iter_rows()


def score_table(rows: list[tuple[str, dict[str, float]]]) -> str:
    """Scores in percent as text, one row a method."""
    width = max(len(name) for name, _ in rows)
    titles = ("image FG-ARI", "image mBO", "video FG-ARI", "video mBO", "slots in use")
    lines = [" " * width + "".join(f"{title:>14}" for title in titles)]
    for name, scores in rows:
        cells = [f"{round(100 * scores[key], 1) + 0.0:14.1f}" for key in SCORES] + [
            f"{scores['slots_in_use']:14.1f}"
        ]
        lines.append(name.ljust(width) + "".join(cells))
    return "\n".join(lines)


def evaluate_subjects(config: Config, subjects: dict[str, Subject]) -> dict[str, dict[str, Any]]:
    """Scores on the evaluation split.

    Raises:
        ConfigError: the config names none.
    """
    if config.evaluate.split is None:
        raise ConfigError("evaluate.split: is not set; name the split whose videos have masks")
    return evaluate(config, _published_clips(config, config.evaluate.split), subjects)


def evaluate_stage(config: Config) -> dict[str, Any]:
    """Scores `evaluate.model` or the student of this config, beside its teacher and trivial baselines.

    Prints the table; the summary is the student's.
    """
    models = _named_model(config) if config.evaluate.model else _own_models(config)
    name, subject = next(iter(models.items()))
    assert subject.model_uri is not None
    # Also without baselines: a file of which the config says too little is refused before Ray starts.
    slots = load_model(subject.model_uri, subject.hints).config.num_slots
    baselines = baseline_subjects(slots) if config.evaluate.baselines else {}
    results = evaluate_subjects(config, {**baselines, **models})
    print(score_table([(n, r["scores"]) for n, r in results.items()]))
    print(f"protocol {results[name]['protocol']['name']}: {results[name]['protocol']['in_words']}")
    return results[name]
