"""How many workers a run has on some machines."""

import re

import pytest
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from pipeline.config import ConfigError, resolve_config
from pipeline.distill.elastic import ElasticTrainer, EqualShares
from pipeline.distill.ray_train import choose_workers


def chosen(workers, gpus, *, batch_size=16, cpus=16, nodes=1, cpus_per_worker=0.8):
    """On so many equal nodes; of all of them together `gpus` GPUs."""
    values = {"workers": workers, "batch_size": batch_size, "cpus_per_worker": cpus_per_worker}
    settings = resolve_config({"distill": values}).distill
    each = {"CPU": float(cpus), **({"GPU": float(gpus // nodes)} if gpus else {})}
    return choose_workers("distill", settings, [each] * nodes, gpus)


@pytest.mark.parametrize(
    ("gpus", "workers"), [(0, 1), (1, 1), (2, 2), (3, 2), (7, 4), (8, 8), (12, 8), (64, 16)]
)
def test_auto_takes_every_gpu_that_the_batch_can_be_shared_by(gpus, workers):
    assert chosen("auto", gpus, cpus=64) == workers


def test_auto_says_which_gpus_stay_idle_and_why(capfd):
    assert chosen("auto", 6, batch_size=8) == 4
    assert (
        "4 of 6 GPUs (workers=auto), the most that share a batch of 8 equally; 2 stay idle"
        in capfd.readouterr().err
    )
    assert chosen("auto", 8, cpus=4, cpus_per_worker=2) == 2
    assert "2 of 8 GPUs (workers=auto); 6 stay idle, as a worker needs 2 CPUs too" in capfd.readouterr().err


def test_a_range_is_kept_for_ray_from_the_first_number_that_shares_the_batch():
    assert chosen([1, 8], 0) == (1, 8)
    assert chosen([3, 8], 8) == (4, 8)


def test_a_number_is_itself():
    assert chosen(2, 0, cpus=2) == 2
    assert chosen(1, 0, cpus=0.5) == 1
    assert chosen(2, 0, cpus=1, cpus_per_worker=0.9, nodes=2) == 2
    assert chosen(3, 0, cpus=2.4, batch_size=6) == 3, "2.4 / 0.8 is a little less than 3"


@pytest.mark.parametrize(
    ("workers", "machines", "message"),
    [
        (2, {"gpus": 1}, "workers: 2 don't fit this cluster's 1 GPUs (0.8 CPUs a worker); nearest valid: 1"),
        (
            16,
            {"gpus": 7},
            "workers: 16 don't fit this cluster's 7 GPUs (0.8 CPUs a worker); nearest valid: 4",
        ),
        (
            4,
            {"gpus": 0, "cpus": 2},
            "workers: 4 don't fit this cluster's 2 CPUs (0.8 CPUs a worker); nearest valid: 2",
        ),
        (
            [5, 8],
            {"gpus": 4},
            "workers: 8 don't fit this cluster's 4 GPUs (0.8 CPUs a worker); nearest valid: 4",
        ),
        # One worker of 0.6 CPUs is on each of two nodes of one, not three on both.
        (4, {"gpus": 0, "cpus": 1, "nodes": 2, "cpus_per_worker": 0.6}, "nearest valid: 2"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(workers, machines, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        chosen(workers, **machines)


@pytest.mark.parametrize(("cpus", "workers"), [(1, 1), (3, 2), (7, 4), (9, 8), (30, 8)])
def test_an_elastic_group_shares_the_batch_equally(cpus, workers):
    scaling = ScalingConfig(num_workers=(1, 8), resources_per_worker={"CPU": 1})
    there = {"node": {"CPU": float(cpus)}}
    assert EqualShares(scaling, batch_size=16)._count_possible_workers(there) == workers


def test_an_elastic_trainer_gives_ray_the_groups_of_equal_shares(monkeypatch):
    given = {}
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "1")
    monkeypatch.setattr(
        TorchTrainer, "fit", lambda self: self._initialize_and_run_controller(scaling_policy="Ray's")
    )
    monkeypatch.setattr(
        TorchTrainer, "_initialize_and_run_controller", lambda self, **options: given.update(options)
    )
    ElasticTrainer(print, scaling_config=ScalingConfig(num_workers=(1, 8)), batch_size=16).fit()
    assert isinstance(given["scaling_policy"], EqualShares)
