"""Every benchmark runs, by the command that users type, at its smallest size; the figures mean nothing."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = ["--grid", "8x12", "--embed-dim", "16", "--depth", "1", "--num-heads", "2", "--micro-batch-size", "2"]
QUICK = {
    "canonical_reduction": [*TINY, "--accumulation", "1", "2", "--rounds", "2", "--steps", "1"],
    "checkpoint_cost": ["--parameters", "100000", "--repeats", "1"],
    "compare_trainers": ["--quick"],
    "embedding": ["--quick"],
    "fingerprint_cost": [*TINY, "--accumulation", "1", "--rounds", "2", "--steps", "1"],
    "flip_campaign": ["--flips", "20", "--others", "4"],
    "flops": ["--quick"],
    "loop": ["--quick"],
    "model_step": ["--quick"],
    "physics": ["--quick", "--out", "OUT"],
    "prepare_campaign": ["--cycles", "2"],
    "prepare": ["--hours", "24", "--memory-hours", "24", "48", "--rounds", "1", "--shape", "8x12"],
    "published": [],
    "scaling": ["--ranks", "1,2", "--steps", "4", "--repeats", "1"],
    "start": ["--quick"],
}
NOT_ALONE = {"gpu", "gpu_workers", "requeue_campaign", "trainer_loops", "kill_campaign"}
"""test_gpu_benchmark.py; started by gpu; needs a SLURM; started by compare_trainers and loop; a README command."""
BY_RUN = {"loading": "data", "terrain_block": "terrain"}
"""What benchmarks/run.py starts in a test of its own, by its names for them; it starts machine in any case."""


def run_benchmark(name, *arguments, cwd=ROOT, **environ):
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environ}, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_benchmark_runs(name, tmp_path):
    arguments = [str(tmp_path) if word == "OUT" else word for word in QUICK[name]]
    done = run_benchmark(name, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


def test_every_benchmark_that_is_a_command_is_tested():
    commands = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()}
    assert commands == {*QUICK, *NOT_ALONE, *BY_RUN, "run", "machine"}


def test_the_model_of_larger_machines_is_printed():
    done = run_benchmark("scaling", "--model")
    assert done.returncode == 0, done.stderr
    assert "| step without overlap, ms |" in done.stdout


def test_all_benchmarks_run_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--quick", "--only", *BY_RUN.values()]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "processor  " in done.stdout


def test_the_requeue_campaign_requires_slurm(tmp_path):
    done = run_benchmark("requeue_campaign", "--folder", str(tmp_path / "runs"), PATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == "requeue_campaign: no sbatch on the PATH: expected a machine that can submit jobs to SLURM\n"
    assert not (tmp_path / "runs").exists()


def test_no_test_imports_a_benchmark():
    importers = []
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            importers += [str(path) for name in names if name.split(".")[0] == "benchmarks"]
    assert not importers
