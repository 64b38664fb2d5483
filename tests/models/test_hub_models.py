"""Slot models on the Hugging Face Hub: pushed, opened, and as teachers and backbones by `hf://` paths."""

import pytest
import torch
from hub_server import SECRET, HubServer, hub_at
from safetensors.torch import save_file
from tiny_models import tiny_model, tiny_section

from jobs._job import PublicFile
from pipeline import storage
from pipeline.artifacts.identity import Artifacts
from pipeline.artifacts.subjects import backbone_identity, model_identity
from pipeline.config import ConfigError, resolve_config
from pipeline.evaluate.subjects import named_model
from pipeline.models import SlotModel, save_slot_model
from pipeline.models.build import build_backbone, checkpoint_hints, load_teacher
from pipeline.storage import hub

NAME = "lab/slots"


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def server(tmp_path, monkeypatch):
    with HubServer() as server, hub_at(server.url, tmp_path / "cache", monkeypatch):
        yield server


@pytest.fixture
def files(server, tmp_path):
    """A public file, a backbone's weights and a model folder, here and in a repository."""
    model, local = tiny_model(image_size=16), tmp_path / "models"
    local.mkdir()
    torch.save({"state_dict": model.state_dict()}, local / "public.ckpt")
    save_file(model.encoder.backbone.model.state_dict(), local / "backbone.safetensors")
    save_slot_model(model, local / "folder")
    found = {str(p.relative_to(local)): p.read_bytes() for p in local.rglob("*") if p.is_file()}
    server.repository(NAME).commit(found)
    return str(local), f"hf://{NAME}"


def test_a_slim_model_finds_its_backbone_on_the_hub(server, files, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    model = tiny_model(image_size=16)  # the one whose backbone is in the repository
    model.push_to_hub("me/slim", backbone_weights=f"hf://{NAME}/backbone.safetensors")
    pushed = server.repositories["me/slim"]
    whole = server.repositories[NAME]
    sizes = [
        len(r.commits[r.at("main")][f])
        for r, f in ((pushed, "model.safetensors"), (whole, "folder/model.safetensors"))
    ]
    assert sizes[0] < sizes[1]
    assert same(SlotModel.from_pretrained("me/slim"), model)


def test_what_is_pushed_is_what_is_opened(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    model, card = tiny_model(seed=1), "---\nlicense: apache-2.0\n---\n# A student\n"
    uri = model.push_to_hub("me/student", card=card, private=True)
    assert same(SlotModel.from_pretrained("me/student"), model)
    repository = server.repositories["me/student"]
    assert uri == f"hf://me/student@{repository.at('main')}"
    assert repository.private
    files = repository.commits[repository.at("main")]
    assert files["README.md"].decode() == card
    save_slot_model(model, tmp_path / "disk")
    for name in ("config.json", "model.safetensors"):
        assert files[name] == (tmp_path / "disk" / name).read_bytes()

    better = tiny_model(seed=2)
    pinned = better.push_to_hub("me/student", branch="try", message="A better one")
    monkeypatch.setattr(hub, "_known", {})
    assert same(SlotModel.from_pretrained("me/student", revision="try"), better)
    assert same(SlotModel.from_pretrained("me/student", revision=pinned.rpartition("@")[2]), better)
    assert same(SlotModel.from_pretrained("me/student"), model)
    assert same(SlotModel.from_pretrained(str(tmp_path / "disk")), model)


def test_what_can_not_be_pushed_or_opened_says_why(server, files, monkeypatch):
    model = tiny_model()
    with pytest.raises(
        storage.AccessError, match=r"refused to write there \(401\): set HF_TOKEN to a token that may"
    ):
        model.push_to_hub("me/student")
    with pytest.raises(ValueError, match="'hf://student' is not of the form"):
        model.push_to_hub("student")
    with torch.no_grad():
        next(model.decoder.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        model.push_to_hub("me/student")
    assert "me/student" not in server.repositories
    with pytest.raises(FileNotFoundError, match=r"config\.json'; did you mean folder/config\.json"):
        SlotModel.from_pretrained(NAME)


@pytest.mark.parametrize("name", ["public.ckpt", "folder"])
def test_a_teacher_is_known_by_its_content(files, name, monkeypatch):
    def config(root):
        values = {"teacher": {"checkpoint": f"{root}/{name}", "num_heads": 2}, "student": tiny_section()}
        return resolve_config(values)

    def identity(root):
        return model_identity(f"{root}/{name}", checkpoint_hints(config(root)))

    assert same(*(load_teacher(config(root), f"{root}/{name}") for root in files))
    assert identity(files[0]) == identity(files[1])


def test_a_teacher_is_used_by_the_commit_that_it_was_looked_up_at(files, server):
    section = {"checkpoint": f"hf://{NAME}/public.ckpt"}
    artifacts = Artifacts(resolve_config({"teacher": section, "student": tiny_section()}), None)
    assert artifacts.require_teacher() == f"hf://{NAME}@{server.repository(NAME).at('main')}/public.ckpt"
    section = {"checkpoint": f"hf://{NAME}/publik.ckpt"}
    artifacts = Artifacts(resolve_config({"teacher": section, "student": tiny_section()}), None)
    with pytest.raises(
        ConfigError, match=r"no file or folder 'hf://.*publik\.ckpt'; did you mean public\.ckpt"
    ):
        artifacts.require_teacher()


def test_a_students_backbone(files):
    sections = [
        resolve_config({"student": tiny_section(backbone_weights=f"{root}/backbone.safetensors")}).student
        for root in files
    ]
    assert same(*map(build_backbone, sections))
    assert backbone_identity(sections[0]) == backbone_identity(sections[1])
    missing = sections[1].model_copy(update={"backbone_weights": f"hf://{NAME}/back.safetensors"})
    with pytest.raises(ConfigError, match=r"there is no file 'hf://.*'; did you mean backbone\.safetensors"):
        backbone_identity(missing)


def test_segment_evaluate_and_export_take_them(files, server):
    settings = PublicFile(num_heads=2)
    local, uri = files
    for name in ("public.ckpt", "folder"):
        assert same(settings.load(f"{uri}/{name}", ""), settings.load(f"{local}/{name}", ""))
    with pytest.raises(FileNotFoundError, match=r"did you mean public\.ckpt"):
        settings.load(f"{uri}/publi.ckpt", "")

    def scored(model):
        return named_model(resolve_config({"evaluate": {"model": model}}))

    commit = server.repository(NAME).at("main")
    assert {k: v.model_uri for k, v in scored(f"{uri}/folder").items()} == {
        "folder": f"hf://{NAME}@{commit}/folder"
    }
    assert scored(f"{uri}/public.ckpt")["public.ckpt"].model_uri == f"hf://{NAME}@{commit}/public.ckpt"
    with pytest.raises(
        ConfigError, match=r"evaluate\.model: there is no file or folder .* did you mean public\.ckpt"
    ):
        scored(f"{uri}/publi.ckpt")
