"""Any number of workers of one batch size learns the same, step by step."""

import functools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from places import python
from training_runs import make_clips, make_config, make_targets

from pipeline.distill.run import Run
from pipeline.distill.trainer import Trainer

SCRIPT = Path(__file__).with_name("train_together.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("workers")
    clips, config = make_clips(root / "clips"), make_config(root)
    Trainer(Run.teacher(config, f"{root}/teacher", clips)).train()
    make_targets(config, clips, f"{root}/teacher/model", f"{root}/targets")
    return root


@functools.cache
def losses(folder, world_size, contrast="global"):
    """Of each step the total loss, the contrast and the slot distance."""
    words = [SCRIPT, world_size, folder / f"rendezvous_{contrast}{world_size}", folder, contrast]
    with ThreadPoolExecutor(world_size) as pool:
        said = list(pool.map(lambda rank: python(words[0], rank, *words[1:])[0], range(world_size)))
    return torch.tensor(json.loads(said[0].splitlines()[-1]))


def test_any_number_of_workers_gives_the_same_losses(folder):
    alone, two, four = (losses(folder, count) for count in (1, 2, 4))
    assert len(alone) == 20
    torch.testing.assert_close(two, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(four, alone, rtol=1e-5, atol=1e-5)


def test_any_number_of_workers_contrasts_the_shares_that_are_said(folder):
    """As so many workers of local contrast do, fewer of them and more."""
    local = losses(folder, 2, "local")
    alone, four = losses(folder, 1, 2), losses(folder, 4, 2)
    torch.testing.assert_close(four, alone, rtol=1e-5, atol=1e-5)
    # Rounding grows with the steps: 1e-6 at the tenth one, 2e-5 at the fifteenth.
    torch.testing.assert_close(alone[:10], local[:10], rtol=1e-5, atol=1e-5)


def test_local_contrast_is_of_each_workers_share(folder):
    """As in the reference implementation under DDP: fewer negatives, so another and lower loss."""
    alone, two = losses(folder, 1, "local"), losses(folder, 2, "local")
    torch.testing.assert_close(two[0, 2], alone[0, 2], rtol=1e-5, atol=1e-5)
    assert two[0, 1] < alone[0, 1] - 0.1
