"""A storage.root that was moved or copied: refused before anything is written, and repaired by `relocate`."""

import json
import shlex
import shutil
import sqlite3
from collections import OrderedDict

import pytest
from students import evaluation, make_finished_run

from jobs import relocate
from jobs._main import run
from pipeline import storage, tracking
from pipeline.artifacts.manifests import RunManifest
from pipeline.artifacts.once import LEASE_FILE, lease
from pipeline.config import ConfigError, resolve_config
from pipeline.registry.lineage import trace
from pipeline.registry.stage import pull, register_run

pytestmark = pytest.mark.usefixtures("not_exported")

CHAMPION = "models:/slotmatch@champion"


def of_root(root, *more):
    return resolve_config({}, [f"storage.root={root}", *more])


def fill(root):
    """A root with a registered student and another one that is finished."""
    config = of_root(root)
    for name in ("first", "second"):
        places = {kind: str(root / kind / "x") for kind in ("clips_uri", "targets_uri", "teacher_uri")}
        make_finished_run(config, str(root / "students" / name), **places)
    register_run(
        config, str(root / "students" / "first"), evaluation(0.5, uri=str(root / "evaluations" / "e"))
    )
    trial = {"run_uri": str(root / "students" / "first"), "error": None, "step": 3}
    storage.write_json(str(root / "sweeps" / "s" / "trials" / "t.json"), trial)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Where a root was when it was filled, in a name that a file URI has to quote, and where it is kept since."""
    folder = tmp_path_factory.mktemp("filled")
    old, kept = folder / "old rüns", folder / "kept"
    fill(old)
    old.rename(kept)
    return old, kept


@pytest.fixture
def moved(filled, tmp_path, monkeypatch):
    """The old and the new root."""
    old, kept = filled
    new = tmp_path / "somewhere else" / "runs"
    shutil.copytree(kept, new)
    # MLflow remembers for a process's life where a run's files are; each test is a user's new process.
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._artifact_repos_cache", OrderedDict())
    yield old, new
    if old.is_symlink():
        old.unlink()
    shutil.rmtree(old, ignore_errors=True)


@pytest.fixture(params=["moved", "copied"])
def places(request, moved):
    old, new = moved
    if request.param == "copied":
        shutil.copytree(new, old)
    return old, new


def content(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"}


@pytest.mark.fault(
    "storage.root was moved", "register", "nothing is written, the command that repairs it is named"
)
def test_a_job_says_so_before_it_writes(places, capsys):
    old, new = places
    before = content(new), content(old)
    with pytest.raises(ConfigError) as refused:
        register_run(of_root(new), str(new / "students" / "second"), None)
    assert f"{new} was {old}" in str(refused.value)
    assert str(refused.value).endswith(f"slotmatch relocate {shlex.join([str(old), f'storage.root={new}'])}")
    assert (content(new), content(old)) == before


@pytest.mark.parametrize("stage", ["shard", "distill", "register", "pipeline"])
def test_every_stage_is_refused(moved, capsys, stage):
    from jobs._main import find_job

    before = content(moved[1])
    assert run(find_job(stage), ["configs/demo.yaml", f"storage.root={moved[1]}"]) == 2
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["status"] == "refused"
    assert f"slotmatch relocate {shlex.quote(str(moved[0]))} " in summary["error"]
    assert not moved[0].exists()
    assert content(moved[1]) == before


def test_a_registered_model_names_the_way_out(moved, tmp_path):
    old, new = moved
    for look in (lambda uri: pull(CHAMPION, tmp_path / "out", uri), lambda uri: trace(CHAMPION, uri)):
        with pytest.raises(ConfigError, match=f"slotmatch relocate '{old}' 'storage.root={new}'"):
            look(of_root(new).tracking_uri)
    assert not (tmp_path / "out").exists()


def test_a_root_by_another_name_is_not_moved(moved, tmp_path):
    old, new = moved
    old.symlink_to(new)
    register_run(of_root(new), str(new / "students" / "second"), None)


def test_a_database_that_was_named_may_serve_several_roots(tmp_path):
    database = f"mlflow.tracking_uri=sqlite:///{tmp_path / 'mlflow.db'}"
    for name in ("one", "two"):
        config = of_root(tmp_path / name, database)
        register_run(config, make_finished_run(config, str(tmp_path / name / "students" / "s")), None)


def test_relocate_lets_all_of_it_follow(places, tmp_path, capsys):
    old, new = places
    left = content(old)
    assert run(relocate.JOB, [str(old), f"storage.root={new}"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["manifests"] == 3
    config = of_root(new)
    pull(CHAMPION, tmp_path / "out", config.tracking_uri)
    manifest = RunManifest.read(str(new / "students" / "first"))
    assert (manifest.clips_uri, manifest.teacher_uri) == (
        str(new / "clips_uri" / "x"),
        str(new / "teacher_uri" / "x"),
    )
    trial = storage.read_json(str(new / "sweeps" / "s" / "trials" / "t.json"))
    assert trial["run_uri"] == str(new / "students" / "first")
    found = trace(CHAMPION, config.tracking_uri)
    assert found.run["uri"] == str(new / "students" / "first")
    assert "missing" not in found.run
    assert found.evaluation["uri"] == str(new / "evaluations" / "e")
    assert register_run(config, str(new / "students" / "first"), None)["version"] == 1, "its run is known"
    assert register_run(config, str(new / "students" / "second"), None)["version"] == 2
    model = tracking.connect(config).get_model_version("slotmatch", "2").tags["logged_model"]
    assert (new / "mlartifacts" / "models" / model / "artifacts" / "MLmodel").is_file()
    assert content(old) == left, "a copy's original stays as it was"
    with sqlite3.connect(summary["backup"]) as backup:
        assert backup.execute("SELECT source FROM model_versions").fetchone()[0].startswith(old.as_uri())


def test_relocate_may_be_done_again(moved, capsys):
    old, new = moved
    words = [str(old), f"storage.root={new}"]
    assert run(relocate.JOB, words) == 0
    before = content(new)
    capsys.readouterr()
    assert run(relocate.JOB, words) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["records"] == 0
    assert content(new) == before


def test_a_relocation_that_was_interrupted_goes_on(moved, monkeypatch):
    old, new = moved
    write = storage.write_json

    def stopped(uri, values):
        write(uri, values)
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "write_json", stopped)
    with pytest.raises(KeyboardInterrupt):
        relocate_now(old, new)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="relocate"):
        tracking.connect(of_root(new))
    assert relocate_now(old, new)["manifests"] == 2
    assert trace(CHAMPION, of_root(new).tracking_uri).run["uri"] == str(new / "students" / "first")


def relocate_now(old, new):
    from pipeline.tracking.moved import relocate

    return relocate(of_root(new), str(old))


def test_a_root_that_was_moved_into_itself(moved):
    old, new = moved[0], moved[0] / "inner"
    old.mkdir()
    moved[1].rename(new)
    assert relocate_now(old, new)["records"]
    assert relocate_now(old, new)["records"] == 0
    assert RunManifest.read(str(new / "students" / "first")).clips_uri == str(new / "clips_uri" / "x")


def test_a_neighbour_of_a_like_name_is_left_alone(moved):
    old, new = moved
    folder = new / "students" / "first"
    storage.write_json(
        str(folder / "manifest.json"),
        {**storage.read_json(str(folder / "manifest.json")), "clips_uri": f"{old}-other/clips/x"},
    )
    relocate_now(old, new)
    assert RunManifest.read(str(folder)).clips_uri == f"{old}-other/clips/x"


def test_relocate_refuses_what_it_can_not_do(moved, tmp_path):
    old, new = moved
    with pytest.raises(ConfigError, match=r"there is no mlflow\.db"):
        relocate_now(old, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"storage\.root itself"):
        relocate_now(new, new)
    with pytest.raises(ConfigError, match=f"relocate '{old}'"):
        relocate_now(tmp_path / "mistyped", new)
    before = content(new)
    with (
        lease(str(new / "students" / "third"), "distill"),
        pytest.raises(ConfigError, match=r"distill .* is at work in"),
    ):
        relocate_now(old, new)
    assert content(new) == before
    abandoned = {"id": "x", "label": "distill", "host": "another", "pid": 1}
    storage.write_json(str(new / "students" / "third" / LEASE_FILE), abandoned)
    with pytest.raises(ConfigError, match="on another"):
        relocate_now(old, new)
