"""What Ray's workers do with memory: freed blocks are used again, and the kernel hands out far fewer pages."""

import platform

import pytest
from places import python

COUNT = """
import resource, sys
import numpy as np
from pipeline.compute import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def use():
    return [np.ones(megabytes << 17) for megabytes in (1, 3, 9, 20, 40)]

use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how):
    return int(python("-c", COUNT, how)[0])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_large_blocks_are_used_again():
    assert page_faults("keep") < 0.2 * page_faults("leave")
