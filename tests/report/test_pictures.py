"""Which runs and videos are shown, and the pictures of two tiny models on a tiny clip set."""

import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clip_sets import random_clips
from PIL import Image
from tiny_models import tiny_model, tiny_vit

from pipeline.config import resolve_config
from pipeline.config.protocols import PRESETS
from pipeline.evaluate.records import VIDEOS_FILE
from pipeline.evaluate.scoring import model_predictor
from pipeline.models import load_slot_model, save_slot_model
from pipeline.report import gallery as gallery_module
from pipeline.report.gallery import GROUND_TRUTH, Gallery
from pipeline.report.pictures import draw_pictures, model_speeds
from pipeline.report.select import NothingToShow, nearest_to_quantiles, select_runs, worst_videos

TEACHER, NO_KD, OURS = "Teacher", "Student (no KD)", "SlotMatch (ours)"
NAN = float("nan")

# --- which runs -----------------------------------------------------------------------------------


def test_the_evaluation_with_most_methods_is_shown(record):
    small = [record("slotmatch", clips="small"), record("teacher", clips="small")]
    large = [record(method, clips="large") for method in ("slotmatch", "teacher", "no_kd")]
    sweep = [record("slotmatch", clips="sweep", seed=seed) for seed in range(9)]
    selection = select_runs([*sweep, *small, *large], 0.2)
    assert list(selection.models) == [TEACHER, NO_KD, OURS]
    assert {r.clips_uri for r in selection.models.values()} == {"root/clips/large"}


def test_of_each_method_the_longest_run_then_the_latest(record):
    runs = [record("no_kd", steps=steps, seed=seed) for seed, steps in enumerate((10, 30, 30))]
    assert select_runs(runs, 0.2).models == {NO_KD: runs[1]}


def test_slotmatch_is_that_with_the_configs_weight_if_there_is_one(record):
    runs = [record("slotmatch", beta=0.5, steps=9999), *(record("slotmatch", beta=b) for b in (0.2, 0.1))]
    assert select_runs(runs, 0.2).models == {OURS: runs[1]}
    assert select_runs(runs, 0.3).models == {OURS: runs[0]}


def test_others_have_slotmatchs_teacher(record):
    ours = record("slotmatch", teacher="VideoSAUR")
    foreign, own = record("teacher", teacher="SlotContrast"), record("teacher", teacher="VideoSAUR")
    assert select_runs([foreign, ours, own], 0.2).models == {TEACHER: own, OURS: ours}
    assert select_runs([foreign, ours], 0.2).models == {OURS: ours}


def test_baselines_and_models_of_unknown_training_go_by_their_names(record):
    records = [record("baseline", name="grid"), record("other", name="mine"), record("other", name="yours")]
    selection = select_runs(records, 0.2)
    assert set(selection.models) == {"mine", "yours"}
    assert set(selection.baselines) == {"grid"}


# --- which videos ---------------------------------------------------------------------------------


NINE = {f"v{i}": i / 10 for i in range(9)}  # quartiles 0.2 and 0.6


@pytest.mark.parametrize(
    ("scores", "quantiles", "shown"),
    [
        ({"a": 0.1, "b": 0.9, "c": 0.52, "d": 0.5, "e": 0.45, "f": NAN}, (0.5, 0.5), ["d", "c"]),
        (NINE, (0.25, 0.75), ["v2", "v6"]),
        ({"b": 0.5, "a": 0.5, "c": 0.5}, (0.25, 0.75), ["a", "b"]),  # ties go by name, none is there twice
        ({"b": 0.7, "a": 0.3}, (0.5,), ["a"]),  # equally far on both sides
        ({"a": 0.3, "b": NAN}, (0.5, 0.5), ["a"]),
    ],
)
def test_the_videos_nearest_to_quantiles(scores, quantiles, shown):
    assert nearest_to_quantiles(scores, quantiles) == shown


def test_of_no_score_no_video_is_shown():
    with pytest.raises(NothingToShow, match="no video has a score"):
        nearest_to_quantiles({"a": NAN}, (0.5,))


def test_the_worst_videos_first():
    scores = {"a": 0.3, "b": NAN, "c": 0.1, "d": 0.2, "e": 0.1}
    assert worst_videos(scores, 3) == ["c", "e", "d"]
    assert worst_videos(scores, 9) == ["c", "e", "d", "a"]


# --- the pictures ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return random_clips(tmp_path_factory.mktemp("clips"), {f"video {i}": 6 + i for i in range(8)})


