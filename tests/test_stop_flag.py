"""The stop signals, at the end of a process."""

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import os, signal
from topoflow.run_dir import StopFlag
with StopFlag().listening(until_exit={until_exit}):
    pass
os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.mark.parametrize(("until_exit", "status"), [(True, 0), (False, -signal.SIGUSR1)])
def test_a_signal_after_the_block_kills_only_a_process_that_goes_on(until_exit, status):
    command = [sys.executable, "-c", SCRIPT.format(until_exit=until_exit)]
    assert subprocess.run(command, check=False).returncode == status
