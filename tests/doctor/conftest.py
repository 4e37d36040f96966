"""`topoflow doctor` on emulated nodes: processes with a host name, a network interface and mounts of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from tests.support.prepared import prepare_world

ROOT = Path(__file__).parents[2]
CONFIG = {
    "run": {"threads": None},
    "data": {"path": "world", "train": [["2018-10-01", "2018-10-06"]], "lead_times_hours": [6, 12], "threads": 1},
    "model": {"embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_depth": 1},
    "train": {"max_steps": 6, "global_batch_size": 12, "micro_batch_size": 2},
}
NAMES = "abc"


@dataclass(frozen=True)
class Node:
    """How a node differs from the others: shell commands that run on it first, variables, and arguments of doctor."""

    prepare: str = ":"
    environ: dict[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()


@dataclass
class Examined:
    """How all ranks ended, and what each wrote to stdout and stderr."""

    statuses: list[int]
    out: list[str]
    err: list[str]

    @property
    def report(self):
        return json.loads(self.out[0])

    def findings(self, check, speed=True):
        """{(verdict, node)} of a check; speed=False: without nodes slower than others, as on any busy machine."""
        [found] = [item for item in self.report["checks"] if item["check"] == check]
        kept = [item for item in found["findings"] if speed or "the median node" not in item["text"]]
        return {(item["verdict"], item["node"]) for item in kept}

    def texts(self, check):
        [found] = [item for item in self.report["checks"] if item["check"] == check]
        return "\n".join(f"{item['node']}: {item['text']}" for item in found["findings"])

    def figures(self, node):
        [found] = [item["figures"] for item in self.report["nodes"] if item["node"] == node]
        return found


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a small world and run.yaml, whose data path is relative."""
    folder = tmp_path_factory.mktemp("doctor")
    prepare_world(folder / "world", days=8)
    (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    for name in ("run", "home", "tmp"):
        (folder / name).mkdir()
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"10.77.0.{n + 1} {NAMES[n]}\n" for n in range(3)))
    return folder


@pytest.fixture(scope="session")
def network():
    """Network namespaces a, b and c with an interface eth0 each, joined by a bridge in one of their own."""
    prefix = f"doctor{os.getpid()}"
    spaces = [f"{prefix}{name}" for name in (*NAMES, "bridge")]
    lines = [f"ip netns add {space}" for space in spaces] + [f"ip -n {prefix}bridge link add name switch type bridge"]
    lines += [f"ip -n {prefix}bridge link set switch up"]
    for number, space in enumerate(spaces[:-1]):
        lines += [
            f"ip -n {space} link add eth0 type veth peer name port{number} netns {prefix}bridge",
            f"ip -n {space} addr add 10.77.0.{number + 1}/24 dev eth0",
            f"ip -n {space} link set eth0 up",
            f"ip -n {space} link set lo up",
            f"ip -n {prefix}bridge link set port{number} master switch up",
        ]
    made = subprocess.run(["bash", "-ec", "\n".join(lines)], capture_output=True, text=True)
    try:
        if made.returncode != 0:
            pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
        yield prefix
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)


@pytest.fixture
def examine(place, network):
    """Start the doctor on some nodes, one rank on each (nodes of one name are one node), and wait for the end."""

    def run(
        nodes: dict[str, Node] | list[tuple[str, Node]],
        *arguments: str,
        meanwhile: Callable[[list[subprocess.Popen]], None] = lambda _: None,
    ) -> Examined:
        nodes = list(nodes.items()) if isinstance(nodes, dict) else nodes
        ranks = []
        for rank, (name, node) in enumerate(nodes):
            launcher = {"MASTER_ADDR": "a", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": "1"}
            if "SLURM_PROCID" not in node.environ:
                launcher |= {"RANK": str(rank), "WORLD_SIZE": str(len(nodes)), "LOCAL_RANK": "0"}
            folders = {"PYTHONPATH": str(ROOT), "HOME": f"{place}/home", "TMPDIR": f"{place}/tmp"}
            environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **launcher, **folders}
            environ |= node.environ
            # the ports of a network namespace that was just made are free
            script = f'set -e; hostname {name}; mount --bind {place}/hosts /etc/hosts; {node.prepare}; exec "$@"'
            words = ["ip", "netns", "exec", network + name, "unshare", "--mount", "--uts", "bash", "-c", script, "bash"]
            words += [sys.executable, "-m", "topoflow", "doctor", f"{place}/run.yaml", f"run.dir={place}/run"]
            words += [*arguments, *node.arguments]
            pipe = subprocess.PIPE
            ranks.append(subprocess.Popen(words, cwd=place, env=environ, text=True, stdout=pipe, stderr=pipe))
        meanwhile(ranks)
        ended = [process.communicate(timeout=240) for process in ranks]
        return Examined([process.returncode for process in ranks], *map(list, zip(*ended, strict=True)))

    return run


@pytest.fixture(scope="session")
def own_mounts():
    """Words that run a command with mounts of its own, so that a test can mount what it likes."""
    tried = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True)
    if tried.returncode != 0:
        pytest.skip(f"no mounts in a namespace here: {tried.stderr.decode().strip()}")
    return ["unshare", "--mount", "bash", "-c"]
