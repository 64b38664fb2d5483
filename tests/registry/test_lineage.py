"""From a registered model back to its videos, also where links are missing."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clip_sets import random_clips
from layouts import edit_json
from students import evaluation, make_finished_run

from jobs._main import run
from jobs.lineage import JOB
from pipeline.artifacts.manifests import EvaluationManifest, Rules, TargetManifest
from pipeline.config import resolve_config
from pipeline.registry.lineage import trace
from pipeline.registry.stage import register_run

pytestmark = pytest.mark.usefixtures("not_exported")

CHAMPION = "models:/slotmatch@champion"


@pytest.fixture
def config(tmp_path):
    return resolve_config({}, [f"storage.root={tmp_path / 'root'}"])


@pytest.fixture
def root(config, tmp_path):
    """What all stages leave behind, with a champion in the registry."""
    root = tmp_path / "root"
    for name, count in (("train", 7), ("val", 2)):
        folder = root / "clips" / name
        random_clips(folder, {f"{name}-{i}": 4 for i in range(count)})
        rows = [{"video_id": f"{name}-{i}", "path": f"videos/{i}.mp4", "content": "h"} for i in range(count)]
        pq.write_table(pa.Table.from_pylist(rows), folder / "sources.parquet")
        described = {"kind": "videos", "name": "bikes", "path": "/data/bikes", "split": name}
        bad = [{"video": "cut.mp4", "path": "p", "reason": "is truncated"}] if name == "train" else []
        more = {"dataset": described, "frames": 28, "bad": bad} | ({"flow": "OpenCV 1.2"} if bad else {})
        edit_json(folder / "manifest.json", lambda manifest, more=more: manifest.update(more))
    (root / "teacher.ckpt").write_bytes(b"weights")
    weights = {"files": ["hash-of-weights"], "hints": None}
    taught = {"teacher_uri": str(root / "teacher.ckpt"), "teacher": weights, "teacher_config": {}}
    targets = TargetManifest(fingerprint="t", views={"views": 4, "flip": 0.5}, rows=28, **taught)
    targets.publish(str(root / "targets" / "t"))
    rules = Rules(name="slotcontrast", fingerprint="p", in_words="whole videos")
    scored = {"clips_uri": str(root / "clips" / "val"), "scores": {"video_mbo": 0.357}, "videos": 2}
    EvaluationManifest(fingerprint="e", protocol=rules, **scored).publish(str(root / "evaluations" / "e"))
    made_of = {"clips_uri": str(root / "clips" / "train"), "targets_uri": str(root / "targets" / "t")}
    run_uri, created = str(root / "students" / "s"), "2026-01-02T03:04:05Z"
    run = make_finished_run(config, run_uri, clips="train", created=created, **made_of)
    register_run(config, run, evaluation(0.357, uri=str(root / "evaluations" / "e")))
    return root


def test_every_link_is_named_down_to_the_videos(config, root):
    found = trace(CHAMPION, config.tracking_uri)
    summary = found.summary()
    assert summary["status"] == "ok"
    assert summary["uri"] == "models:/slotmatch/1"
    assert summary["version"]["aliases"] == ["champion"]
    assert summary["run"]["uri"] == str(root / "students" / "s")
    assert [summary["run"][key] for key in ("method", "beta", "seed")] == ["slotmatch", "0.2", "1"]
    assert summary["run"]["created"] == "2026-01-02T03:04:05Z"
    assert summary["run"]["mlflow_run"]
    assert summary["targets"]["views"] == {"views": 4, "flip": 0.5}
    assert summary["teacher"]["files"] == ["hash-of-weights"]
    assert summary["clips"]["dataset"]["path"] == "/data/bikes"
    assert summary["clips"]["videos"] == 7
    assert summary["clips"]["flow"] == "OpenCV 1.2"
    assert "flow" not in summary["evaluation_clips"]
    assert summary["clips"]["video_ids"] == [f"train-{i}" for i in range(5)]
    assert summary["evaluation"]["scores"] == {"video_mbo": 0.357}
    assert summary["evaluation_clips"]["video_ids"] == ["val-0", "val-1"]
    json.dumps(summary)

    tree = found.tree()
    for words in ("@champion", "video_mbo 35.7", "protocol slotcontrast (whole videos), 2 videos"):
        assert words in tree
    for words in ("train-4", "and 2 more (--videos", "set aside: cut.mp4 (is truncated)", "hash-of-weights"):
        assert words in tree
    assert "train-5" not in tree
    assert "train-6" in found.tree(all_videos=True)


@pytest.mark.parametrize(
    ("gone", "named", "still"),
    [
        ("students/s", "the training run", "train-0"),
        ("targets/t", "the targets", "train-0"),
        ("teacher.ckpt", "the teacher", "hash-of-weights"),
        ("clips/train", "the clips", "hash-of-weights"),
        ("clips/train/sources.parquet", "the list of videos", "/data/bikes"),
        ("evaluations/e", "the evaluation", "video_mbo 35.7"),
    ],
)
def test_a_link_that_is_gone_is_named_and_the_rest_is_shown(config, root, gone, named, still):
    place = root / gone
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    found = trace(CHAMPION, config.tracking_uri)
    (missing,) = [text for text in found.missing if text.startswith(named)]
    assert str(place) in missing
    assert "not there" in missing
    assert found.summary()["status"] == "incomplete"
    assert still in found.tree()
    assert missing in found.tree()


def test_the_exit_code_says_whether_the_chain_is_whole(config, root, capsys):
    arguments = [CHAMPION, f"storage.root={root}", "--videos"]
    assert run(JOB, arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("train-6" in line for line in lines)
    assert json.loads(lines[-1])["clips"]["videos"] == 7
    shutil.rmtree(root / "clips")
    assert run(JOB, arguments) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["status"] == "incomplete"


def test_clips_of_earlier_versions_did_not_record_their_sources(config, root):
    edit_json(root / "clips/train/manifest.json", lambda manifest: manifest.pop("dataset"))
    (root / "clips" / "train" / "sources.parquet").unlink()
    found = trace(CHAMPION, config.tracking_uri)
    assert found.missing == []
    assert "sources were not recorded" in found.tree()
    assert "train-0" in found.tree()