@pytest.fixture(scope="module")
def model_uris(tmp_path_factory):
    """A large model with 5 slots and two equal small ones with 3."""
    uris = {}
    for method, width, slots in (("teacher", 32, 5), ("no_kd", 16, 3), ("slotmatch", 16, 3)):
        model = tiny_model(slots, seed=len(uris), vit=tiny_vit(width))
        uris[method] = str(tmp_path_factory.mktemp(method))
        save_slot_model(model, uris[method])
    return uris


SCORES = {
    "teacher": [0.5, 0.6, 0.4, 0.7, 0.3, 0.5, 0.6, NAN],
    "no_kd": [0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, NAN],
    # Median 0.4, nearest: videos 2 and 3. Differences to no_kd: quartiles at 0.35 and 0.55.
    "slotmatch": [0.1, 0.9, 0.4, 0.45, 0.2, 0.3, 0.8, NAN],
}


@pytest.fixture
def records(record, clips, model_uris, tmp_path):
    """Evaluations of the three models and of a trivial baseline, as `evaluate` leaves them."""
    found = []
    for method, values in SCORES.items():
        uri = tmp_path / "evaluations" / method
        uri.mkdir(parents=True)
        rows = [{"video_id": f"video {i}", "video_mbo": value} for i, value in enumerate(values)]
        pq.write_table(pa.Table.from_pylist(rows), uri / VIDEOS_FILE)
        of = {"uri": str(uri), "model_uri": model_uris[method], "dataset": "made", "videos": 8}
        made = record(method, score=float(np.nanmean(values)), **of)
        found.append(replace(made, clips_uri=clips.uri))
    baseline = record("baseline", name="grid", dataset="made", score=0.2)
    return [*found, replace(baseline, clips_uri=clips.uri)]


@pytest.fixture
def shown_videos(monkeypatch):
    """The videos and rows of each panel that is drawn."""
    panels, make = [], Gallery.panel

    def panel(self, video_id, *arguments, **options):
        made = make(self, video_id, *arguments, **options)
        panels.append((video_id, list(made.rows), made.title))
        return made

    monkeypatch.setattr(Gallery, "panel", panel)
    return panels


ALL = ["figure1.png", "figure3.png", "figure4.png", "scores_by_video.png", "worst_videos.png"]


def test_all_pictures_of_three_models(records, shown_videos):
    latencies = model_speeds(records, 1)
    pictures = draw_pictures(resolve_config({}), records, latencies)
    assert [picture.link for picture in pictures] == ALL
    for picture in pictures:
        assert len(picture.content) < 500_000
        with Image.open(io.BytesIO(picture.content)) as image:
            assert 1000 <= image.width <= 1400
        assert "made, 8 videos, protocol slotcontrast (evaluation slotcontrast-rules)" in picture.caption
        assert "SlotMatch (ours) 1,000 steps, β = 0.2, seed 42" in picture.caption
    assert len({picture.title for picture in pictures}) == 5
    assert [video for video, *_ in shown_videos] == [
        *("video 2", "video 3"),  # Figure 3: the median
        *("video 4", "video 3"),  # Figure 4: the quartiles
        *("video 0", "video 4", "video 5", "video 2", "video 3", "video 6"),  # the worst
    ]
    rows = [names for _, names, _ in shown_videos]
    assert rows[0] == [NO_KD, TEACHER, OURS, GROUND_TRUTH]
    assert rows[2] == [NO_KD, OURS]
    assert rows[4] == [GROUND_TRUTH, OURS, TEACHER]
    titles = [title for *_, title in shown_videos]
    assert titles[0] == f"video 2\n{NO_KD} 30.0, {TEACHER} 40.0, {OURS} 40.0"
    assert titles[2].endswith("difference -10.0")


def test_without_a_method_its_row_or_picture_is_left_out(records, shown_videos, capsys):
    without_no_kd = [r for r in records if r.method != "no_kd"]
    pictures = draw_pictures(resolve_config({}), without_no_kd, {})
    assert [p.link for p in pictures] == ["figure3.png", "scores_by_video.png", "worst_videos.png"]
    assert shown_videos[0][1] == [TEACHER, OURS, GROUND_TRUTH]
    said = capsys.readouterr().err
    assert "figure1.png is left out: no model's speed was measured" in said
    assert "figure4.png is left out: there is no evaluation of Student (no KD)" in said


