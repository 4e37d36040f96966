"""Memory that a step frees is there for the next one."""

import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys
import numpy as np
from topoflow.host_memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [np.ones(2**20) for _ in range(16)]  # 8 MiB each
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults = [step() for _ in range(6)]
print(min(faults[:2]), max(faults[3:]), hasattr(ctypes.CDLL(None), "gnu_get_libc_version"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
@pytest.mark.parametrize("mode", ["keep", "as it is"])
def test_pages_are_fetched_once(mode):
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
    first, later, is_glibc = done.stdout.split()
    if is_glibc == "False":
        pytest.skip("the C library is not glibc")
    # of what it is without: else the measure would say nothing
    assert (int(later) < 50) == (mode == "keep"), (first, later)
