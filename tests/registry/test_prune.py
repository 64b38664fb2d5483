"""What can go below a storage.root, and what never does: on a disk and on S3."""

import json
import os
import re
import shutil
import time
from collections import OrderedDict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clip_sets import publish_clips
from places import python
from services import free_port
from students import evaluation, make_finished_run

from jobs._main import run as run_job
from jobs.prune import JOB
from pipeline import storage, tracking
from pipeline.artifacts import once as once_module
from pipeline.artifacts.manifests import (
    DatasetEntry,
    EvaluationManifest,
    GeneratedManifest,
    Rules,
    SweepManifest,
    TargetManifest,
)
from pipeline.artifacts.once import lease, once
from pipeline.clips.table import VideoEntry
from pipeline.config import ConfigError, resolve_config
from pipeline.evaluate.records import record_evaluations
from pipeline.registry import prune as stage
from pipeline.registry.lineage import trace
from pipeline.registry.stage import pull, register_run
from pipeline.tracking import client as mlflow_client
from pipeline.tracking.client import ServerUnavailable

pytestmark = pytest.mark.usefixtures("not_exported")
CHAMPION = "models:/slotmatch@champion"


def name(text):
    """A made-up fingerprint."""
    return storage.fingerprint(text)


class World:
    """A root with what jobs leave behind, by `kind/name`."""

    def __init__(self, root, database, scratch):
        self.root, self.scratch = root, scratch
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
        path = f"{folder}/video.mp4" if generated else "/data/video.mp4"
        with storage.atomic_write(storage.join(uri, "sources.parquet")) as file:
            pq.write_table(pa.Table.from_pylist([{"video_id": "v", "path": path, "content": "h"}]), file)
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


