"""Versions, and which of them is the champion, on a real SQLite registry."""

import pytest
import torch
from hub_server import SECRET, HubServer, hub_at
from safetensors.torch import load_file, save_file
from students import evaluation, make_finished_run

from pipeline import storage, tracking
from pipeline.config import resolve_config
from pipeline.models import SlotModel, load_slot_model
from pipeline.registry.stage import pull, register_run, set_champion

pytestmark = pytest.mark.usefixtures("not_exported")


@pytest.fixture
def config(tmp_path):
    return resolve_config({}, [f"storage.root={tmp_path / 'root'}"])


@pytest.fixture
def finished_run(config, tmp_path):
    """Writes what a training job leaves behind; returns the run's URI."""

    def make(name):
        return make_finished_run(config, str(tmp_path / "root" / "students" / name))

    return make


def champion(config):
    return int(tracking.connect(config).get_model_version_by_alias("slotmatch", "champion").version)


def test_the_alias_moves_only_to_a_better_score_on_the_same_evaluation(config, finished_run):
    assert register_run(config, finished_run("first"), evaluation(0.5))["champion"]
    worse = register_run(config, finished_run("worse"), evaluation(0.4))
    assert not worse["champion"]
    assert "50.00" in worse["reason"]
    assert champion(config) == 1
    elsewhere = register_run(config, finished_run("elsewhere"), evaluation(0.9, protocol="another"))
    assert not elsewhere["champion"]
    assert "another evaluation" in elsewhere["reason"]
    unscored = register_run(config, finished_run("unscored"), None)
    assert not unscored["champion"]
    better = register_run(config, finished_run("better"), evaluation(0.6))
    assert better["champion"]
    assert better["version"] == champion(config) == 5


def test_weights_that_are_not_finite_are_not_registered(config, finished_run):
    run = finished_run("diverged")
    path = f"{run}/model/model.safetensors"
    state = load_file(path)
    key = next(k for k in state if k.endswith("to_q.weight"))
    save_file({**state, key: torch.full_like(state[key], torch.nan)}, path)
    with pytest.raises(ValueError, match=rf"model\.safetensors: 1 of \d+ tensors are not finite \({key}\)"):
        register_run(config, run, evaluation(0.5))
    assert not tracking.connect(config).search_model_versions("name = 'slotmatch'")


def test_a_scored_version_replaces_a_champion_that_has_no_score(config, finished_run):
    assert register_run(config, finished_run("unscored"), None)["champion"]
    assert not register_run(config, finished_run("unscored too"), None)["champion"]
    assert register_run(config, finished_run("scored"), evaluation(0.1))["champion"]
    assert champion(config) == 3


def test_a_champion_scored_on_two_evaluations_is_compared_on_each(config, finished_run):
    first = finished_run("first")
    register_run(config, first, evaluation(0.5))
    register_run(config, first, evaluation(0.9, protocol="another"))
    assert not register_run(config, finished_run("second"), evaluation(0.4))["champion"]
    assert register_run(config, finished_run("third"), evaluation(0.6))["champion"]


def test_registering_a_run_again_makes_no_second_version(config, finished_run):
    uri = finished_run("only")
    first = register_run(config, uri, None)
    again = register_run(config, uri, evaluation(0.3))
    assert first["version"] == again["version"] == 1
    tags = tracking.connect(config).get_model_version("slotmatch", "1").tags
    assert tags["score.video_mbo"] == "0.300000"


def test_an_unfinished_run_is_not_registered(config, tmp_path):
    with pytest.raises(storage.IncompleteError, match="unfinished"):
        register_run(config, str(tmp_path / "unfinished"), None)


def test_pull_gives_the_same_weights_without_mlflow(config, finished_run, tmp_path):
    uri = finished_run("only")
    register_run(config, uri, None)
    for name in ("models:/slotmatch@champion", "models:/slotmatch/1"):
        pull(name, tmp_path / "pulled", config.tracking_uri)
        pulled, original = load_slot_model(tmp_path / "pulled"), load_slot_model(f"{uri}/model")
        for a, b in zip(pulled.parameters(), original.parameters(), strict=True):
            assert torch.equal(a, b)


