"""The program as a user starts it: real processes on a small simulated world."""

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import train as train_script
from tests.support.forked_runs import ForkedRuns
from tests.support.prepared import prepare_world
from topoflow.data.dataset import ForecastDataset
from topoflow.data.sampling import BatchPlan

ROOT = Path(__file__).parents[2]

CONFIG = {
    "run": {"threads": 1, "seed": 3},
    "data": {
        "train": [["2018-10-01", "2018-10-06"]],
        "validation": [["2018-10-07", "2018-10-08"]],
        "lead_times_hours": [6, 12],
        "availability": True,
        "threads": 2,
    },
    "model": {"patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2, "drop_rate": 0.1, "drop_path": 0.3},
    "optim": {"learning_rate": 1e-3, "schedule_interval": "step", "schedule_length": 20, "warmup_steps": 3},
    "train": {
        "max_steps": 20,
        "global_batch_size": 16,
        "micro_batch_size": 4,
        "validate_every_steps": 8,
        "log_every_steps": 1,
    },
    "checkpoint": {"every_steps": 6, "keep_last": 10},
}


@dataclass
class Program:
    """Starts train.py or a command on the small world; everything is written to `folder`."""

    folder: Path
    config: Path
    forked: ForkedRuns

    def command(self, *overrides, run="run", processes=1):
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        return [*launcher, str(ROOT / "train.py"), str(self.config), f"run.dir={self.folder / run}", *overrides]

    def start(self, *overrides, env=None, **options):
        """Start a process, with stderr and stdout together in a pipe."""
        return subprocess.Popen(
            self.command(*overrides, **options),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment(env),
        )

    def train(self, *overrides, processes=1, **options):
        """Train; return status and output, with several processes those of torchrun.

        A single process is this one, several are forked from one that has imported torch: both start fast.
        """
        arguments = self.command(*overrides, **options)[2:]
        if processes > 1:
            ending = self.forked.run(arguments, processes)
            return subprocess.CompletedProcess(arguments, 0 if ending.done else 1, stderr=ending.output)
        output = io.StringIO()
        with contextlib.redirect_stderr(output):
            status = train_script.main(arguments)
        return subprocess.CompletedProcess(arguments, status, stderr=output.getvalue())

    def topoflow(self, *arguments):
        """Run a command of `python -m topoflow`; return the finished process."""
        command = [sys.executable, "-m", "topoflow", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=self.environment(), cwd=self.folder)

    def environment(self, more=None):
        return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(more or {})}

    def events(self, run="run", kind="train"):
        lines = (self.folder / run / "metrics.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def losses(self, run="run"):
        events = self.events(run)
        assert len({event["step"] for event in events}) == len(events)
        return {event["step"]: event["loss_hex"] for event in events}

    def state(self, run="run", step=20):
        return torch.load(self.folder / run / "checkpoints" / f"step-{step:08d}" / "state.pt", weights_only=True)

    def exit_record(self, run="run"):
        return json.loads((self.folder / run / "exit.json").read_text())


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("world") / "data"
    prepare_world(path, days=10)
    return path


@pytest.fixture(scope="session")
def make_program(world, forked):
    """A function that returns a program with its run directories in a given folder."""

    def make(folder):
        config = folder / "run.yaml"
        config.write_text(yaml.safe_dump({**CONFIG, "data": {**CONFIG["data"], "path": str(world)}}))
        return Program(folder, config, forked)

    return make


@pytest.fixture
def program(tmp_path, make_program):
    return make_program(tmp_path)


@pytest.fixture
def without_targets_in_step(monkeypatch):
    """Remove the targets of one step of the first epoch, in runs in this process."""
    whole = ForecastDataset.fill
    batch, micro = CONFIG["train"]["global_batch_size"], CONFIG["train"]["micro_batch_size"]

    def take_away(step):
        def fill(self, indices, samples):
            plan = BatchPlan(len(self), CONFIG["run"]["seed"], batch, micro, rank=0, world_size=1)
            in_step = np.isin(indices, plan.order(0)[(step - 1) * batch : step * batch])
            whole(self, indices, samples)
            samples["valid"][torch.from_numpy(in_step)] = False

        monkeypatch.setattr(ForecastDataset, "fill", fill)

    return take_away


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, make_program):
    """Runs that never stopped, by number of processes: created once, read by many tests."""
    program, made = make_program(tmp_path_factory.mktemp("undisturbed")), set()

    def run_of(processes):
        if processes not in made:
            done = program.train(run=f"run{processes}", processes=processes)
            assert done.returncode == 0, done.stderr
            made.add(processes)
        return program.losses(f"run{processes}"), program.state(f"run{processes}")

    return run_of


@pytest.fixture(scope="session")
def forked(tmp_path_factory):
    """A starter of runs whose processes can be killed at a chosen place."""
    return ForkedRuns(tmp_path_factory.mktemp("forked"))


def same_state(one, other):
    """Return whether weights, buffers, moments, steps, rates, scheduler and progress are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[key], other[key]) for key in one)
    return one == other


@pytest.fixture
def assert_same_run(program, undisturbed):
    """A function that checks that a run equals one that never stopped, bit for bit, at every step."""

    def check(processes, run="run", parts=("model", "optimizer", "scheduler", "progress")):
        losses, state = undisturbed(processes)
        assert program.losses(run) == losses
        for part in parts:
            assert same_state(program.state(run)[part], state[part]), part

    return check
