"""The command lines, as a user types them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DRAWN = ROOT / "tests" / "golden" / "videosaur_tiny.ckpt"


def run(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, cwd=cwd, timeout=120
    )


def test_the_models_need_no_ray():
    code = "import pipeline.models, pipeline.losses, pipeline.metrics, sys; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_wrong_key_is_refused_before_ray_starts():
    done = run("jobs.shard", str(ROOT / "configs/videos.yaml"), "clips.clip_frame=3")
    assert done.returncode == 2
    assert "clips.clip_frames" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "refused"
    assert "Traceback" not in done.stderr


def test_dry_run_prints_the_resolved_config():
    done = run("jobs.shard", str(ROOT / "configs/demo.yaml"), "--dry-run", "distill.seed=7")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["distill"]["seed"] == 7


def test_a_chain_with_a_misspelt_stage_submits_nothing():
    command = ["jobs/submit.sh", "shard,distil", "configs/demo.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: 'distil' is no stage; python -m jobs lists them\n"


def test_a_missing_folder_of_videos_is_named(tmp_path):
    done = run("jobs.shard", str(ROOT / "configs/videos.yaml"), "dataset.path=nowhere", cwd=tmp_path)
    assert done.returncode == 1
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["status"] == "failed"
    assert "nowhere" in summary["error"]
    assert "Traceback" not in done.stderr


def test_a_later_stage_says_which_one_comes_before(tmp_path, real_videos):
    folder = real_videos["bikes"].parent
    arguments = (f"dataset.path={folder}", f"storage.root={tmp_path}")
    done = run("jobs.cache", str(ROOT / "configs/videos.yaml"), *arguments)
    assert done.returncode == 2
    assert "jobs.shard" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.mp4", "model=nowhere", "out=x"], "nowhere"),
        (["a.mp4", f"model={DRAWN}", "out=x", "num_heads=3"], "num_slots: must be given"),
    ],
)
def test_segment_names_what_is_wrong(tmp_path, arguments, message):
    done = run("jobs.segment", *arguments, cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert "teacher." not in done.stderr, "there is no such section here"
    assert message in json.loads(done.stdout.splitlines()[-1])["error"]
    assert "Traceback" not in done.stderr
