"""The whole line in one go: videos to a champion pulled from the registry, with its table and pictures."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline import storage, tracking
from pipeline.artifacts.identity import Artifacts
from pipeline.artifacts.once import is_whole
from pipeline.clips.library import ClipLibrary, artifacts_of, open_clips, require_generated
from pipeline.clips.stage import shard
from pipeline.clips.table import ClipSet
from pipeline.compute import OneRay, best_device, gpus_to_use, one_ray, ray_session
from pipeline.config import Config, ConfigError
from pipeline.config.protocols import PRESETS
from pipeline.distill.stage import distill, run_files, train_teacher
from pipeline.distill.students import students_of
from pipeline.evaluate.baselines import Predictor
from pipeline.evaluate.records import Evaluation
from pipeline.evaluate.scoring import SCORES, model_predictor, score_table
from pipeline.evaluate.stage import score_subjects
from pipeline.evaluate.subjects import run_subject, teacher_subject, trivial_subjects
from pipeline.evaluate.table import plain_text
from pipeline.log import log
from pipeline.models import CheckpointHints, load_slot_model
from pipeline.models.build import checkpoint_hints, load_model, load_teacher
from pipeline.registry.stage import CHAMPION, pull, register_run
from pipeline.report.gallery import GROUND_TRUTH, video_panel
from pipeline.segment.figures import comparison, to_png
from pipeline.segment.stage import segment
from pipeline.sweep.stage import sweep_places
from pipeline.sweep.trials import concurrent_trials
from pipeline.targets.stage import cache

_T = TypeVar("_T")


def run(config: Config) -> dict[str, Any]:
    """shard, teacher (where none is given), cache, distill with and without KD, evaluate, register, pull
    and segment. Whatever an earlier run made of the same input is reused.

    Returns the summary; the table and where to look are printed.
    """
    if config.teacher.checkpoint is None and config.teacher.uses_boxes:
        raise ConfigError(  # before hours of training
            "teacher.savi.conditioning: boxes, from which students can't start, so that it does not teach; nearest "
            "valid: none, or of the stages only shard, train and evaluate"
        )
    with one_ray() as session, ThreadPoolExecutor(1) as beside:
        _title(1, "shard the videos")
        library = ClipLibrary()
        train = shard(config, library)
        artifacts = artifacts_of(config, library=library)
        _title(2, "the teacher")
        if config.teacher.checkpoint is None:
            train_teacher(config, artifacts)
        teacher_uri = artifacts.require_teacher()
        log(f"teacher: {teacher_uri}")
        _title(3, "cache the teacher's slots")
        # A new database takes seconds, which nothing waits for yet; what goes wrong with it is said where it is used.
        beside.submit(tracking.connect, config)
        targets = cache(config, artifacts)
        _title(4, "train a student without distillation, and one with SlotMatch")
        configs = students_of(config)
        runs = _train(artifacts, configs, session)
        evaluations = _evaluate(artifacts, teacher_uri, {name: r["uri"] for name, r in runs.items()})
        _title(6, "register the students, pull the champion, segment a video")
        registered = [register_run(c, runs[n]["uri"], evaluations.get(n)) for n, c in configs.items()]
        models = {"teacher": teacher_uri} | {name: r["model"] for name, r in runs.items()}
        shown = _show(artifacts, library, models)
        _closing(config, evaluations, shown)
    return {
        "uri": shown.champion,
        "clips": train["uri"],
        "targets": targets["uri"],
        "videos": train["videos"],
        "frames": train["frames"],
        "bad": train["bad"],
        "reused": {
            "clips": train["computed_shards"] == 0,
            "targets": targets["computed_shards"] == 0,
            "students": all(r["reused"] for r in runs.values()),
        },
        "scores": {name: {key: e.scores[key] for key in SCORES} for name, e in evaluations.items()},
        "versions": [r["version"] for r in registered],
        "overlay": shown.segmented["overlay"],
        "comparison": str(shown.comparison),
    }


def _train(artifacts: Artifacts, configs: dict[str, Config], session: OneRay) -> dict[str, dict[str, Any]]:
    """The runs of the students by their names, trained at the same time where the machines have room for that."""
    of = {name: artifacts.of(config) for name, config in configs.items()}
    left = [config for name, config in configs.items() if not is_whole(of[name].student.uri, run_files)]
    calls = [functools.partial(distill, config, of[name]) for name, config in configs.items()]
    done = (
        _together(calls, session)
        if _have_room(artifacts.config, left, session)
        else [call() for call in calls]
    )
    return dict(zip(configs, done, strict=True))


def _have_room(config: Config, left: list[Config], session: OneRay) -> bool:
    """Whether these students can be trained at the same time, on workers of a Ray that is ours to end."""
    if len(left) < 2 or not config.distill.workers:
        return False
    with ray_session(config):
        import ray

        gpus_to_use(config)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        try:
            return session.ours and concurrent_trials(nodes, left) == len(left)
        except ConfigError:
            return False  # not even for one, which the training says in its own words


def _together(calls: Sequence[Callable[[], _T]], session: OneRay) -> list[_T]:
    """The results of functions that train on Ray, all at the same time.

    Where one fails, or at Ctrl-C, Ray ends, and with it the other trainings, which go on the next time.

    Raises what the first that fails has raised.
    """
    with ThreadPoolExecutor(len(calls)) as pool:
        running = [pool.submit(call) for call in calls]
        try:
            for done in as_completed(running):
                done.result()
        except BaseException:
            session.end()
            raise
    return [done.result() for done in running]


def made_of(config: Config) -> set[str]:
    """URIs of what the stages, the line and the sweep of a config make and use; nothing is made here.

    Raises:
        ConfigError: they can't be known, as the videos or the teacher's file are not there.
    """
    splits = [split for split in (config.dataset.split, config.evaluate.split) if split is not None]
    try:
        found = {require_generated(config, s) for s in splits if config.dataset.kind == "synthetic"}
        artifacts = artifacts_of(config)
        found |= {artifacts.clips_of(split).uri for split in splits}
        for one in (config, *students_of(config).values()):
            found |= _made_of(artifacts.of(one))
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"what this config uses can't be known, so nothing is looked for: {error}"
        ) from error
    with contextlib.suppress(ConfigError):  # which has no sweep that could be run
        found |= {uri for uri in sweep_places(artifacts) if uri is not None}
    return found


def _made_of(artifacts: Artifacts) -> set[str]:
    found = {artifacts.teacher.uri}
    models = (artifacts.config.teacher, artifacts.config.student)
    found |= {artifacts.features(model).uri for model in models if model.cached_features}
    for find in (lambda: artifacts.targets.uri, lambda: artifacts.student.uri):
        try:
            found.add(find())
        except ConfigError:
            # Before a teacher has been trained there is nothing that was made of it.
            if artifacts.config.teacher.checkpoint or storage.exists(artifacts.teacher.uri):
                raise
    return found


def _evaluate(artifacts: Artifacts, teacher_uri: str, runs: dict[str, str]) -> dict[str, Evaluation]:
    """Scores of baselines, teacher and students, by name; none where no split is named to score on."""
    config = artifacts.config
    if config.evaluate.split is None:
        return {}
    clips = open_clips(artifacts.evaluation_clips)
    _title(5, f"score them on {clips.manifest.videos} videos that nobody trained on")
    teacher = load_teacher(config, teacher_uri).config
    models = {"teacher": teacher_subject(config, teacher_uri, teacher)}
    models |= {name: run_subject(uri) for name, uri in runs.items()}
    return score_subjects(artifacts, clips, trivial_subjects(config, teacher.num_slots, models) | models)


@dataclass(frozen=True)
class _Shown:
    """What there is to look at."""

    champion: str
    comparison: Path
    segmented: dict[str, Any]


def _show(artifacts: Artifacts, library: ClipLibrary, models: dict[str, str]) -> _Shown:
    """Pulls the champion, segments a video with it, and compares the models on that video."""
    config = artifacts.config
    root = config.storage.root
    out = (Path("runs") if storage.is_remote(root) else Path(storage.absolute(root))) / "demo"
    champion = f"models:/{config.mlflow.model_name}@{CHAMPION}"
    pull(champion, out / "champion", config.tracking_uri)
    held_out = config.evaluate.split is not None
    split = config.evaluate.split if config.evaluate.split is not None else config.dataset.split
    clips_uri = (artifacts.evaluation_clips if held_out else artifacts.clips).uri
    first = ClipSet(clips_uri).videos[0].video_id
    video = next(v for v in library.videos(config, split) if v.video_id == first)
    segmented = segment(load_slot_model(out / "champion").to(best_device()), video, out / "segmented")
    strip = comparison_strip(config, clips_uri, models, out / "comparison.png")
    return _Shown(champion, strip, segmented)


def comparison_strip(config: Config, clips_uri: str, models: dict[str, str], path: Path) -> Path:
    """A picture of one video: frames over each model's slots, in the colours of the last one's, and its objects."""
    clips = ClipSet(clips_uri)
    video = clips.videos[0]
    hints = {"teacher": checkpoint_hints(config)}  # students are folders, which need none
    protocol = PRESETS["slotcontrast"]
    rows: dict[str, Predictor | None] = {}
    for name, uri in models.items():
        model = load_model(uri, hints.get(name, CheckpointHints())).to(best_device())
        rows[name] = model_predictor(model, video.video_id, protocol)
    if video.annotated:
        rows[GROUND_TRUTH] = None
    panel = video_panel(clips, video, rows, video.video_id, protocol)
    picture = comparison([panel], reference=list(models)[-1], columns=6, across=1, width=1000)
    storage.write_bytes(str(path), to_png(picture))
    return path


def _title(number: int, text: str) -> None:
    width = shutil.get_terminal_size((80, 20)).columns
    log(f"\n--- {number}/6 {text} ".ljust(min(width, 80), "-"))


def _closing(config: Config, evaluations: dict[str, Evaluation], shown: _Shown) -> None:
    if evaluations:
        first = next(iter(evaluations.values()))
        which = first.protocol.fingerprint
        print(f"\nScores in percent on {first.videos} held-out videos (evaluation {which}):")
        rows = [(name, e.scores) for name, e in evaluations.items()]
        print(plain_text(score_table(rows, first.protocol.warnings)))
    champion = shown.champion
    print(
        f"""
Where to look
  runs and metrics   mlflow ui --backend-store-uri {config.tracking_uri}
  all models         {shown.comparison}
  tables, figures    made by: make report   (python -m jobs.report CONFIG)
  overlay video      {shown.segmented["overlay"]}
  contact sheet      {shown.segmented["sheet"]}
  registered model   {champion}   (python -m jobs.pull {champion} DIR storage.root={config.storage.root})
""",
        flush=True,
    )
