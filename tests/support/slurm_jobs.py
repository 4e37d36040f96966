"""Submit, watch, signal and requeue jobs of the SLURM that the environment has."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")


class NoSlurm(Exception):
    """No SLURM is available; the message has the reason in one line."""


class Slurm:
    """The cluster that sbatch and scontrol find in `environ`; commands are run in `folder`."""

    def __init__(self, environ: Mapping[str, str] = os.environ, folder: Path | None = None):
        self.environ, self.folder = dict(environ), folder

    def run(self, *command: str, timeout: float = 300) -> subprocess.CompletedProcess:
        """Run a command; return its output and status."""
        return subprocess.run(
            command, cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=timeout
        )

    def require(self) -> None:
        """Raise NoSlurm unless a controller answers."""
        if shutil.which("sbatch", path=self.environ.get("PATH")) is None:
            raise NoSlurm("no sbatch on the PATH: expected a machine that can submit jobs to SLURM")
        ping = self.run("sinfo", "--noheader", "--format=%D", timeout=60)
        if ping.returncode != 0 or not ping.stdout.strip():
            reason = (ping.stderr.strip() or "no nodes").splitlines()[0]
            raise NoSlurm(f"SLURM does not answer (set SLURM_CONF to use another cluster than the default): {reason}")

    def send(self, *command: str) -> "Job":
        """Submit `sbatch *command`; return the job."""
        sent = self.run("sbatch", "--parsable", *command)
        if sent.returncode != 0:
            raise RuntimeError(f"sbatch: {sent.stderr.strip()}")
        return Job(self, sent.stdout.strip().partition(";")[0])

    def node_states(self) -> dict[str, str]:
        """Return {node: state}, such as idle, mixed, down*."""
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").stdout.splitlines()
        return dict(line.split() for line in lines)


class Job:
    """One job, by its number."""

    def __init__(self, slurm: Slurm, number: str):
        self.slurm, self.number = slurm, number

    def describe(self) -> dict[str, str]:
        """Return the values of `scontrol show job`; empty if the controller did not answer."""
        shown = self.slurm.run("scontrol", "show", "job", "--oneliner", self.number).stdout.split()
        return {key: value for key, _, value in (word.partition("=") for word in shown)}

    @property
    def state(self) -> str:
        return self.describe().get("JobState", "")

    @property
    def restarts(self) -> int:
        return int(self.describe().get("Restarts", "0"))

    def signal(self, name: str) -> None:
        """Send a signal to all tasks, but not to the batch script, as SLURM does before a time limit."""
        self.slurm.run("scancel", f"--signal={name}", self.number)

    def signal_task(self, node: str, pid: int, name: str) -> None:
        """Send a signal to one process of one node (its number there), by a step of its own."""
        self.slurm.run(
            *("srun", "--overlap", f"--jobid={self.number}", f"--nodelist={node}", "--nodes=1", "--ntasks=1"),
            *("--input=none", "kill", f"-{name}", str(pid)),
        )

    def requeue(self) -> None:
        self.slurm.run("scontrol", "requeue", self.number)

    def cancel(self) -> None:
        self.slurm.run("scancel", self.number)

    def wait(self, seconds: float = 300) -> int:
        """Wait for the end of the job; return its exit status (sbatch --wait only polls every ten seconds)."""
        wait_until(lambda: self.state in ENDED and self.describe().get("EndTime") != "Unknown", seconds)
        return int(self.describe()["ExitCode"].split(":")[0])


def wait_until(condition: Callable[[], bool], seconds: float = 180, what: str = "") -> None:
    """Wait until the condition holds; poll five times per second.

    Raises:
        TimeoutError: it did not hold within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"timed out after {seconds:g} s{what and ' waiting for ' + what}")
        time.sleep(0.2)


def job_options(nodes: int, tasks_per_node: int) -> Sequence[str]:
    """Return options for a small job on CPU, which override the site settings of the shipped script."""
    return (f"--nodes={nodes}", f"--ntasks-per-node={tasks_per_node}", "--cpus-per-task=1", "--gpus-per-node=0")
