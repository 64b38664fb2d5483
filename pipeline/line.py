"""The whole line in one go: videos to a champion pulled from the registry, with its table and pictures."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pipeline import stages, storage
from pipeline.artifacts.identity import require_teacher
from pipeline.clips.stage import find_videos, shard
from pipeline.clips.table import ClipSet
from pipeline.compute import best_device, ray_session
from pipeline.config import Config, with_overrides
from pipeline.distill.stage import distill, train_teacher
from pipeline.evaluate.scoring import SCORES
from pipeline.evaluate.stage import evaluate, score_table
from pipeline.log import log
from pipeline.models import SlotModel, load_slot_model
from pipeline.models.build import checkpoint_hints, load_model, load_teacher
from pipeline.registry.stage import CHAMPION, pull, register
from pipeline.report.gallery import GROUND_TRUTH, video_panel
from pipeline.segment.figures import comparison, to_png
from pipeline.segment.stage import segment
from pipeline.targets.stage import cache

NO_KD = "student, no KD"
SLOTMATCH = "SlotMatch"


def run_pipeline(config: Config) -> dict[str, Any]:
    """shard, teacher (where none is given), cache, distill with and without KD, evaluate, register, pull
    and segment. Whatever an earlier run made of the same input is reused.

    Returns the summary; the table and where to look are printed.
    """
    with ray_session(config):
        return _run_pipeline(config)


def _run_pipeline(config: Config) -> dict[str, Any]:
    stages.check_disjoint(config)
    _title(1, "shard the videos")
    train = shard(config, config.dataset.split)
    held_out = shard(config, config.evaluate.split) if config.evaluate.split is not None else None
    clips = ClipSet(train["uri"])
    _title(2, "the teacher")
    if config.teacher.checkpoint is None:
        train_teacher(config, clips.uri)
    teacher_uri = require_teacher(config, clips.fingerprint)
    log(f"teacher: {teacher_uri}")
    _title(3, "cache the teacher's slots")
    targets = cache(config, clips.uri)
    _title(4, "train a student without distillation, then one with SlotMatch")
    configs = {
        NO_KD: with_overrides(config, {"distill.method": "no_kd", "distill.name": NO_KD}),
        SLOTMATCH: with_overrides(config, {"distill.name": config.distill.name or SLOTMATCH}),
    }
    runs = {name: distill(c, clips.uri) for name, c in configs.items()}
    evaluations: dict[str, dict[str, Any]] = {}
    if held_out is not None:
        _title(5, f"score them on {held_out['videos']} videos that nobody trained on")
        teacher = stages.teacher_subject(config, teacher_uri)
        slots = load_teacher(config, teacher_uri).config.num_slots
        subjects = {
            **(stages.baseline_subjects(slots) if config.evaluate.baselines else {}),
            "teacher": teacher,
        }
        subjects |= {name: stages.student_subject(run["uri"]) for name, run in runs.items()}
        evaluations = evaluate(config, held_out["uri"], subjects)
    _title(6, "register the students, pull the champion, segment a video")
    registered = [register(c, runs[name]["uri"], evaluations.get(name)) for name, c in configs.items()]
    folder = (
        Path(storage.absolute(config.storage.root))
        if not storage.is_remote(config.storage.root)
        else Path("runs")
    )
    out = folder / "demo"
    champion = f"models:/{config.mlflow.model_name}@{CHAMPION}"
    pull(champion, out / "champion", config.tracking_uri)
    split = config.evaluate.split if config.evaluate.split is not None else config.dataset.split
    shown = ClipSet((held_out or train)["uri"]).videos[0].video_id
    video = next(v for v in find_videos(config, split) if v.video_id == shown)
    segmented = segment(load_slot_model(out / "champion").to(best_device()), video, out / "segmented")
    models = {"teacher": teacher_uri} | {n: r["model"] for n, r in runs.items()}
    strip = comparison_strip(config, (held_out or train)["uri"], models, out / "comparison.png")
    _closing(config, evaluations, champion, strip, segmented)
    return {
        "uri": champion,
        "clips": train["uri"],
        "targets": targets["uri"],
        "videos": train["videos"],
        "frames": train["frames"],
        "bad": train["bad"],
        "reused": {
            "clips": train["computed_shards"] == 0,
            "targets": targets["computed_shards"] == 0,
            "students": all(run["reused"] for run in runs.values()),
        },
        "scores": {n: {k: e["scores"][k] for k in SCORES} for n, e in evaluations.items()},
        "versions": [r["version"] for r in registered],
        "overlay": segmented["overlay"],
        "comparison": str(strip),
    }


def comparison_strip(config: Config, clips_uri: str, models: dict[str, str], path: Path) -> Path:
    """A picture of one video: frames over each model's slots, in the colours of the last one's, and its objects."""
    clips = ClipSet(clips_uri)
    video = clips.videos[0]
    hints = checkpoint_hints(config)  # of the teacher; students are folders, which need none
    rows: dict[str, SlotModel | None] = {
        name: load_model(uri, hints).to(best_device()) for name, uri in models.items()
    }
    if video.annotated:
        rows[GROUND_TRUTH] = None
    panel = video_panel(clips, video, rows, video.video_id)
    picture = comparison([panel], reference=list(models)[-1], columns=6, across=1, width=1000)
    storage.write_bytes(str(path), to_png(picture))
    return path


def _title(number: int, text: str) -> None:
    width = shutil.get_terminal_size((80, 20)).columns
    log(f"\n--- {number}/6 {text} ".ljust(min(width, 80), "-"))


def _closing(
    config: Config,
    evaluations: dict[str, dict[str, Any]],
    champion: str,
    strip: Path,
    segmented: dict[str, Any],
) -> None:
    if evaluations:
        first = next(iter(evaluations.values()))
        which = first["protocol"]["fingerprint"]
        print(f"\nScores in percent on {first['videos']} held-out videos (evaluation {which}):")
        print(score_table([(name, e["scores"]) for name, e in evaluations.items()]))
    print(
        f"""
Where to look
  runs and metrics   mlflow ui --backend-store-uri {config.tracking_uri}
  all models         {strip}
  tables, figures    made by: make report   (python -m jobs.report CONFIG)
  overlay video      {segmented["overlay"]}
  contact sheet      {segmented["sheet"]}
  registered model   {champion}   (python -m jobs.pull {champion} DIR storage.root={config.storage.root})
""",
        flush=True,
    )
