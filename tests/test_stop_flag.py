"""The stop signals, at the end of a process."""

import os
import signal
import subprocess
import sys

import pytest
import yaml

from tests.support.pausing import ROOT, make_project
from tests.support.prepared import prepare_world

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


SIGNALLED_AT_EXIT = """
import atexit, os, runpy, signal, sys
atexit.register(os.kill, os.getpid(), signal.SIGUSR1)
atexit.register(lambda: print(sys.modules["topoflow"].__file__))
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """The config file of a run of one step."""
    folder = tmp_path_factory.mktemp("one step")
    prepare_world(folder / "world", days=4)
    settings = {
        "data": {"path": str(folder / "world"), "train": [["2018-10-01", "2018-10-03"]], "lead_times_hours": [6]},
        "model": {"embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_depth": 1},
        "train": {"max_steps": 1, "global_batch_size": 4, "micro_batch_size": 4},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"


@pytest.mark.parametrize("in_campaign", [False, True], ids=["train.py", "train.py of the requeue campaign"])
def test_a_signal_after_the_run_does_not_change_its_status(tmp_path, one_step, in_campaign):
    script, sources = ROOT / "train.py", ROOT
    if in_campaign:  # which runs a copy: ROOT may be edited during a campaign
        script, sources = make_project(tmp_path) / "train.py", tmp_path / "program"
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "SLURM_JOB_NAME": "job", "SLURM_PROCID": "0"}
    command = [sys.executable, "-c", SIGNALLED_AT_EXIT, str(script), str(one_step), f"run.dir={tmp_path / 'run'}"]
    run = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, f"{sources / 'topoflow/__init__.py'}\n"), run.stderr
