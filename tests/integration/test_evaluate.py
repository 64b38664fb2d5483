"""Evaluation over shards on Ray, its records in MLflow, and validation while training."""

import math

import numpy as np
import pyarrow.parquet as pq
import pytest
from clip_sets import make_clip_set, random_video
from layouts import write_davis
from places import GOLDEN, ROOT
from tiny_models import tiny_model

from jobs._main import run as run_job
from jobs.export import JOB
from pipeline import line, storage
from pipeline.artifacts.identity import Artifact, Artifacts
from pipeline.clips.library import artifacts_of
from pipeline.clips.stage import shard
from pipeline.clips.table import ClipSet
from pipeline.config import ConfigError, resolve_config, with_overrides
from pipeline.config.protocols import PRESETS, choose_protocol
from pipeline.distill.stage import distill
from pipeline.distill.validation import Validation
from pipeline.evaluate.records import VIDEOS_FILE, find_records
from pipeline.evaluate.scoring import SCORES, mean_scores, model_predictor, score_video
from pipeline.evaluate.stage import ROWS_FOLDER, _write_rows, evaluate, score_subjects
from pipeline.evaluate.subjects import Subject
from pipeline.models import CheckpointHints, load_slot_model, save_slot_model
from pipeline.registry.export import export
from pipeline.registry.stage import pull, register
from pipeline.report.gallery import GROUND_TRUTH, Gallery
from pipeline.report.pictures import model_speeds
from pipeline.report.select import select_runs
from pipeline.tracking import client as mlflow_client


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    rng = np.random.default_rng(0)
    videos = {f"video {i}": random_video(rng, frames=5 + i) for i in range(5)}
    videos["unannotated"] = (random_video(rng)[0], None)
    return make_clip_set(tmp_path_factory.mktemp("clips"), videos)


