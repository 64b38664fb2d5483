"""`hf://`: reading models from the Hugging Face Hub, with and without a network, and what errors say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import SECRET, HubServer, hub_at
from places import ROOT

from pipeline import storage
from pipeline.log import redact
from pipeline.storage import hub

NAME = "lab/slots"
FILES = {
    "movi_e.ckpt": b"the teacher" * 1000,
    "small/config.json": b"{}",
    "small/model.safetensors": b"weights",
}


@pytest.fixture
def server(tmp_path, monkeypatch):
    with HubServer() as server, hub_at(server.url, tmp_path / "cache", monkeypatch):
        server.repository(NAME).commit(FILES)
        yield server


def another_process(monkeypatch):
    """Forgets what this one has asked, as another would not know it."""
    monkeypatch.setattr(hub, "_known", {})


def go_offline(monkeypatch):
    from huggingface_hub import constants

    another_process(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_file_is_what_the_repository_holds_and_is_downloaded_once(server, tmp_path):
    uri = f"hf://{NAME}/movi_e.ckpt"
    (tmp_path / "local.ckpt").write_bytes(FILES["movi_e.ckpt"])
    assert storage.exists(uri)
    assert not storage.is_folder(uri)
    assert storage.hash_file(uri) == storage.hash_file(str(tmp_path / "local.ckpt"))
    with storage.local_copy(uri) as path:
        assert Path(path).read_bytes() == FILES["movi_e.ckpt"]
        assert path.endswith("/movi_e.ckpt")  # by whose ending it is known what it is
    assert sum(asked.startswith("GET /aside/") for asked in server.asked) == 1
    assert not storage.exists(f"hf://{NAME}/other.ckpt")


def test_a_folder_has_the_files_that_are_asked_for(server):
    uri = f"hf://{NAME}/small"
    assert storage.is_folder(uri)
    assert storage.is_folder(f"hf://{NAME}")
    assert storage.read_json(f"{uri}/config.json") == {}
    with storage.local_copy(uri, ("config.json", "model.safetensors")) as folder:
        assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    with storage.local_copy(uri) as folder:
        assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_a_revision_is_a_branch_a_tag_or_a_commit(server, monkeypatch):
    repository = server.repository(NAME)
    first = repository.at("main")
    repository.names["v1"] = first
    second = repository.commit({"movi_e.ckpt": b"a better one"})
    repository.names["refs/pr/1"] = repository.commit({"movi_e.ckpt": b"a proposal"}, "feature/x")

    def content(revision):
        return storage.read_bytes(f"hf://{NAME}{revision}/movi_e.ckpt")

    assert content("") == content("@main") == content(f"@{second}") == b"a better one"
    assert content("@v1") == content(f"@{first}") == FILES["movi_e.ckpt"]
    assert content("@refs/pr/1") == content("@feature%2Fx") == b"a proposal"


def test_a_branch_means_one_commit_to_a_process_and_to_those_that_get_it_pinned(server, monkeypatch):
    uri, repository = f"hf://{NAME}/movi_e.ckpt", server.repository(NAME)
    pinned = storage.pinned(uri)
    assert pinned == f"hf://{NAME}@{repository.at('main')}/movi_e.ckpt"
    assert storage.pinned(pinned) == pinned
    repository.commit({"movi_e.ckpt": b"pushed meanwhile"})
    assert storage.read_bytes(uri) == FILES["movi_e.ckpt"]
    another_process(monkeypatch)
    assert storage.read_bytes(pinned) == FILES["movi_e.ckpt"]
    assert storage.read_bytes(uri) == b"pushed meanwhile"


def test_what_is_not_there_is_named_with_what_is(server):
    with pytest.raises(FileNotFoundError, match=r"movie\.ckpt'; did you mean movi_e\.ckpt\?"):
        storage.read_bytes(f"hf://{NAME}/movie.ckpt")
    with pytest.raises(FileNotFoundError, match=r"config\.json'; did you mean small/config\.json\?"):
        storage.local_copy(f"hf://{NAME}", ("config.json",)).__enter__()
    with pytest.raises(FileNotFoundError, match=r"its files: movi_e\.ckpt, small/config\.json"):
        storage.read_bytes(f"hf://{NAME}/nothing-like-it")
    with pytest.raises(storage.HubError, match=r"no revision 'v9'; give a branch, a tag or a whole commit"):
        storage.exists(f"hf://{NAME}@v9/movi_e.ckpt")
    with pytest.raises(storage.HubError, match=r"no revision '0{40}'"):
        storage.exists(f"hf://{NAME}@{'0' * 40}/movi_e.ckpt")
    with pytest.raises(storage.HubError, match=r"no such repository of models at .*asked with none"):
        storage.exists("hf://lab/typo/movi_e.ckpt")


@pytest.mark.parametrize(
    "uri", ["hf://slots", "hf://", "hf://lab/slots@/a.ckpt", "hf://datasets/lab/slots/a.ckpt"]
)
def test_what_is_no_model_of_the_hub_is_refused_with_the_form(uri):
    with pytest.raises(ValueError, match=r"hf://USER/REPO@REVISION/FILE"):
        storage.exists(uri)
    with pytest.raises(ValueError, match="hf:// to read models"):
        storage.write_bytes("hf://lab/slots/a.ckpt", b"")


def test_private_and_gated_repositories_say_what_token_they_want(server, monkeypatch):
    server.repository("lab/private", private=True).commit(FILES)
    server.repository("lab/gated", gated=True).commit(FILES)
    with pytest.raises(storage.HubError, match=r"lab/private: .* or it is private: then set HF_TOKEN"):
        storage.exists("hf://lab/private/movi_e.ckpt")
    with pytest.raises(
        storage.AccessError, match=r"gated: ask for access at http://.*/lab/gated, then set HF_TOKEN"
    ):
        storage.read_bytes("hf://lab/gated/movi_e.ckpt")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    for name in ("private", "gated"):
        assert storage.read_bytes(f"hf://lab/{name}/movi_e.ckpt") == FILES["movi_e.ckpt"]
    with pytest.raises(storage.HubError, match="asked with that of HF_TOKEN") as raised:
        storage.exists("hf://lab/typo/movi_e.ckpt")
    assert SECRET not in str(raised.value)


def test_a_token_is_never_said_wherever_it_comes_from():
    assert SECRET not in redact(f"401 for url with token {SECRET}: refused")


@pytest.mark.parametrize("how", ["offline", "no network", "broken"])
def test_without_a_network_the_cache_serves_and_says_how_to_fill_it(server, how, monkeypatch, tmp_path):
    from huggingface_hub import constants

    storage.read_bytes(f"hf://{NAME}/movi_e.ckpt")
    if how == "offline":
        go_offline(monkeypatch)
    elif how == "no network":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    server.broken = how == "broken"
    another_process(monkeypatch)
    commit = server.repository(NAME).at("main")
    for revision in ("", "@main", f"@{commit}"):
        uri = f"hf://{NAME}{revision}/movi_e.ckpt"
        assert storage.exists(uri)
        assert storage.read_bytes(uri) == FILES["movi_e.ckpt"]
    fill = r"hf download lab/slots small/config\.json"
    with pytest.raises(storage.UnavailableError, match=rf"can't be reached, and the cache .*{fill}"):
        storage.read_bytes(f"hf://{NAME}/small/config.json")
    with pytest.raises(
        storage.UnavailableError, match=r"the cache .*hf download lab/other a\.ckpt --revision v1"
    ):
        storage.exists("hf://lab/other@v1/a.ckpt")


def test_the_environment_leads_there(server, tmp_path):
    """As a user sets it: in processes that import huggingface_hub after it was set, the second without a network."""
    code = f"import json; from pipeline import storage; print(json.dumps(storage.hash_file('hf://{NAME}/movi_e.ckpt')))"
    (tmp_path / "local.ckpt").write_bytes(FILES["movi_e.ckpt"])
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_XET": "1",
    }
    for more in ({"HF_ENDPOINT": server.url}, {"HF_HUB_OFFLINE": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, **more},
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout) == storage.hash_file(str(tmp_path / "local.ckpt"))
