"""Training, caching, scoring and segmenting on a CUDA device that is not there: what fails, and what waits for it."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from places import python

HERE = Path(__file__).parent
TRAINING = ("slotmatch", "live teacher", "drawn slots", "reconstruction KD")
OTHERS = ("resumed", "hungarian", "verify", "evaluate", "segment")
ERRORS = {  # mistakes planted in the pipeline, and what is said, as by a GPU
    "a CPU target": "found at least two devices, cpu and cuda:0",
    "a batch that was not moved": "should be the same",
    "CPU noise": "found at least two devices",
    "numpy of a CUDA tensor": ".numpy() is not supported",  # a GPU's says more
    "numpy of bf16": "unsupported ScalarType BFloat16",
}
WAITS = {
    "a number read in each step": "read of a number, distill/trainer.py:train",
    "a tensor made in each step": "copy of unpinned memory to the device, distill/batches.py:slot_batch",
}
LOGGED = ["read of a number, distill/trainer.py:diverged", "copy to the host, distill/step.py:read_values"]
RARER_TRAINING = ("fp32", "plain decoder", "mse", "feature KD", "feature KD, live", "slot map")
RARER_TRAINING += ("cached features", "drawn slots, live", "mixer student", "cyclic", "no KD")
RARER_TRAINING += ("SlotContrast teacher", "VideoSAUR teacher")
RARER = (
    "bound",
    "hungarian per frame",
    "evaluate, cyclic",
    "evaluate, attention",
    "latencies",
    "public checkpoint",
)


@pytest.fixture(scope="session")
def device(tmp_path_factory):
    """The library of device.cpp."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler (c++ or g++) to build the fake CUDA device with")
    if torch.backends.cuda.is_built():
        pytest.skip(
            "this PyTorch is built with CUDA; the fake device takes the place of what its CPU build lacks"
        )
    home = Path(torch.__file__).parent
    library = tmp_path_factory.mktemp("fake_cuda") / "device.so"
    flags = [
        "-shared",
        "-fPIC",
        "-std=c++20",
        f"-I{home / 'include'}",
        f"-L{home / 'lib'}",
        f"-Wl,-rpath,{home / 'lib'}",
    ]
    subprocess.run([compiler, *flags, HERE / "device.cpp", "-lc10", "-ltorch_cpu", "-o", library], check=True)
    return library


def results_of(device, folder, names):
    environment = {"LD_PRELOAD": str(device), "OMP_NUM_THREADS": "1"}
    printed, _ = python(HERE / "cases.py", folder, *names, timeout=1500, **environment)
    return json.loads(printed.splitlines()[-1])


@pytest.fixture(scope="session")
def results(device, tmp_path_factory):
    return results_of(device, tmp_path_factory.mktemp("cases"), (*TRAINING, *OTHERS, *ERRORS, *WAITS))


@pytest.fixture(scope="session")
def rarer_results(device, tmp_path_factory):
    return results_of(device, tmp_path_factory.mktemp("rarer"), (*RARER_TRAINING, *RARER))


def check_training(result):
    """4 steps, of which the third and the last are logged."""
    assert result["error"] is None
    assert (result["status"], result["step"], result["logged"]) == ("ok", 4, [3, 4])
    assert result["without gradient"] == []
    assert "2" not in result["waits"], "a step that is not logged waits for nothing"
    assert result["waits"]["3"] == LOGGED


@pytest.mark.timeout(1500)  # the first one runs all cases
@pytest.mark.parametrize("name", TRAINING)
def test_training_waits_for_the_device_at_logged_steps_alone(results, name):
    check_training(results[name])
    assert results[name]["precision"] == "bf16"


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", OTHERS)
def test_the_rest_runs(results, name):
    assert results[name]["error"] is None


def test_a_hungarian_matching_waits_once_a_step(results):
    assert results["hungarian"]["waits"]["2"] == ["copy to the host, losses.py:match_slots"]


@pytest.mark.parametrize("name", ERRORS)
def test_a_planted_mistake_fails_as_on_a_gpu(results, name):
    assert ERRORS[name] in (results[name]["error"] or "")


@pytest.mark.parametrize("name", WAITS)
def test_a_planted_wait_is_seen(results, name):
    assert results[name]["error"] is None
    assert WAITS[name] in results[name]["waits"]["1"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", RARER_TRAINING)
def test_rarer_ways_to_train(rarer_results, name):
    check_training(rarer_results[name])


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", RARER)
def test_rarer_parts(rarer_results, name):
    assert rarer_results[name]["error"] is None
