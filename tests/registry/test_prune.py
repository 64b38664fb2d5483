"""What can go below a storage.root, and what never does: on a disk and on S3."""

import json
import os
import signal
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clip_sets import publish_clips
from places import python
from services import free_port
from students import evaluation, make_finished_run

from pipeline import storage, tracking
from pipeline.artifacts.manifests import (
    DatasetEntry,
    EvaluationManifest,
    GeneratedManifest,
    Rules,
    SweepManifest,
    TargetManifest,
)
from pipeline.artifacts.once import LEASE_FILE, lease, once
from pipeline.clips.table import VideoEntry
from pipeline.config import ConfigError, resolve_config
from pipeline.evaluate.records import record_evaluations
from pipeline.registry import prune as stage
from pipeline.registry.lineage import trace
from pipeline.registry.stage import pull, register_run
from pipeline.tracking import client as mlflow_client
from pipeline.tracking.client import ServerUnavailable

CHAMPION = "models:/slotmatch@champion"


def name(text):
    """A made-up fingerprint."""
    return storage.fingerprint(text)


class World:
    """A root with what jobs leave behind, by `kind/name`."""

    def __init__(self, root, database):
        self.root = root
        self.config = resolve_config(
            {}, [f"storage.root={root}", f"mlflow.tracking_uri=sqlite:///{database}"]
        )
        tracking.experiment_id(self.config)

    def at(self, place):
        kind, text = place.split("/")
        return storage.join(self.root, kind, name(text))

    def clips(self, text, generated=None):
        uri = self.at(f"clips/{text}")
        publish_clips(
            uri, [VideoEntry("v", "shard-00000.parquet", 0, 1, 1, 4, 8, 8, True)], (), {"clip_frames": 4}
        )
        storage.write_bytes(storage.join(uri, "data", "shard-00000.parquet"), b"x" * 1000)
        kind = "videos"
        if generated:
            kind, folder = "synthetic", self.at(f"generated/{generated}")
            storage.write_bytes(storage.join(folder, "video.mp4"), b"x" * 500)
            GeneratedManifest(settings={}).publish(folder)
            rows = [{"video_id": "v", "path": f"{folder}/video.mp4", "content": "h"}]
            with storage.atomic_write(storage.join(uri, "sources.parquet")) as file:
                pq.write_table(pa.Table.from_pylist(rows), file)
        manifest = storage.read_manifest(uri)
        manifest["dataset"] = DatasetEntry(kind=kind, name="n", path=None).model_dump()
        storage.publish(uri, manifest)
        return uri

    def targets(self, text, clips, teacher):
        made = {
            "clips_uri": self.at(f"clips/{clips}"),
            "teacher_uri": f"{self.at(f'teachers/{teacher}')}/model",
        }
        uri = self.at(f"targets/{text}")
        TargetManifest(teacher_config={}, views={}, rows=1, **made).publish(uri)
        storage.write_bytes(storage.join(uri, "data", "shard-00000.parquet"), b"x" * 2000)

    def run(self, place, clips, targets=None):
        made = {"clips_uri": self.at(f"clips/{clips}")}
        if targets:
            made["targets_uri"] = self.at(f"targets/{targets}")
        return self.upload(make_finished_run, self.at(place), kind=place.split("s/")[0], **made)

    def upload(self, make, uri, **manifest):
        """`make_finished_run` writes to disks."""
        if not storage.is_remote(uri):
            return make(self.config, uri, **manifest)
        local = str(Path(self.scratch) / storage.name(uri))
        make(self.config, local, **manifest)
        client = tracking.connect(self.config)
        made = storage.read_manifest(local)
        client.set_tag(made["mlflow_run"], tracking.RUN_TAG, uri)
        storage.upload_tree(local, uri)
        return uri

    def scores(self, text, clips, student):
        uri = self.at(f"evaluations/{text}")
        rules = Rules(name="p", fingerprint="p")
        scores = {"video_mbo": 0.5}
        EvaluationManifest(
            clips_uri=self.at(f"clips/{clips}"), scores=scores, protocol=rules, videos=1
        ).publish(uri)
        tags = {"method": "slotmatch", "model_uri": f"{student}/model"}
        record_evaluations(
            self.config, self.at(f"clips/{clips}"), {"m": tags}, {"m": evaluation(0.5, uri=uri)}
        )

    def prune(self, *own, days=0.0, **options):
        found = stage.prune(self.config, lambda config: own, older_than=days, **options)
        listed = {item["path"].removeprefix(f"{self.root}/"): item for item in found["list"]}
        return found, listed