def fill(world):
    """Of each kind what a registered student, an evaluated one or a sweep needs, and one called `old` that nothing
    does."""
    world.clips("train", generated="train")
    world.clips("val")
    world.clips("old", generated="old")
    for text in ("good", "old"):
        world.run(f"teachers/{text}", "train")
        world.targets(text, "train", text)
    best = world.run("students/best", "train", "good")
    seen = world.run("students/seen", "train")
    world.run("students/swept", "train")
    world.run("students/old", "old", "old")
    world.scores("best", "val", best)
    world.scores("seen", "val", seen)
    register_run(world.config, best, evaluation(0.5, uri=world.at("evaluations/best")))
    trial = {"setting": "a", "values": {}, "seed": 1}
    runs = {"swept": "finished", "stopped": "stopped"}
    trials = [
        {**trial, "run": world.at(f"students/{text}"), "status": status} for text, status in runs.items()
    ]
    SweepManifest(clips_uri=world.at("clips/train"), trials=trials).publish(world.at("sweeps/done"))
    storage.write_bytes(storage.join(world.at("students/stopped"), "checkpoints", "step_1", "w"), b"x" * 100)
    return world


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Where a root was filled, and where it is kept with its database."""
    folder = tmp_path_factory.mktemp("filled")
    fill(World(str(folder / "root"), folder / "mlflow.db", folder))
    (folder / "root").rename(folder / "kept")
    return folder


@pytest.fixture
def world(filled, tmp_path, monkeypatch):
    """A filled root on a disk, as good as new."""
    # MLflow remembers for a process's life where a run's files are; each test is a user's new process.
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._artifact_repos_cache", OrderedDict())
    shutil.copytree(filled / "kept", filled / "root")
    shutil.copy(filled / "mlflow.db", tmp_path / "mlflow.db")
    yield World(str(filled / "root"), tmp_path / "mlflow.db", tmp_path)
    shutil.rmtree(filled / "root")


@pytest.fixture(params=["local", "s3"])
def anywhere(request, tmp_path):
    """The same, on S3 too."""
    if request.param == "local":
        yield request.getfixturevalue("world")
        return
    root = storage.join(request.getfixturevalue("s3"), tmp_path.name)
    yield fill(World(root, tmp_path / "mlflow.db", tmp_path))
    storage.delete(root)


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


def test_delete_leaves_what_is_needed_whole(anywhere, tmp_path):
    world = anywhere
    found, _ = world.prune(delete=True)
    assert (found["status"], found["items"], found["spared"], found["failed"]) == ("ok", len(OLD), {}, {})
    for place in OLD:
        assert not storage.exists(world.at(place))
    lineage = trace(CHAMPION, world.config.tracking_uri)
    assert lineage.run["uri"] == world.at("students/best")
    assert lineage.missing == []
    pull(CHAMPION, tmp_path / "pulled", world.config.tracking_uri)
    kept = ("students/seen", "students/swept", "evaluations/best", "evaluations/seen", "sweeps/done")
    kept += ("clips/train", "clips/val", "generated/train", "targets/good", "teachers/good")
    assert all(storage.is_complete(world.at(place)) for place in kept)
    assert world.prune(delete=True)[0]["items"] == 0


def test_what_a_config_uses_stays_with_what_it_is_made_of(world):
    _, listed = world.prune(world.at("students/old"))
    assert set(listed) == places(world, "students/stopped")


@pytest.mark.fault("another job is at work", "prune", "its folder and what it is made of stay")
def test_what_another_job_is_at_work_in_stays(anywhere):
    world = anywhere
    with once(world.at("students/new"), "distill", inputs=[world.at("targets/old")]):
        _, listed = world.prune(delete=True)
        assert storage.exists(world.at("students/new"))
    assert set(listed) == places(world, "students/old", "students/stopped", "clips/old", "generated/old")


def test_a_job_of_an_earlier_version_may_read_anything(world):
    with lease(world.at("targets/new"), "cache"):
        assert world.prune()[1] == {}, "the teacher may be a student, which was made of anything"


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
    first = stage.take_stock(world.root)
    monkeypatch.setattr(stage, "take_stock", lambda root: first)
    found, _ = world.prune(delete=True)
    begun[0].__exit__(None, None, None)
    spared = {uri.removeprefix(f"{world.root}/"): why for uri, why in found["spared"].items()}
    assert set(spared) >= places(world, "students/old", "students/stopped")
    assert storage.is_complete(world.at("students/old"))
    assert storage.exists(storage.join(world.at("students/stopped"), "checkpoints", "step_1", "w"))


def test_what_a_job_begins_to_read_while_others_are_deleted_stays(world, monkeypatch):
    world.clips("older")
    monkeypatch.setattr(stage, "PLAN_HOLDS", 0.0)
    monkeypatch.setattr(stage, "PLAN_SHARE", float("inf"))
    delete, begun = stage._delete_folder, []

    def then_a_job_begins(folder):
        delete(folder)
        if folder.kind == "clips" and not begun:
            job = world.at("students/new")
            begun.append("older" if folder.uri == world.at("clips/old") else "old")
            storage.write_json(storage.join(job, "inputs.json"), [world.at(f"clips/{begun[0]}")])
            begun.append(lease(job, "distill"))
            begun[1].__enter__()

    monkeypatch.setattr(stage, "_delete_folder", then_a_job_begins)
    found, _ = world.prune(delete=True)
    begun[1].__exit__(None, None, None)
    assert storage.is_complete(world.at(f"clips/{begun[0]}"))
    assert world.at(f"clips/{begun[0]}") in found["spared"]


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
    _, listed = world.prune(own, delete=True)
    checkpoints = f"{storage.join(best, 'checkpoints')}".removeprefix(f"{world.root}/")
    assert listed[checkpoints]["bytes"] == 10
    assert storage.list_names(best) == ["config.yaml", "history.json", "manifest.json", "model"]
    assert storage.exists(storage.join(own, "checkpoints", "step_1", "w"))


@pytest.mark.parametrize("user", ["targets", "evaluation", "config", "job"])
def test_a_checkpoint_that_is_used_as_a_model_stays(world, user):
    good = world.at("teachers/good")
    step = storage.join(good, "checkpoints", "step_00000001")
    storage.write_bytes(storage.join(step, "model.safetensors"), b"x")
    checkpoints = storage.join(good, "checkpoints").removeprefix(f"{world.root}/")
    assert checkpoints in world.prune()[1]
    own = ()
    if user == "targets":
        targets = world.at("targets/good")
        storage.publish(targets, {**storage.read_manifest(targets), "teacher_uri": step})
    elif user == "evaluation":
        runs = (tracking.experiment_id(world.config), world.at("evaluations/seen"))
        client = tracking.connect(world.config)
        (run,) = client.search_runs([runs[0]], tracking.tag_filter(runs[1]))
        client.set_tag(run.info.run_id, "model_uri", step)
    elif user == "config":
        own = (step,)
    else:
        job = world.at("students/job")
        storage.write_json(storage.join(job, "inputs.json"), [step])
        own = (job,)
    assert checkpoints not in world.prune(*own)[1]


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
    model = next(path for path in listed if "/mlartifacts/" in path).removeprefix("file://")
    assert not storage.exists(storage.join(model, "MLmodel"))
    pull(CHAMPION, tmp_path / "pulled", world.config.tracking_uri)


def test_the_files_of_a_version_that_was_deleted_go(world, tmp_path):
    register_run(world.config, world.at("students/old"), None)
    client = tracking.connect(world.config)
    version = client.get_model_version("slotmatch", "2")
    client.create_registered_model("somebody's own")
    client.create_model_version("somebody's own", version.source)
    client.delete_model_version("slotmatch", "2")
    assert "models in MLflow" not in world.prune(world.at("students/old"))[0]["kinds"], "a version has it"
    client.delete_registered_model("somebody's own")
    found, _ = world.prune(world.at("students/old"), delete=True)
    assert found["kinds"]["models in MLflow"]["items"] == 1
    model = client.get_logged_model(version.tags["logged_model"])
    assert model.tags["mlflow.modelVersions"] == "[]"
    pull(CHAMPION, tmp_path / "pulled", world.config.tracking_uri)
    assert register_run(world.config, world.at("students/old"), None)["version"] == 3, "it may come back"
    pull("models:/slotmatch/3", tmp_path / "again", world.config.tracking_uri)


def test_without_a_champion_no_version_is_superseded(world):
    tracking.connect(world.config).delete_registered_model_alias("slotmatch", "champion")
    assert set(world.prune(versions=True)[1]) == places(world, *OLD)


@pytest.mark.fault("killed", "prune", "no half-deleted folder looks whole; the next one goes on")
def test_a_deletion_that_was_killed_goes_on(world, monkeypatch):
    old = world.at("clips/old")
    killed = f"""
