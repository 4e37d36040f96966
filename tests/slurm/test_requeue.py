"""Time limits, preemption, requeue and lost nodes: each job here resumes by itself, and its run ends bit-identical to
an undisturbed one (see also benchmarks/requeue_campaign.py).
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from tests.support.compare_runs import differences, losses
from tests.support.pausing import ROOT, Plan, PlanFolder, make_project
from tests.support.slurm_jobs import ENDED, Job, Slurm, job_options, wait_until

STEPS = 60
SETTINGS = {
    "run": {"seed": 3, "threads": 1},
    "data": {
        "train": [["2018-10-01", "2018-10-04"]],
        "validation": [["2018-10-06", "2018-10-07"]],
        "lead_times_hours": [6, 12],
        "threads": 1,
    },
    "model": {"embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_depth": 1, "drop_rate": 0.1},
    "train": {
        "max_steps": STEPS,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "validate_every_steps": 30,
        "log_every_steps": 1,
    },
    "checkpoint": {"every_steps": 4},
    # canonical: one process has the same bits as two
    "distributed": {"reduction": "canonical", "timeout_seconds": 60.0},
}
SLOW = Plan(step_seconds=0.3)


@dataclass
class Bench:
    """A project whose jobs train slowly if planned so."""

    folder: Path
    project: Path
    slurm: Slurm
    jobs: list["BenchJob"] = field(default_factory=list)

    def plan(self, name: str, restart: int, plan: Plan) -> None:
        PlanFolder(self.folder / "plans", name, restart).write(plan)

    def started(self, name: str, restart: int, rank: int) -> dict:
        """Wait for a rank to start; return its node and process."""
        files = PlanFolder(self.folder / "plans", name, restart)
        wait_until(lambda: files.started(rank) is not None, what=f"start {restart} of {name}")
        return files.started(rank)

    def send(self, name: str, *options: str, nodes: int = 2) -> "BenchJob":
        sent = self.slurm.send(
            *job_options(nodes, tasks_per_node=1),
            *options,
            f"--chdir={self.project}",
            f"--job-name={name}",
            f"--output={self.folder / name}.out",
            str(self.project / "launch/train.sbatch"),
            str(self.folder / "config.yaml"),
            f"run.dir={self.folder / name}",
        )
        self.jobs.append(BenchJob(self.slurm, sent.number, self.folder / name))
        return self.jobs[-1]


class BenchJob(Job):
    """A job and its run."""

    def __init__(self, slurm: Slurm, number: str, run: Path):
        super().__init__(slurm, number)
        self.run = run

    @property
    def output(self) -> str:
        return self.run.with_suffix(".out").read_text()

    @property
    def exit(self) -> dict:
        return json.loads((self.run / "exit.json").read_text())

    @property
    def events(self) -> list[dict]:
        path = self.run / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    @property
    def step(self) -> int:
        """Return the last step in metrics.jsonl."""
        return max((event["step"] for event in self.events if event["event"] == "train"), default=0)

    @property
    def saved_step(self) -> int:
        return max((event["step"] for event in self.events if event["event"] == "checkpoint"), default=0)

    def extend(self, minutes: int) -> None:
        """Raise the time limit."""
        self.slurm.run("scontrol", "update", f"JobId={self.number}", f"TimeLimit={minutes}")

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: self.step >= step, what=f"step {step}: {self.describe()}")

    def wait_for_queue(self, restarts: int) -> None:
        """Wait until the job is back in the queue, or runs again."""

        def is_back() -> bool:
            now = self.describe()
            assert now["JobState"] not in ENDED, self.output
            return now["JobState"] in ("PENDING", "RUNNING") and now["Restarts"] == str(restarts)

        wait_until(is_back, what=f"restart {restarts}")


@pytest.fixture(scope="module")
def bench(tmp_path_factory, world, slurm_environ):
    folder = tmp_path_factory.mktemp("requeue")
    settings = {**SETTINGS, "data": {**SETTINGS["data"], "path": str(world)}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    # the batch script uses the package to find run.dir, and the project's train.py imports tests.support
    slurm = Slurm({**slurm_environ, "PYTHONPATH": str(ROOT)}, folder)
    bench = Bench(folder, make_project(folder), slurm)
    yield bench
    for job in bench.jobs:
        job.cancel()
    for job in bench.jobs:
        job.wait()


@pytest.fixture(scope="module")
def limited(bench):
    """A job that gets the time limit signal in its first minute and is requeued; a function that waits for this.

    It is submitted before it is needed: the signal comes after 20 to 50 s.
    """
    bench.plan("limited", 0, Plan(step_seconds=1.0))  # 60 s: it still runs when the signal comes
    bench.plan("limited", 1, Plan(step_seconds=3.0))  # the rest takes long: it still runs when it is cancelled
    job = bench.send("limited", "--time=1", "--signal=USR1@40")

    def wait_for_warning() -> BenchJob:
        job.wait_for_queue(restarts=1)
        job.extend(minutes=30)  # before the second start gets the signal as well
        return job

    with ThreadPoolExecutor(1) as thread:
        yield thread.submit(wait_for_warning).result


@pytest.fixture(scope="module")
def untouched(bench, limited):
    """An undisturbed run: one process, without SLURM."""
    run = bench.folder / "untouched"
    command = [sys.executable, str(ROOT / "train.py"), str(bench.folder / "config.yaml"), f"run.dir={run}"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    subprocess.run(command, env=clean, check=True, capture_output=True, timeout=120)
    return run


def test_one_signalled_rank_stops_all_and_the_job_resumes_after_each_requeue(bench, untouched):
    bench.plan("signalled", 0, SLOW)
    bench.plan("signalled", 1, SLOW)
    job = bench.send("signalled")
    job.wait_for_step(6)
    for name in ("USR1", "TERM"):  # the second does not break the first one's save
        job.signal_task(**bench.started("signalled", 0, rank=1), name=name)
    job.wait_for_queue(restarts=1)
    assert job.exit["status"] == 75
    first = job.saved_step
    assert first == job.step  # no step was lost
    assert first < 30  # and the save did not wait for a validation
    job.wait_for_step(first + 2)
    job.requeue()
    job.wait_for_queue(restarts=2)
    second = job.saved_step
    assert second == job.step > first
    assert job.wait() == 0, job.output
    assert [event["step"] for event in job.events if event["event"] == "resume"] == [first, second]
    assert differences(job.run, untouched, STEPS) == []


def test_a_job_is_requeued_before_its_time_limit_and_a_cancelled_one_saves_and_is_not(limited, untouched):
    job = limited()
    assert "stopped by SIGUSR1" in job.output
    job.wait_for_step(job.step + 1)
    job.cancel()
    job.wait()
    assert (job.state, job.restarts) == ("CANCELLED", 1)
    assert job.exit["status"] == 75
    *warned, cancelled = map(int, re.findall(r"stopped by SIG\w+ after step (\d+); its checkpoint", job.output))
    assert [event["step"] for event in job.events if event["event"] == "resume"] == warned  # empty if it was in set-up
    assert cancelled == job.saved_step == job.step
    assert losses(job.run) == losses(untouched)[: len(losses(job.run))]


@pytest.fixture(scope="module")
def lost(bench, nodes, has_networks):
    """Two jobs that lost a node at the same time, after they have ended: {how: job}.

    crash: its second node crashed. cut: its only node was cut off from the network, but not from the file system.
    """
    bench.plan("crash", 0, SLOW)
    bench.plan("cut", 0, Plan(step_seconds=2.5))  # 150 s: this start still runs long after the other began
    for job in bench.jobs:  # jobs of failed tests
        job.cancel()
    # n1 and n2 for one job, n3 for the other, so that n1 and n4 remain for both
    jobs = {"crash": bench.send("crash")}
    if has_networks:
        jobs["cut"] = bench.send("cut", "--exclude=n1,n2", nodes=1)
    try:
        for how, job in jobs.items():
            job.wait_for_step(5 if how == "crash" else 2)  # the first checkpoint is of step 4
            job.lost_node = bench.started(how, 0, rank=1 if how == "crash" else 0)["node"]
        for how, job in jobs.items():
            job.step_then = job.step
            getattr(nodes, how)(job.lost_node)
        for job in jobs.values():
            job.wait()
        if has_networks:  # the stale process reaches the end of its step
            wait_until(lambda: "nothing was written" in jobs["cut"].output, 30, "a refused write")
    finally:
        nodes.repair()
    return jobs


def test_a_job_whose_node_crashed_resumes_elsewhere_from_its_last_checkpoint(bench, lost, untouched):
    job = lost["crash"]
    assert job.describe()["ExitCode"] == "0:0", job.output
    assert job.restarts == 1
    assert bench.started("crash", 1, rank=0)["node"] != job.lost_node != bench.started("crash", 1, rank=1)["node"]
    [resumed] = [event["step"] for event in job.events if event["event"] == "resume"]
    assert resumed >= job.step_then - 4  # the last checkpoint: there is one every 4 steps
    assert differences(job.run, untouched, STEPS) == []


def test_a_process_on_a_node_that_was_cut_off_writes_nothing_once_the_job_runs_elsewhere(bench, lost, untouched):
    if "cut" not in lost:
        pytest.skip("the nodes have no network of their own here, so none can be cut off")
    job = lost["cut"]
    assert job.describe()["ExitCode"] == "0:0", job.output
    assert bench.started("cut", 1, rank=0)["node"] != job.lost_node
    [resumed] = [event["step"] for event in job.events if event["event"] == "resume"]
    assert resumed > job.step_then  # it survived, and what it had saved until then counts
    [refused] = [line for line in job.output.splitlines() if "nothing was written" in line]
    assert f"(job {job.number}, restart 1)" in refused
    assert "this process held generation 1" in refused
    assert json.loads((job.run / ".lease").read_text())["generation"] == 2
    assert job.exit == {"status": 0, "reason": "done"}  # not how the stale process ended
    assert differences(job.run, untouched, STEPS) == []
    left = [path.name for path in job.run.rglob(".*") if path.name != ".lease"]
    assert left == []