@pytest.fixture
def world(place, tmp_path):
    """Of each kind one folder that is needed, by a registered student, an evaluated one or a sweep, and one that is
    not, called `old`."""
    made = World(place, tmp_path / "mlflow.db")
    made.scratch = tmp_path
    made.clips("train", generated="train")
    made.clips("val")
    made.clips("old", generated="old")
    for text in ("good", "old"):
        made.run(f"teachers/{text}", "train")
        made.targets(text, "train", text)
    best = made.run("students/best", "train", "good")
    seen = made.run("students/seen", "train")
    made.run("students/swept", "train")
    made.run("students/old", "old", "old")
    made.scores("best", "val", best)
    made.scores("seen", "val", seen)
    register_run(made.config, best, evaluation(0.5, uri=made.at("evaluations/best")))
    trial = {"setting": "a", "values": {}, "seed": 1}
    runs = {"swept": "finished", "stopped": "stopped"}
    trials = [
        {**trial, "run": made.at(f"students/{text}"), "status": status} for text, status in runs.items()
    ]
    SweepManifest(clips_uri=made.at("clips/train"), trials=trials).publish(made.at("sweeps/done"))
    storage.write_bytes(storage.join(made.at("students/stopped"), "checkpoints", "step_1", "w"), b"x" * 100)
    return made


def places(world, *texts):
    return {world.at(text).removeprefix(f"{world.root}/") for text in texts}


OLD = ("students/old", "students/stopped", "targets/old", "teachers/old", "clips/old", "generated/old")


def test_what_nothing_needs_is_listed_and_nothing_is_touched(world, capsys):
    before = storage.list_files(world.root)
    found, listed = world.prune()
    assert set(listed) == places(world, *OLD)
    assert found["items"] == len(OLD)
    size = sum(file.size for file in before if any(file.name.startswith(f"{place}/") for place in listed))
    assert found["bytes"] == sum(item["bytes"] for item in listed.values()) == size
    assert not found["deleted"]
    after = {file.name: file.size for file in storage.list_files(world.root)}
    assert after == {file.name: file.size for file in before}
    printed = capsys.readouterr().out
    assert "not registered, not evaluated, in no finished sweep" in printed
    assert "unfinished, and no job is at work in it" in printed
    assert "--delete" in printed
    json.dumps(found)


def test_delete_leaves_what_is_needed_whole(world, tmp_path):
    found, listed = world.prune(delete=True)
    assert (found["status"], found["items"], found["spared"], found["failed"]) == ("ok", len(OLD), {}, {})
    for place in OLD:
        assert not storage.exists(world.at(place))
    lineage = trace(CHAMPION, world.config.tracking_uri)
    assert lineage.run["uri"] == world.at("students/best")
    assert not [text for text in lineage.missing if world.root in text]
    pull(CHAMPION, tmp_path / "pulled", world.config.tracking_uri)
    kept = ("students/seen", "students/swept", "evaluations/best", "evaluations/seen", "sweeps/done")
    kept += ("clips/train", "clips/val", "generated/train", "targets/good", "teachers/good")
    assert all(storage.is_complete(world.at(place)) for place in kept)
    assert world.prune(delete=True)[0]["items"] == 0


def test_what_a_config_uses_stays_with_what_it_is_made_of(world):
    _, listed = world.prune(world.at("students/old"))
    assert set(listed) == places(world, "students/stopped")


