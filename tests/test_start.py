"""What the program imports at its start, and the cost: promises that one careless import would break."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.prepared import prepare_world

ROOT = Path(__file__).parents[1]
NOT_AT_THE_START = {
    "PIL", "google", "matplotlib", "netCDF4", "numcodecs", "pandas", "sympy", "tensorboard", "xarray", "zarr",
}  # fmt: skip
IMPORT = """
import json, sys, time
began = time.process_time()
if sys.argv[1] == "train":
    from topoflow.terminal import prepare_process
    prepare_process()  # as train.py does when it is run
__import__(sys.argv[1])
print(json.dumps({"cpu": time.process_time() - began, "modules": sorted(sys.modules)}))
"""
RUN = """
import sys
import train
status = train.main(sys.argv[1:])
print(*sorted(sys.modules))
sys.exit(status)
"""


def run_python(code, *arguments):
    """Run `code` in a Python process; return the finished process."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environ, capture_output=True, text=True)


@pytest.fixture(scope="module")
def imports():
    """CPU seconds and modules of processes that import torch or the program, alternating."""
    rounds = [{module: json.loads(run_python(IMPORT, module).stdout) for module in ("torch", "train")} for _ in "12345"]
    return {module: [processes[module] for processes in rounds] for module in ("torch", "train")}


def test_the_program_imports_little_beyond_torch(imports):
    torch, train = (set(imports[module][0]["modules"]) for module in ("torch", "train"))
    beyond = train - torch
    assert "topoflow.trainer" in beyond
    assert {module.split(".")[0] for module in beyond} & NOT_AT_THE_START == set()
    assert "torch._dynamo" not in beyond


def test_importing_the_program_takes_at_most_a_quarter_more_than_importing_torch(imports):
    # the minimum, because other load on the machine only adds time
    torch, train = (min(process["cpu"] for process in imports[module]) for module in ("torch", "train"))
    assert train <= 1.25 * torch


def test_one_process_steps_without_plots(tmp_path):
    prepare_world(tmp_path / "data", days=10)
    config = {
        "run": {"threads": 1, "dir": str(tmp_path / "run")},
        "data": {"path": str(tmp_path / "data"), "train": [["2018-10-01", "2018-10-08"]], "threads": 0},
        "model": {"patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2},
        "train": {"max_steps": 1, "global_batch_size": 4, "micro_batch_size": 4},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = run_python(RUN, str(tmp_path / "run.yaml"))
    assert done.returncode == 0, done.stderr
    assert "first step after" in done.stderr
    modules = set(done.stdout.split())
    assert "topoflow.logs" in modules
    assert not {"matplotlib", "netCDF4"} & modules
