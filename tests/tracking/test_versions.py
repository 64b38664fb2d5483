"""Registered versions as folders that every worker can read."""

from types import SimpleNamespace

import pytest

from pipeline import storage
from pipeline.tracking import versions


@pytest.mark.parametrize(("gone", "times"), [(None, 1), ("config.json", 2), ("manifest.json", 2)])
def test_a_version_is_fetched_once_unless_a_file_is_gone(gone, times, tmp_path, monkeypatch):
    fetched = []

    def fetch(version, folder, tracking_uri):
        fetched.append(folder)
        for name in ("config.json", "model.safetensors"):
            storage.write_bytes(f"{folder}/{name}", b"")
        storage.publish(folder, {"kind": "pulled"})

    found = SimpleNamespace(name="slotmatch", version="1", source="s", tags={"seed": "1"})
    monkeypatch.setattr(versions, "find_version", lambda uri, tracking_uri: found)
    monkeypatch.setattr(versions, "fetch_version", fetch)
    uri, tags = versions.fetch_model("models:/slotmatch/1", str(tmp_path), "sqlite://")
    if gone:
        storage.delete(f"{uri}/{gone}")
    assert versions.fetch_model("models:/slotmatch/1", str(tmp_path), "sqlite://") == (uri, tags)
    assert fetched == [uri] * times
