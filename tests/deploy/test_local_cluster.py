"""Which processes `make cluster-down` ends."""

import json
import os
import subprocess

from cluster.local import LocalCluster


def start(folder):
    cluster = LocalCluster(folder)
    cluster._start("service", ["sleep", "60"], {})
    return cluster


def test_what_was_started_is_found_again_and_ended(tmp_path):
    start(tmp_path)
    later = LocalCluster.load(tmp_path)
    service = later.family("service")[0]
    later.stop_all()
    assert not service.is_running()
    assert LocalCluster.load(tmp_path).pids == {}


def test_another_process_of_the_same_number_is_left_alone(tmp_path):
    """As after a reboot."""
    cluster = start(tmp_path)
    stranger = subprocess.Popen(["sleep", "60"])
    state = json.loads((tmp_path / "state.json").read_text())
    state["pids"]["service"] = [stranger.pid, 1e9]
    (tmp_path / "state.json").write_text(json.dumps(state))
    LocalCluster.load(tmp_path).stop_all()
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()
    cluster.stop_all()


def test_only_the_owner_reads_the_passwords(tmp_path):
    cluster = start(tmp_path)
    cluster.stop_all()
    for name in ("env", "state.json"):
        assert os.stat(tmp_path / name).st_mode & 0o077 == 0
