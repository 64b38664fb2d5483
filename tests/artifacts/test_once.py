"""Making a folder once: what is found, what is made again, and who does it where two jobs come at a time."""

import threading

import pytest

from pipeline import storage
from pipeline.artifacts.once import all_once, missing_files, once


def listed(uri):
    """Files as stages say them: from the folder's own manifest."""
    return storage.read_manifest(uri)["files"]


def publish(uri):
    for name in ("a", "b"):
        storage.write_bytes(storage.join(uri, name), b"")
    storage.publish(uri, {"files": ["a", "b"]})


@pytest.fixture
def folder(tmp_path):
    uri = str(tmp_path / "made")
    publish(uri)
    return uri


def test_a_published_folder_is_found(folder):
    with once(folder, "job", files=listed) as needed:
        assert not needed


def test_a_folder_that_lost_a_file_is_made_again(folder, capfd):
    storage.delete(storage.join(folder, "b"))
    with once(folder, "job", files=listed) as needed:
        assert needed
        assert not storage.is_complete(folder)  # nobody reads it meanwhile
        publish(folder)
    assert "b is not there (any more); making it again" in capfd.readouterr().err
    with once(folder, "job", files=listed) as needed:
        assert not needed


def test_several_folders_are_made_only_where_they_have_to_be(folder, tmp_path):
    missing = str(tmp_path / "missing")
    with all_once([folder, missing, missing], "job", files=listed) as left:
        assert left == [missing]


def test_two_jobs_that_find_a_file_missing_make_it_once(folder):
    storage.delete(storage.join(folder, "b"))
    made = []

    def job(number):
        with once(folder, f"job {number}", files=listed) as needed:
            if needed:
                made.append(number)
                publish(folder)

    jobs = [threading.Thread(target=job, args=(number,)) for number in range(2)]
    for one in jobs:
        one.start()
    for one in jobs:
        one.join(30)
    assert len(made) == 1


def test_a_folder_that_another_job_is_just_making_again_has_to_be_waited_for(folder):
    """Its manifest goes between the look at it and its reading."""

    def gone(uri):
        storage.delete(storage.join(uri, storage.MANIFEST))
        return listed(uri)

    assert missing_files(folder, gone) == []
    publish(folder)
    with once(folder, "job", files=gone) as needed:
        assert needed