def test_a_damaged_model_costs_only_its_own_pictures(records, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    (broken / "model.safetensors").write_text("no tensors")
    damaged = [replace(r, model_uri=str(broken)) if r.method == "teacher" else r for r in records]
    latencies = model_speeds(damaged, 1)
    pictures = draw_pictures(resolve_config({}), damaged, latencies)
    assert [p.link for p in pictures] == ["figure1.png", "figure4.png", "scores_by_video.png"]
    said = capsys.readouterr().err
    assert "no speed of" in said
    assert "figure3.png is left out" in said


def test_nothing_to_show_says_so(records, capsys):
    baselines = [r for r in records if r.method == "baseline"]
    assert draw_pictures(resolve_config({}), [], {}) == []
    assert draw_pictures(resolve_config({}), baselines, {}) == []
    assert "no model was evaluated" in capsys.readouterr().err


def test_what_was_deleted_costs_its_pictures_only(records, tmp_path, capsys):
    gone = [replace(r, clips_uri=str(tmp_path / "gone")) for r in records]
    pictures = draw_pictures(resolve_config({}), gone, {})
    assert [p.link for p in pictures] == ["scores_by_video.png"]
    assert f"figure3.png is left out: {tmp_path / 'gone'} has no manifest.json" in capsys.readouterr().err


def test_speeds_are_measured_once_an_architecture(records, model_uris, monkeypatch):
    measured = []

    def measure(models, frames, runs):
        measured.append(len(models))
        return [0.5 + i for i in range(len(models))]

    monkeypatch.setattr("pipeline.report.pictures.measure_latencies", measure)
    speeds = model_speeds(records, 3)
    assert measured == [2]
    expected = (1.5, load_slot_model(model_uris["no_kd"]).num_parameters())
    assert speeds[model_uris["no_kd"]] == speeds[model_uris["slotmatch"]] == expected
    assert speeds[model_uris["teacher"]][0] == 0.5
    assert model_speeds(records, 0) == {}
    assert model_speeds([], 3) == {}


def test_a_model_that_is_gone_has_no_speed(records, tmp_path, capsys):
    gone = [replace(records[0], model_uri=str(tmp_path / "none")), *records[1:]]
    assert len(model_speeds(gone, 1)) == 2
    assert "no speed of teacher" in capsys.readouterr().err


def test_a_panel_shows_what_was_scored(records, clips, model_uris):
    """The central square, the model's slots as in an evaluation, each object's own label."""
    panel = Gallery(select_runs(records, 0.2)).panel("video 3", [OURS, GROUND_TRUTH])
    video = next(v for v in clips.videos if v.video_id == "video 3")
    read = list(clips.iter_video(video, masks=True))
    frames = np.concatenate([c.frames for c in read])[:, :, 4:28]
    np.testing.assert_array_equal(panel.frames, frames)
    predict = model_predictor(load_slot_model(model_uris["slotmatch"]), "video 3", PRESETS["slotcontrast"])
    labels = np.concatenate(list(predict(iter([frames]), (24, 24))))
    assert (panel.rows[OURS] == labels).mean() > 0.999
    truth = panel.rows[GROUND_TRUTH]
    masks = [frame for clip in read for frame in clip.masks]
    for t, objects in enumerate(masks):
        covered = np.logical_or.reduce([m[:, 4:28] for m in objects.values()] or [np.zeros((24, 24), bool)])
        np.testing.assert_array_equal(truth[t] >= 0, covered)
    # One number an object: where it lies alone, it is the same in all frames.
    alone = {}
    for t, objects in enumerate(masks):
        count = sum((m.astype(int) for m in objects.values()), np.zeros((24, 32), int))
        for object_id, mask in objects.items():
            alone.setdefault(object_id, set()).update(truth[t][(mask & (count == 1))[:, 4:28]].tolist())
    assert all(len(numbers) <= 1 for numbers in alone.values())
    assert sorted(n for numbers in alone.values() for n in numbers) == [0, 1, 2]


def test_long_and_large_videos_are_cut_and_reduced(records, monkeypatch):
    monkeypatch.setattr(gallery_module, "MAX_FRAMES", 6)
    monkeypatch.setattr(gallery_module, "MAX_SIDE", 10)
    panel = Gallery(select_runs(records, 0.2)).panel("video 7", [OURS, GROUND_TRUTH])
    assert panel.frames.shape == (6, 10, 10, 3)
    assert all(labels.shape == (6, 10, 10) for labels in panel.rows.values())
