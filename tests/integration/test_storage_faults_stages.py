"""Every stage on an S3 server that is busy, slow and cut off now and then gives what it gives on a local disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from stages_in_turn import run_stages

from pipeline import storage, tracking
from pipeline.clips.table import SHARD_FOLDER
from pipeline.models import load_slot_model
from pipeline.registry.stage import pull
from pipeline.storage import join

RATES = {"503": 0.05, "500": 0.01, "429": 0.01, "stall": 0.005, "stall in answer": 0.005}
RATES |= {"cut": 0.02, "cut in answer": 0.02, "cut in upload": 0.02, "answer lost": 0.02}
STALLED_AFTER = 3  # seconds
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first test runs the line twice
FAULTS = "503, 500, 429, cut connections, stalls"


class Line:
    """The configs and summaries of a run on a local disk, and of one on the faulty server."""

    def __init__(self, build, folder, proxy):
        options = ["evaluate.baselines=false", "evaluate.teacher=false"]
        self.proxy = proxy
        self.calm_config = build(*options)
        database = f"mlflow.tracking_uri=sqlite:///{folder}/faulty.db"
        root = join("s3://bucket", folder.name)
        self.config = build(*options, f"storage.root={root}", database, "distill.workers=1")
        self.calm = run_stages(self.calm_config)
        proxy.reset()
        proxy.rates = RATES
        # A process of its own: workers of a Ray that runs already would not know of the server.
        config, out, log = folder / "faulty.yaml", folder / "faulty.json", folder / "faulty.log"
        config.write_text(self.config.to_yaml())
        # As many threads as in this process (tests/conftest.py): sums are rounded by how they are split.
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment = {**os.environ, **threads, "SLOTMATCH_S3_TIMEOUT": str(STALLED_AFTER)}
        script = Path(__file__).with_name("stages_in_turn.py")
        with open(log, "wb") as errors:
            command = [sys.executable, str(script), str(config), str(out)]
            code = subprocess.run(command, env=environment, stderr=errors, cwd=folder).returncode
        self.injected = dict(proxy.injected)
        proxy.calm()
        self.log = log.read_text()
        assert code == 0, self.log[-4000:]
        self.faulty = json.loads(out.read_text())

    def files(self, stage):
        """The bytes of the data files that a stage made, calm and faulty."""
        folders = [join(run[stage]["uri"], SHARD_FOLDER) for run in (self.calm, self.faulty)]
        return [{n: storage.read_bytes(join(f, n)) for n in storage.list_names(f)} for f in folders]


@pytest.fixture(scope="module")
def line(shared_tiny, tmp_path_factory, faulty_s3, local_ray):
    return Line(shared_tiny, tmp_path_factory.mktemp("faulty"), faulty_s3)


@pytest.mark.fault(FAULTS, "shard", "the same fingerprint and bytes as on a local disk")
def test_shard(line):
    assert line.faulty["shard"]["fingerprint"] == line.calm["shard"]["fingerprint"]
    assert line.faulty["shard"]["bad"] == []
    calm, faulty = line.files("shard")
    assert len(calm) == 4
    assert faulty == calm


@pytest.mark.fault(FAULTS, "cache", "the same slots of every clip and view")
def test_cache(line):
    assert line.faulty["cache"]["fingerprint"] == line.calm["cache"]["fingerprint"]
    calm, faulty = line.files("cache")
    assert len(calm) == 4
    assert faulty == calm


@pytest.mark.fault(FAULTS, "distill", "the same losses in every step, the same weights")
def test_distill(line):
    names = ("history.json", "model/model.safetensors")
    for name in names:
        calm, faulty = (
            storage.read_bytes(join(run["distill"]["uri"], name)) for run in (line.calm, line.faulty)
        )
        assert faulty == calm, name


@pytest.mark.fault(FAULTS, "evaluate", "the same scores of every video")
def test_evaluate(line):
    assert line.faulty["evaluate"]["scores"] == line.calm["evaluate"]["scores"]
    files = [join(run["evaluate"]["uri"], "videos.parquet") for run in (line.calm, line.faulty)]
    calm, faulty = (pq.read_table(storage.open_read(file)) for file in files)
    assert faulty.equals(calm)


@pytest.mark.fault(FAULTS, "register", "the champion is pulled and loads")
def test_register(line, tmp_path):
    client = tracking.connect(line.config)
    champion = client.get_model_version_by_alias("slotmatch", "champion")
    assert str(champion.version) == str(line.faulty["register"]["version"])
    pull("models:/slotmatch@champion", tmp_path / "champion", line.config.tracking_uri)
    load_slot_model(tmp_path / "champion")


@pytest.mark.fault(FAULTS, "all", "faults came, retries were logged, all is published whole")
def test_nothing_is_left_unfinished(line):
    assert sum(line.injected.values()) >= 20, line.injected
    assert len(line.injected) >= 5, line.injected
    assert "testsecret" not in line.log
    root = line.config.storage.root
    for kind in ("clips", "targets", "students", "teachers", "generated"):
        for name in storage.list_names(join(root, kind)):
            assert storage.is_complete(join(root, kind, name)), f"{kind}/{name}"
    for stage in ("shard", "cache"):
        uri = line.faulty[stage]["uri"]
        for shard in storage.list_names(join(uri, SHARD_FOLDER)):
            pq.read_table(storage.open_read(join(uri, SHARD_FOLDER, shard)))
