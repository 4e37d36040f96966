"""The GPU benchmark on machines without a GPU: what it runs on a CPU, and what it reports as not run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_benchmark(*arguments, **environ):
    command = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True)


@pytest.mark.slow
def test_on_a_cpu_all_parts_run(tmp_path):
    output = tmp_path / "figures.json"
    done = run_benchmark("--quick", "--device", "cpu", "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(output.read_text())
    assert report["failed"] == {}
    assert set(report["peaks"]) == {"fp32", "TF32", "bf16"}
    named = [f"{precision}{ending}" for ending in ("", ", no FlexAttention") for precision in ("fp32", "TF32", "bf16")]
    assert list(report["steps"]) == named
    assert all(min(step["seconds"]) > 0 for step in report["steps"].values())
    assert {"step, bf16, compiled", "step, bf16, compiled, no FlexAttention"} <= set(report["not_run"])
    assert set(report["communication"]) == {"1", "2"}
    assert report["resume"]["bf16"]["losses"] == [3, 3]
    equal, total = report["resume"]["bf16"]["tensors"]
    assert equal == total > 100  # weights and two moments of each
    assert sum(line.startswith("| one training step ") for line in done.stdout.splitlines()) == 1
    assert sum(report["tests"].values()) > 4


def test_without_a_gpu_each_part_is_reported_as_not_run(tmp_path):
    output = tmp_path / "figures.json"
    done = run_benchmark("--output", output, CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("not run: ")]
    assert all(line.endswith(": no CUDA device is visible") for line in lines)
    assert "Nothing was run." in done.stdout
    report = json.loads(output.read_text())
    assert len(report["not_run"]) == len(lines)
    assert {"tests marked gpu", "peak, TF32", "step, bf16, compiled", "resume, bf16"} <= set(report["not_run"])
    assert {"torch", "device", "driver", "commit"} <= set(report["environment"])


def test_a_part_that_fails_is_reported_with_status_1():
    done = run_benchmark("--quick", "--device", "cpu", "--only", "tests", PYTEST_ADDOPTS="--no-such-option")
    assert done.returncode == 1
    assert "failed: tests marked gpu: exit status 4 of pytest" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--device", "cpu"], "--device cpu: expected --quick as well"),
        (["--output", "no-such-folder/figures.json"], "--output no-such-folder/figures.json: No such file"),
    ],
)
def test_unusable_options_are_refused_at_the_start(arguments, reason):
    done = run_benchmark(*arguments)
    assert done.returncode == 2
    assert reason in done.stderr
    assert done.stdout == ""