import os, signal
from pipeline import storage
from pipeline.config import resolve_config
from pipeline.registry import prune
empty = storage.empty_folder
def killed(uri, but):
    if uri == {old!r}:
        storage.delete(storage.join(uri, "data"))
        os.kill(os.getpid(), signal.SIGKILL)
    empty(uri, but=but)
storage.empty_folder = killed
config = resolve_config({{}}, ["storage.root={world.root}", "mlflow.tracking_uri={world.config.tracking_uri}"])
prune.prune(config, lambda config: [], delete=True, older_than=0)
"""
    python("-c", killed, ends=None)
    assert storage.exists(old)
    assert not storage.is_complete(old)
    assert not storage.exists(world.at("students/old")), "what depends went first"
    monkeypatch.setattr(once_module, "ABANDONED_AFTER", 1e9)
    _, listed = world.prune(delete=True)
    assert set(listed) == places(world, "clips/old", "generated/old")
    assert not storage.exists(old)
    assert trace(CHAMPION, world.config.tracking_uri).missing == []


def age(root, days):
    """Makes all files of a folder as old."""
    for path in Path(root).rglob("*"):
        os.utime(path, (time.time() - 86400 * days,) * 2)


def test_what_is_older_than_a_number_of_days_goes_and_what_young_things_are_made_of_stays(world):
    age(world.root, 10)
    storage.write_bytes(storage.join(world.at("students/old"), "notes.txt"), b"")
    assert set(world.prune(days=7)[1]) == places(world, "students/stopped")
    assert world.prune(days=11)[1] == {}


def test_what_was_left_half_written_goes_after_a_day(world):
    for place in ("clips/train", "students/best"):
        for day, hexadecimal in ((2, "a"), (0, "b")):
            left = Path(world.at(place)) / f".tmp-{hexadecimal * 32}"
            left.write_bytes(b"x" * 10)
            os.utime(left, (time.time() - 86400 * day,) * 2)
    _, listed = world.prune(delete=True)
    left = {path for path in listed if "tmp" in path}
    assert left == {f"{place}/.tmp-{'a' * 32}" for place in places(world, "clips/train", "students/best")}
    assert not (Path(world.at("clips/train")) / f".tmp-{'a' * 32}").exists()
    assert (Path(world.at("clips/train")) / f".tmp-{'b' * 32}").exists()


def test_what_ray_left_goes_once_no_job_is_at_work(world):
    for text in ("student-0123456789ab", "sweep-x"):
        storage.write_bytes(storage.join(world.root, "ray", text, "tuner.pkl"), b"x")
    age(storage.join(world.root, "ray", "sweep-x"), 2)
    with lease(world.at("students/seen"), "distill"):
        assert "ray" not in world.prune()[0]["kinds"]
    _, listed = world.prune(delete=True)
    assert {path for path in listed if path.startswith("ray/")} == {"ray/sweep-x"}
    assert storage.list_names(storage.join(world.root, "ray")) == ["student-0123456789ab"]


def test_a_link_to_another_disk_stays(world, tmp_path):
    place = Path(world.at("students/old"))
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    assert set(world.prune(delete=True)[1]) == places(world, "students/stopped")
    assert storage.is_complete(str(place))


def test_what_can_not_be_deleted_is_named_and_the_rest_goes(world, monkeypatch):
    old, empty = world.at("students/old"), storage.empty_folder

    def refused(uri, but):
        if uri == old:
            raise PermissionError(f"Permission denied: {uri}")
        empty(uri, but=but)

    monkeypatch.setattr(storage, "empty_folder", refused)
    found, _ = world.prune(delete=True)
    assert found["status"] == "incomplete"
    assert set(found["failed"]) == {old}
    assert not storage.exists(world.at("students/stopped"))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["dataset.kind=videos", "dataset.path=/nowhere"], "/nowhere"),
        (["dataset.kind=synthetic"], "generated videos of this config are not there .* python -m jobs.shard"),
    ],
)
def test_a_config_whose_videos_are_not_there_is_refused(world, tmp_path, capsys, settings, why):
    path = tmp_path / "config.yaml"
    path.write_text(resolve_config({}, [*settings, f"storage.root={world.root}"]).to_yaml())
    database = f"mlflow.tracking_uri={world.config.tracking_uri}"
    before = storage.list_names(world.root)
    assert run_job(JOB, [str(path), database, "--delete", "--older-than", "0"]) == 2
    said = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert re.search(f"can't be known.*{why}", said)
    assert storage.list_names(world.root) == before
    assert storage.exists(world.at("students/old"))


def test_days_that_are_no_number_keep_everything(world):
    assert world.prune(days=float("nan"))[1] == {}
