"""The numbers of public implementations (tests/golden/README.md), and how near ours have to be."""

import numpy as np
import torch
from places import GOLDEN


def numbers(name):
    """The arrays of a file below `golden/`."""
    arrays = np.load(GOLDEN / f"{name}.npz")
    return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def close(value, expected, name=""):
    torch.testing.assert_close(value, expected, atol=1e-4, rtol=0, msg=lambda text: f"{name}: {text}")
