"""Ray Train and Tune themselves keep their files on an S3 server of which every third request fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RATES = {
    "503": 0.08,
    "429": 0.08,
    "cut": 0.04,
    "cut in answer": 0.04,
    "cut in upload": 0.04,
    "answer lost": 0.04,
    "stall": 0.01,
    "stall in answer": 0.01,
}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.fault(
    fault="S3: 503, 429, stalls, cut connections in every third request",
    stage="Ray Train, Tune",
    checked="both end, their last checkpoints are whole, a restored sweep finds its trials",
)
def test_train_and_tune(faulty_s3):
    faulty_s3.reset()
    faulty_s3.rates = RATES
    script = Path(__file__).with_name("ray_files_in_turn.py")
    done = subprocess.run(
        [sys.executable, str(script), "s3://bucket/ray-files"],
        env={**os.environ, "SLOTMATCH_S3_TIMEOUT": "3", "AWS_MAX_ATTEMPTS": "10"},
        capture_output=True,
        text=True,
    )
    faulty_s3.calm()
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"train": 2, "tune": [2, 2], "scores": [2, 4]}
    assert faulty_s3.injected.total() > 20
    assert len(faulty_s3.injected) >= 5