@pytest.mark.fault("another job is at work", "prune", "its folder and what it is made of stay")
def test_what_another_job_is_at_work_in_stays(world):
    with once(world.at("students/new"), "distill", inputs=[world.at("targets/old")]):
        _, listed = world.prune(delete=True)
        assert storage.exists(world.at("students/new"))
    assert set(listed) == places(world, "students/old", "students/stopped", "clips/old", "generated/old")


def test_a_job_of_an_earlier_version_may_read_anything(world):
    with lease(world.at("targets/new"), "cache"):
        _, listed = world.prune()
    assert set(listed) == places(world, "targets/old")


def test_a_job_that_begins_after_the_listing_is_noticed(world, monkeypatch):
    plan = stage._Pruning.plan
    begun = []

    def then_a_job_begins(work):
        items = plan(work)
        if not begun:
            storage.write_bytes(storage.join(world.at("students/stopped"), "config.yaml"), b"new")
            begun.append(lease(world.at("students/old"), "distill"))
            begun[0].__enter__()
        return items

    monkeypatch.setattr(stage._Pruning, "plan", then_a_job_begins)
    monkeypatch.setattr(stage, "take_stock", lambda root, first=stage.take_stock(world.root): first)
    found, _ = world.prune(delete=True)
    begun[0].__exit__(None, None, None)
    spared = {uri.removeprefix(f"{world.root}/"): why for uri, why in found["spared"].items()}
    assert set(spared) >= places(world, "students/old", "students/stopped")
    assert storage.is_complete(world.at("students/old"))
    assert storage.exists(storage.join(world.at("students/stopped"), "checkpoints", "step_1", "w"))


def test_what_is_registered_after_the_listing_stays(world, monkeypatch):
    plan = stage._Pruning.plan
    student = world.at("students/old")

    def then_it_is_registered(work):
        items = plan(work)
        register_run(world.config, student, None)
        return items

    monkeypatch.setattr(stage._Pruning, "plan", then_it_is_registered)
    found, listed = world.prune(delete=True)
    assert set(listed) == places(world, "students/stopped")
    assert student in found["spared"]
    assert trace("models:/slotmatch/2", world.config.tracking_uri).run["uri"] == student
    assert all(storage.is_complete(world.at(place)) for place in OLD if "stopped" not in place)


def test_what_is_young_stays(world):
    assert world.prune(days=1)[1] == {}


def test_nothing_that_is_not_known_is_touched(world):
    others = ("notes.txt", "clips/mine/a", "students/readme.txt", "mine/b", f"{name('x')}/c")
    for other in others:
        storage.write_bytes(storage.join(world.root, other), b"mine")
    storage.write_bytes(storage.join(world.root, "report", "report.md"), b"")
    found, _ = world.prune(delete=True)
    unknown = {uri.removeprefix(f"{world.root}/") for uri in found["unknown"]}
    assert unknown == {"notes.txt", "clips/mine", "students/readme.txt", "mine", name("x")}
    assert all(storage.read_bytes(storage.join(world.root, other)) == b"mine" for other in others)
    assert storage.exists(storage.join(world.root, "report", "report.md"))


def test_checkpoints_of_finished_runs_go_and_the_model_stays(world):
    best = world.at("students/best")
    storage.write_bytes(storage.join(best, "checkpoints", "step_00000001", "optimizer.pt"), b"x" * 10)
    own = world.at("students/stopped")  # goes on from its checkpoint
    found, listed = world.prune(own, delete=True)
    checkpoints = f"{storage.join(best, 'checkpoints')}".removeprefix(f"{world.root}/")
    assert listed[checkpoints]["bytes"] == 10
    assert storage.list_names(best) == ["config.yaml", "history.json", "manifest.json", "model"]
    assert storage.exists(storage.join(own, "checkpoints", "step_1", "w"))


def test_a_run_that_lost_its_model_keeps_the_checkpoint_that_it_is_made_from_again(world):
    best = world.at("students/best")
    storage.write_bytes(storage.join(best, "checkpoints", "step_00000001", "optimizer.pt"), b"x")
    storage.delete(storage.join(best, "model", "model.safetensors"))
    assert world.prune()[0]["kinds"].keys() == {"students", "targets", "teachers", "clips", "generated"}


