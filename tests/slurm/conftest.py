"""A real SLURM of four nodes on this machine; where that is impossible, these tests are skipped with the reason."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.support.prepared import prepare_world
from tests.support.slurm_jobs import Slurm, wait_until

ROOT = Path(__file__).parents[2]
CONFIG = {
    "run": {"seed": 3},
    "data": {"train": [["2018-10-01", "2018-10-06"]], "lead_times_hours": [6, 12], "threads": 1},
    "model": {"embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_depth": 1, "drop_rate": 0.1},
    "train": {"max_steps": 6, "global_batch_size": 8, "micro_batch_size": 2, "log_every_steps": 1},
    "checkpoint": {"every_steps": 3},
}


@dataclass
class Cluster:
    """The cluster, and a config for a small world; everything writes to `folder`."""

    folder: Path
    config: Path
    environ: dict[str, str]

    def run(self, *command: str, timeout: float = 300) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=timeout
        )

    def send(self, *command: str) -> str:
        """Submit `sbatch *command`; return the number of the job."""
        sent = self.run("sbatch", "--parsable", *command)
        assert sent.returncode == 0, sent.stderr
        return sent.stdout.strip()

    def wait_for(self, job: str) -> int:
        """Wait for the end of a job; return its exit status (sbatch --wait only polls every ten seconds)."""
        self.wait_until(lambda: self.describe(job, "EndTime") != "Unknown" and self.describe(job, "JobState") in ENDED)
        return int(self.describe(job, "ExitCode").split(":")[0])

    def wait_until(self, condition: Callable[[], bool], seconds: float = 180) -> None:
        """Wait until the condition holds; poll five times per second."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "timed out"
            time.sleep(0.2)

    def describe(self, job: str, key: str) -> str:
        """Return one value of `scontrol show job`."""
        shown = self.run("scontrol", "show", "job", job).stdout.split()
        return next(word.partition("=")[2] for word in shown if word.startswith(f"{key}="))


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="session")
def slurm_environ(shared_dir):
    """The environment in which srun and sbatch find the cluster."""
    script = shared_dir / "slurm_local.sh"
    if not script.exists() or os.geteuid() != 0:
        pytest.skip("no SLURM: expected slurm_local.sh in TOPOFLOW_SHARED, and root")
    was_up = subprocess.run(["bash", str(script), "status"], capture_output=True).returncode == 0
    up = subprocess.run(["bash", str(script), "up"], capture_output=True, text=True)
    if up.returncode != 0:
        pytest.skip(f"no SLURM: {(up.stdout + up.stderr).strip().splitlines()[-1]}")
    env_file = (
        Path(os.environ.get("SLURM_LOCAL_DIR", Path(os.environ.get("TMPDIR", "/tmp")) / "slurm_local")) / "env.sh"
    )
    [line] = [line for line in env_file.read_text().splitlines() if "SLURM_CONF=" in line]
    # the nodes use this interpreter where there is no .venv
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    yield {**os.environ, "PATH": path, "SLURM_CONF": line.split("=", 1)[1]}
    if not was_up:
        subprocess.run(["bash", str(script), "down"], capture_output=True)


class Nodes:
    """The machines of the cluster, to be broken and repaired."""

    def __init__(self, script: Path, environ: dict[str, str]):
        self._script, self._slurm = script, Slurm(environ)
        self._broken: dict[str, str] = {}

    def crash(self, node: str) -> None:
        """Power it off."""
        self._broken[node] = "crash"
        self._call("crash", node)

    def cut(self, node: str) -> None:
        """Cut off its network; its processes continue."""
        self._broken[node] = "cut"
        self._call("cut", node)

    def repair(self) -> None:
        """Undo all that, and wait until every node can take jobs again."""
        for node, how in self._broken.items():
            if how == "cut":
                self._call("join", node)
                self._call("crash", node)  # a booting node registers at once; else it takes a minute
            self._call("boot", node)
        self._broken = {}
        up = {"idle", "mixed", "allocated", "completing"}
        wait_until(lambda: set(self._slurm.node_states().values()) <= up, 120, "all nodes to be up")

    def _call(self, what: str, node: str) -> None:
        subprocess.run(["bash", str(self._script), what, node], check=True, capture_output=True)


@pytest.fixture(scope="session")
def has_networks(slurm_environ):
    """Whether each node has a network of its own, so that it can be cut off (slurm_local.sh: MODE=netns)."""
    return "MODE=netns" in (Path(slurm_environ["SLURM_CONF"]).parents[1] / "run/state").read_text()


@pytest.fixture(scope="module")
def nodes(slurm_environ, shared_dir):
    nodes = Nodes(shared_dir / "slurm_local.sh", slurm_environ)
    yield nodes
    nodes.repair()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("world") / "data"
    prepare_world(path, days=8)
    return path


@pytest.fixture
def cluster(tmp_path, world, slurm_environ):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({**CONFIG, "data": {**CONFIG["data"], "path": str(world)}}))
    return Cluster(tmp_path, config, slurm_environ)


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slurm")
