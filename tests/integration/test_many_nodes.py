"""Data, Train and Tune spread over clusters of two and three real nodes give what one node gives."""

import threading

import pyarrow.parquet as pq
import pytest
from clusters import processes, running_cluster
from helpers import GOLDEN_TEACHER

from pipeline import storage
from pipeline.clips.library import artifacts_of
from pipeline.clips.table import ClipSet
from pipeline.sweep.settings import plan_trials

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SWEEP = [*GOLDEN_TEACHER, "dataset.synthetic.videos=24", "dataset.synthetic.frames=40", "ray.num_cpus=2"]
SWEEP += ["clips.videos_per_shard=2", "sweep.grid={distill.beta: [0.1, 0.5]}", "sweep.seeds=[0]"]
SWEEP += ["distill.workers=2", "distill.cpus_per_worker=0.9", "evaluate.baselines=false"]
KINDS = {"Data": "ray::Map", "Train": "ray::RayTrainWorker"}


class Watch:
    """Which nodes have run Ray Data's tasks and Ray Train's workers, looked at while a job runs."""

    def __init__(self, cluster):
        self.cluster, self.seen, self._ended = cluster, {kind: set() for kind in KINDS}, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self):
        while not self._ended.wait(0.2):
            for node in list(self.cluster.pids):
                for kind, title in KINDS.items():
                    if processes(self.cluster, node, title):
                        self.seen[kind].add(node)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()


def results(config, summary):
    """All numbers that a sweep leaves: clips, targets, losses, scores."""
    clips = ClipSet(artifacts_of(config).clips.uri)
    targets = storage.join(artifacts_of(config).targets.uri, "data")
    return {
        "clips": {name: storage.hash_file(storage.join(clips.uri, "data", name)) for name in clips.shards},
        "targets": {name: pq.read_table(storage.join(targets, name)).to_pydict() for name in clips.shards},
        "losses": [storage.read_json(storage.join(run, "history.json")) for run in runs(config, summary)],
        "scores": storage.read_json(storage.join(summary["uri"], "scores.json")),
    }


def runs(config, summary):
    found = storage.read_manifest(summary["uri"])["trials"]
    assert len(found) == len(plan_trials(config))
    return [trial["run"] for trial in found]


@pytest.fixture(scope="module")
def one_node(shared_tiny, tmp_path_factory):
    """What a cluster of one node makes."""
    config = shared_tiny(*SWEEP)
    with running_cluster(tmp_path_factory.mktemp("cluster"), nodes=1, head_cpus=2) as cluster:
        return results(config, cluster.job("sweep", config).finish())


@pytest.mark.parametrize("nodes", [2, 3])
def test_many_nodes_give_what_one_gives(tiny, tmp_path, one_node, nodes):
    config = tiny(*SWEEP)
    # Two workers of 0.9 CPUs don't fit one node of one CPU.
    with running_cluster(tmp_path / "cluster", nodes, head_cpus=1) as cluster, Watch(cluster) as watch:
        summary = cluster.job("sweep", config).finish()
        assert summary["trials"]["finished"] == 2
        assert results(config, summary) == one_node
    assert len(watch.seen["Data"]) > 1, watch.seen
    assert len(watch.seen["Train"]) > 1, watch.seen