def test_what_was_deleted_in_mlflow_can_go(world):
    client = tracking.connect(world.config)
    runs = client.search_runs(
        [tracking.experiment_id(world.config)], tracking.tag_filter(world.at("evaluations/seen"))
    )
    client.delete_run(runs[0].info.run_id)
    _, listed = world.prune(delete=True)
    assert set(listed) == places(world, *OLD, "evaluations/seen", "students/seen")


def test_what_another_mlflow_has_recorded_stays(world, tmp_path):
    elsewhere = resolve_config(
        {}, [f"storage.root={world.root}", f"mlflow.tracking_uri=sqlite:///{tmp_path / 'other.db'}"]
    )
    tracking.experiment_id(elsewhere)
    found = stage.prune(elsewhere, lambda config: [], older_than=0)
    assert {item["path"] for item in found["list"]} == {world.at("students/stopped")}


def test_without_a_database_nobody_knows(world, tmp_path):
    wrong = resolve_config(
        {}, [f"storage.root={world.root}", f"mlflow.tracking_uri=sqlite:///{tmp_path / 'no.db'}"]
    )
    with pytest.raises(ConfigError, match=r"no MLflow database .*mlflow\.tracking_uri"):
        stage.prune(wrong, lambda config: [], older_than=0, delete=True)
    assert not (tmp_path / "no.db").exists()


@pytest.mark.fault("MLflow is away", "prune", "nothing is deleted")
def test_without_mlflow_nobody_knows(world, monkeypatch):
    monkeypatch.setattr(mlflow_client, "SECONDS_TO_WAIT", 0.1)
    away = f"mlflow.tracking_uri=http://127.0.0.1:{free_port()}"
    before = storage.list_files(world.root)
    with pytest.raises(ServerUnavailable, match="nobody knows what is needed"):
        stage.prune(
            resolve_config({}, [f"storage.root={world.root}", away]), lambda c: [], older_than=0, delete=True
        )
    assert storage.list_files(world.root) == before


def test_a_damaged_manifest_is_named_and_nothing_is_deleted(world):
    storage.write_bytes(storage.join(world.at("targets/good"), storage.MANIFEST), b"{half")
    with pytest.raises(ConfigError, match=f"{world.at('targets/good')} needs can't be known"):
        world.prune(delete=True)
    assert storage.is_complete(world.at("students/old"))


def test_versions_that_no_alias_names_go_where_that_is_asked_for(world, tmp_path):
    register_run(world.config, world.at("students/old"), None)
    assert not [
        item
        for item in world.prune()[0]["list"]
        if item["kind"] in ("registered versions", "models in MLflow")
    ]
    found, listed = world.prune(versions=True, delete=True)
    assert {kind: n["items"] for kind, n in found["kinds"].items() if " " in kind} == {
        "registered versions": 1,
        "models in MLflow": 1,
    }
    assert found["kinds"]["models in MLflow"]["bytes"] > 1000
    client = tracking.connect(world.config)
    assert [version.version for version in client.search_model_versions()] == [1]
    model = next(path for path in listed if path.endswith("/artifacts/model"))
    assert not storage.exists(model.removeprefix("file://"))
    pull(CHAMPION, tmp_path / "pulled", world.config.tracking_uri)


def test_the_files_of_a_version_that_was_deleted_go(world, tmp_path):
    register_run(world.config, world.at("students/old"), None)
    client = tracking.connect(world.config)
    client.delete_model_version("slotmatch", "2")
    found, listed = world.prune(world.at("students/old"), delete=True)
    assert found["kinds"]["models in MLflow"]["items"] == 1
    pull(CHAMPION, tmp_path / "pulled", world.config.tracking_uri)
    assert register_run(world.config, world.at("students/old"), None)["version"] == 3, "it may come back"
    pull("models:/slotmatch/3", tmp_path / "again", world.config.tracking_uri)


def test_without_a_champion_no_version_is_superseded(world):
    tracking.connect(world.config).delete_registered_model_alias("slotmatch", "champion")
    assert set(world.prune(versions=True)[1]) == places(world, *OLD)