@pytest.fixture(scope="module")
def model_uri(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_slot_model(tiny_model(4, 16), folder)
    return str(folder)


def without_masks(folder):
    return make_clip_set(folder, {"v": (random_video(np.random.default_rng(0))[0], None)})


def score(config, clips, subjects):
    return score_subjects(artifacts_of(config), clips, subjects)


def score_one(clips, video, model, protocol):
    return score_video(clips, video, model_predictor(model, video.video_id, protocol), protocol)


def scores_of(clips, model_uri, protocol):
    model = load_slot_model(model_uri)
    return [score_one(clips, video, model, protocol) for video in clips.videos if video.annotated]


def test_every_video_is_scored_once_and_recorded_once(tiny, local_ray, clips, model_uri):
    config = tiny("dataset.name=made")
    tags = {"method": "slotmatch", "beta": "0.2", "seed": "3", "trained_on": "made"}
    subjects = {"grid": Subject(baseline="grid", num_slots=4), "mine": Subject(model_uri, tags=tags)}
    results = score(config, clips, subjects)
    expected = scores_of(clips, model_uri, PRESETS["slotcontrast"])
    assert results["mine"].scores == pytest.approx(mean_scores(expected))
    assert results["mine"].videos == 5
    rows = pq.read_table(f"{results['mine'].uri}/{VIDEOS_FILE}").to_pylist()
    assert [row["video_id"] for row in rows] == [f"video {i}" for i in range(5)]
    assert rows[3]["video_mbo"] == pytest.approx(expected[3].video_mbo)
    assert score(config, clips, subjects) == results

    records = {record.name: record for record in find_records(config)}
    assert len(find_records(config)) == len(records) == 2
    mine = records["mine"]
    assert (mine.method, mine.beta, mine.seed) == ("slotmatch", 0.2, 3)
    assert (mine.dataset, mine.trained_on) == ("made", "made")
    assert mine.protocol == results["mine"].protocol
    assert mine.scores == pytest.approx(results["mine"].scores)
    assert mine.clips_uri == clips.uri
    assert [row["video_id"] for row in mine.per_video()] == [row["video_id"] for row in rows]
    assert records["grid (N = 4)"].method == "baseline"
    assert records["grid (N = 4)"].model_uri is None


def test_shards_that_were_scored_before_a_kill_are_not_scored_again(tiny, local_ray, clips, model_uri):
    config = tiny()
    subject = {"mine": Subject(model_uri)}
    whole = score(config, clips, subject)["mine"]
    scores = scores_of(clips, model_uri, PRESETS["slotcontrast"])
    # What a killed job leaves: rows of one shard, here told apart by a score that nobody computes.
    storage.delete(whole.uri)
    first = [s for s in scores if s.video_id in ("video 0", "video 1")]
    marked = [type(s)(**{**s.__dict__, "video_mbo": 7.0}) for s in first]
    _write_rows(storage.join(whole.uri, ROWS_FOLDER, "shard-00000.parquet"), marked)
    again = score(config, clips, subject)["mine"]
    rows = pq.read_table(f"{again.uri}/{VIDEOS_FILE}").to_pylist()
    assert [row["video_mbo"] == 7.0 for row in rows] == [True, True, False, False, False]


def test_another_protocol_is_another_evaluation(tiny, local_ray, clips, model_uri):
    subject = {"mine": Subject(model_uri)}
    whole = score(tiny(), clips, subject)["mine"]
    config = tiny("evaluate.protocol=paper", "evaluate.masks=attention")
    paper = score(config, clips, subject)["mine"]
    assert paper.uri != whole.uri
    assert paper.protocol.name == "paper, masks=attention"
    expected = mean_scores(scores_of(clips, model_uri, choose_protocol(config.evaluate)))
    assert paper.scores == pytest.approx(expected)
    solv = score(tiny("evaluate.protocol=solv"), clips, subject)["mine"]
    assert solv.scores.keys() - whole.scores.keys() == {"matched_fg_ari", "matched_miou"}
    rows = solv.per_video().values()
    assert solv.scores["matched_miou"] == pytest.approx(
        np.average([row["matched_miou"] for row in rows], weights=[row["objects"] for row in rows])
    )
    assert "objects" not in whole.per_video()["video 1"]
    records = {record.protocol.name: record.scores for record in find_records(config)}
    assert records == {
        "slotcontrast": pytest.approx(whole.scores),
        "paper, masks=attention": pytest.approx(paper.scores),
        "solv": pytest.approx(solv.scores),
    }


def test_a_lost_server_loses_no_scores(tiny, local_ray, clips, model_uri, monkeypatch, capfd):
    monkeypatch.setattr(mlflow_client, "SECONDS_TO_WAIT", 0.5)
    subject = {"mine": Subject(model_uri)}
    down = tiny("mlflow.tracking_uri=http://127.0.0.1:9")
    scores = score(down, clips, subject)["mine"].scores
    assert "could not be recorded" in capfd.readouterr().err
    up = tiny()
    assert score(up, clips, subject)["mine"].scores == scores
    assert "all scores found" in capfd.readouterr().err
    assert [record.name for record in find_records(up)] == ["mine"]


def test_a_record_that_broke_half_way_is_made_anew(tiny, local_ray, clips, model_uri, monkeypatch, capfd):
    subject = {"mine": Subject(model_uri, tags={"method": "slotmatch"})}
    config = tiny()

    def broken(*_, **__):
        raise ConnectionError("the server went away")

    with monkeypatch.context() as patch:
        patch.setattr("mlflow.MlflowClient.log_batch", broken)
        score(config, clips, subject)
    assert "the server went away" in capfd.readouterr().err
    assert find_records(config) == []
    score(config, clips, subject)
    assert [record.method for record in find_records(config)] == ["slotmatch"]
    score(config, clips, {"who knows": Subject(model_uri)})
    assert [record.method for record in find_records(config)] == ["slotmatch"], "what is known is kept"


def test_a_record_holds_what_a_public_file_does_not_tell(tiny, local_ray, clips):
    """So that the report can load the model again: its speed, and its slots in pictures."""
    half = "[0.5, 0.5, 0.5]"
    settings = ["teacher.num_heads=3", f"teacher.mean={half}", f"teacher.std={half}"]
    settings += [f"evaluate.model={GOLDEN / 'videosaur_tiny.ckpt'}", "evaluate.baselines=false"]
    with pytest.raises(ConfigError, match=r"teacher\.num_slots: must be given"):
        _evaluate_named(tiny(*settings, "teacher.num_slots=null"), clips)
    result = _evaluate_named(tiny(*settings), clips)  # 4 slots
    (record,) = find_records(tiny())
    assert record.uri == result["uri"]
    assert record.hints == CheckpointHints(3, 4, (0.5,) * 3, (0.5,) * 3)
    assert len(model_speeds([record], runs=1)) == 1
    selection = select_runs([record], None)
    (name,) = selection.models
    panel = Gallery(selection).panel("video 1", [name, GROUND_TRUTH])
    model = load_slot_model(record.model_uri, **record.hints.to_dict())
    assert model.config.num_slots == 4
    score = score_one(clips, clips.videos[1], model, PRESETS["slotcontrast"])
    (row,) = [r for r in record.per_video() if r["video_id"] == "video 1"]
    assert row["video_mbo"] == pytest.approx(score.video_mbo)
    assert panel.rows[name].max() < 4


def _evaluate_named(config, clips):
    """`evaluate` on clips that were made by hand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Artifacts, "evaluation_clips", Artifact(clips.uri, {}))
        return evaluate(config)


def test_videos_without_masks_are_refused(tiny, local_ray, tmp_path, model_uri):
    clips = without_masks(tmp_path)
    with pytest.raises(ValueError, match="no masks to score against"):
        score(tiny(), clips, {"mine": Subject(model_uri)})


def test_a_student_its_teacher_and_a_registered_model(shared_tiny, local_ray, capsys, tmp_path):
    """`jobs.evaluate` for a config's own student, then for the champion of the registry."""
    config = shared_tiny("distill.method=no_kd", "dataset.name=tiny videos", "distill.seed=5")
    shard(config)
    distill(config)
    own = evaluate(config)
    assert "colour k-means" in capsys.readouterr().out
    registered = register(config)
    assert registered["champion"]
    pulled = evaluate(shared_tiny("evaluate.model=models:/slotmatch@champion", "evaluate.baselines=false"))
    assert pulled["scores"] == own["scores"]
    assert pulled["uri"] == own["uri"], "the same weights under the same protocol are one evaluation"
    pull("models:/slotmatch@champion", tmp_path / "pulled", config.tracking_uri)
    local = evaluate(shared_tiny(f"evaluate.model={tmp_path / 'pulled'}", "evaluate.baselines=false"))
    assert local["uri"] == own["uri"]
    assert {r.method for r in find_records(config)} == {"no_kd", "baseline"}
    (record,) = [r for r in find_records(config) if r.method == "no_kd"]
    assert (record.seed, record.trained_on, record.steps) == (5, "tiny videos", 8)

    assert record.settings == artifacts_of(config).student_settings


def test_every_form_of_an_exported_model_is_scored(shared_tiny, local_ray, tmp_path, capsys):
    """`jobs.export` with a config, then `jobs.evaluate` of one of its files, in clips and as slot attention has it."""
    config = shared_tiny("evaluate.baselines=false", "evaluate.protocol=paper", "evaluate.masks=attention")
    shard(config)
    save_slot_model(load_slot_model(ROOT / "demo" / "teacher"), tmp_path / "model")
    model = load_slot_model(tmp_path / "model")
    done = export(config, model, str(tmp_path / "model"), str(tmp_path / "out"))
    assert "PyTorch " in capsys.readouterr().out
    files = {file: form["scores"] for file, form in done["forms"].items()}
    clips = ClipSet(artifacts_of(config).evaluation_clips.uri)
    scores = [
        score_one(clips, v, model, choose_protocol(config.evaluate)) for v in clips.videos if v.annotated
    ]
    own = mean_scores(scores)
    for file in ("model.onnx", "model.pt2"):
        assert files[file] == pytest.approx({score: own[score] for score in SCORES}, abs=1e-3)
    assert set(files) == {"model.onnx", "model.pt2", "model_fp16.onnx", "model_int8.onnx"}
    again = evaluate(with_overrides(config, {"evaluate.model": str(tmp_path / "out")}))
    assert again["scores"].items() >= files["model.onnx"].items(), "a folder of exports is its fp32 ONNX file"


@pytest.mark.slow
def test_a_public_file_is_exported_and_scored_with_what_was_said_of_it(shared_tiny, local_ray, tmp_path):
    """Its heads and slots are in the words of `export`, and not in the config."""
    config = shared_tiny("evaluate.baselines=false", "storage.root=" + str(tmp_path / "root"))
    shard(config)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    words = [str(GOLDEN / "videosaur_tiny.ckpt"), str(tmp_path / "out"), str(tmp_path / "config.yaml")]
    assert run_job(JOB, [*words, "num_heads=3", "num_slots=4", "mean=[0.4,0.4,0.4]"]) == 0
    forms = storage.read_json(str(tmp_path / "out" / "export.json"))["forms"]
    own = next(record for record in find_records(config) if record.name == "PyTorch")
    assert own.hints == CheckpointHints(3, 4, (0.4, 0.4, 0.4))
    assert forms["model.onnx"]["scores"] == pytest.approx({s: own.scores[s] for s in SCORES}, abs=1e-3)


def test_training_validates_with_the_code_of_evaluate(shared_tiny, local_ray):
    """The score in the last step's history is that of the published model; training is not changed by it."""
    settings = ["distill.method=no_kd", "distill.seed=6", "evaluate.validation_videos=2"]
    shard(shared_tiny(*settings))
    plain = distill(shared_tiny(*settings))
    losses = storage.read_json(plain["history"])
    storage.delete(plain["uri"])
    validating = distill(shared_tiny(*settings, "distill.validate_every=4"))
    assert validating["uri"] == plain["uri"], "validation does not make it another run"
    for before, after in zip(losses, storage.read_json(plain["history"]), strict=True):
        assert before.items() <= after.items(), "validation changes no loss"

    # Two workers share the videos.
    config = shared_tiny(*settings, "distill.validate_every=4", "distill.workers=2")
    run = distill(config)
    history = storage.read_json(run["history"])
    validated = [row["step"] for row in history if "validation_video_mbo" in row]
    assert validated == [4, 8]

    held_out = artifacts_of(config).evaluation_clips.uri
    assert len(ClipSet(held_out).videos) == 3
    validation = Validation(held_out, config.evaluate)
    assert len(validation.videos) == 2
    model = load_slot_model(run["model"])
    for name, value in validation.scores(model, 0, 1).items():
        assert history[-1][name] == pytest.approx(value, abs=1e-6)
        assert math.isfinite(value)
    assert set(validation.scores(model, 0, 1)) == {f"validation_{name}" for name in SCORES}


def test_validation_on_videos_without_masks_is_refused_before_training(shared_tiny, local_ray, tmp_path):
    clips = without_masks(tmp_path)
    with pytest.raises(ConfigError, match="no video with masks"):
        Validation(clips.uri, shared_tiny().evaluate)
    settings = ["distill.method=no_kd", "distill.validate_every=2", "distill.seed=9", "evaluate.split=null"]
    with pytest.raises(ConfigError, match=r"needs evaluate\.split"):
        distill(shared_tiny(*settings))


@pytest.mark.parametrize("run", [shard, distill, line.run])
def test_slices_that_share_videos_are_refused(tmp_path, run):
    write_davis(tmp_path / "davis", videos=4)
    places = [f"dataset.path={tmp_path / 'davis'}", f"storage.root={tmp_path / 'root'}", "dataset.kind=davis"]
    config = resolve_config({}, [*places, "dataset.split=train[:-1]", "evaluate.split=train[-2:]"])
    with pytest.raises(ConfigError, match=r"'train\[-2:\]' and dataset.split 'train\[:-1\]' share 1 videos"):
        run(config)
