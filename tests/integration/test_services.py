"""The whole line on a real S3 server, and on a real MLflow server."""

import pytest

from pipeline import storage, tracking
from pipeline.models import load_slot_model
from pipeline.registry.stage import pull
from pipeline.storage import join


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_line_on_s3_with_an_mlflow_server(tiny, job, s3, mlflow_server, tmp_path):
    root = join(s3, "runs")
    config = tiny(f"storage.root={root}", f"mlflow.tracking_uri={mlflow_server.uri}", "distill.workers=1")
    first = job("pipeline", config).finish()
    assert first["clips"].startswith(root)
    assert first["targets"].startswith(root)
    for name in storage.list_names(join(root, "students")):
        assert storage.is_complete(join(root, "students", name))
    assert storage.list_names(join(root, "ray")) == []
    version = tracking.connect(config).get_model_version_by_alias("slotmatch", "champion")
    assert int(version.version) in first["versions"]
    pull("models:/slotmatch@champion", tmp_path / "champion", mlflow_server.uri)
    load_slot_model(tmp_path / "champion")
    second = job("pipeline", config).finish()
    assert all(second["reused"].values())