def test_pull_to_object_storage_over_an_earlier_version(config, finished_run, s3, tmp_path, monkeypatch):
    first, second = finished_run("one"), finished_run("another")
    target = storage.join(s3, tmp_path.name)
    for number, run in enumerate((first, second), 1):
        register_run(config, run, None)
        done = pull(f"models:/slotmatch/{number}", target, config.tracking_uri)
        assert done["uri"] == target
        weights = storage.read_bytes(f"{target}/model.safetensors")
        assert weights == storage.read_bytes(f"{run}/model/model.safetensors")
        assert storage.read_manifest(target)["version"] == number

    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "upload_file", cut)
    with pytest.raises(KeyboardInterrupt):
        pull("models:/slotmatch/1", target, config.tracking_uri)
    with pytest.raises(storage.IncompleteError):
        storage.read_manifest(target)


def test_pull_onto_the_hub_brings_the_model_card(config, finished_run, tmp_path, monkeypatch):
    uri = finished_run("only")
    register_run(config, uri, evaluation(0.5))
    with HubServer() as server, hub_at(server.url, tmp_path / "cache", monkeypatch):
        monkeypatch.setenv("HF_TOKEN", SECRET)
        done = pull("models:/slotmatch@champion", "hf://me/student", config.tracking_uri)
        repository = server.repositories["me/student"]
        assert done["uri"] == f"hf://me/student@{repository.at('main')}"
        assert repository.private
        pulled, original = SlotModel.from_pretrained("me/student"), load_slot_model(f"{uri}/model")
    for a, b in zip(pulled.parameters(), original.parameters(), strict=True):
        assert torch.equal(a, b)
    files = repository.commits[repository.at("main")]
    assert {"README.md", "config.json", "model.safetensors"} <= set(files)
    assert storage.MANIFEST not in files
    text = files["README.md"].decode()
    assert text.startswith("---\n")
    assert 'SlotModel.from_pretrained("me/student")' in text
    assert "## Scores" in text
    assert "50.0" in text
    assert "until somebody edits it" not in text


def test_a_run_whose_parameters_were_lost_gets_them(config):
    client = tracking.connect(config)
    run_id = client.create_run(tracking.experiment_id(config), tags={tracking.RUN_TAG: "runs/a"}).info.run_id
    assert tracking.start_run(config, "runs/a", "a", {}) == run_id
    assert client.get_run(run_id).data.params["distill.beta"] == str(config.distill.beta)
    assert tracking.start_run(config, "runs/a", "a", {}) == run_id


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/slotmatch", "NAME@ALIAS"),
        ("slotmatch@champion", "NAME@ALIAS"),
        ("models:/nobody@champion", "not in the registry"),
        ("models:/nobody/7", "not in the registry"),
    ],
)
def test_what_cannot_be_pulled_is_named(config, tmp_path, uri, message):
    tracking.experiment_id(config)  # a registry, with nothing in it
    with pytest.raises(ValueError, match=message):
        pull(uri, tmp_path / "pulled", config.tracking_uri)


def test_file_stores_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="sqlite:///"):
        tracking.client_of(str(tmp_path / "mlruns"))


def test_a_place_without_a_registry_is_named_and_left_empty(config, tmp_path):
    with pytest.raises(ValueError, match=r"no registry at .*storage\.root"):
        pull("models:/slotmatch@champion", tmp_path / "pulled", config.tracking_uri)
    assert not (tmp_path / "root").exists()


def test_the_one_that_was_chosen_replaces_its_rivals_but_no_better_champion(config, finished_run):
    """A sweep's student, whose setting has the best mean, and not the one that was luckiest itself."""
    scores = {"lucky": 0.9, "chosen": 0.6, "another": 0.5}
    versions = {}
    for name, score in scores.items():
        run = finished_run(name)
        done = register_run(config, run, evaluation(score), contend=False, more_tags={"sweep": "s"})
        assert not done["champion"]
        versions[name] = done["version"]
    assert tracking.connect(config).get_model_version("slotmatch", "1").tags["sweep"] == "s"
    rivals = set(versions.values())
    assert set_champion(config, versions["lucky"], rivals)[0]
    holds, reason = set_champion(config, versions["chosen"], rivals)
    assert holds
    assert "1 is one of" in reason
    assert champion(config) == versions["chosen"]
    assert set_champion(config, versions["chosen"], rivals)[0]
    assert register_run(config, finished_run("outsider"), evaluation(0.7))["champion"]
    holds, reason = set_champion(config, versions["chosen"], rivals)
    assert not holds
    assert "70.00" in reason
    assert champion(config) == 4
