"""One node each on which something is wrong: what these functions spoil in the process of a rank, before it starts.

Every rank is a node of its own here: a, b or c.
"""

import dataclasses
import os
import resource
import socket
import sys
import time
from pathlib import Path

from topoflow import cli
from topoflow.errors import ConfigError
from topoflow.ranks import Context
from topoflow.tools.doctor import (
    caches,
    clock,
    command,
    compute,
    devices,
    limits,
    network,
    processors,
    reading,
    software,
    storage,
    survey,
)


def run_rank(rank, world, port, output, arguments, fault):
    """`topoflow doctor` as one of several ranks, with what it says in output.out and output.err."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}-{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(
        OMP_NUM_THREADS="1", RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    socket.gethostname = lambda: "abc"[rank]
    os.chdir(Path(output).parent)
    if fault is not None:
        fault("abc"[rank], Path(output).parent)
    status = cli.main(["doctor", *arguments])
    sys.stdout.flush()
    os._exit(status)


def one_fault_in_each_check(node, folder):
    """All of them at once, each on one node."""
    os.environ["MIOPEN_USER_DB_PATH"] = str(folder)
    network.LEAST_PAIR_BYTES, network.REPEATS = 2 * network.TRIAL_BYTES, 2
    {"a": lambda: None, "b": spoil_b, "c": spoil_c}[node]()


def spoil_b():
    os.chdir("/")  # where the data's relative path leads nowhere
    os.environ["GLOO_SOCKET_IFNAME"] = "nowhere0"
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    clock.now = lambda: time.time() + 5
    storage.nearest_folder = lambda path: path.parent.parent
    storage.PATIENCE_SECONDS = 0.2
    sums = compute.loss_sums

    def slow_sums(*arguments):
        time.sleep(1)
        return sums(*arguments)

    compute.loss_sums = slow_sums


def spoil_c():
    software.hash_sources = lambda: "of another version"
    clock.now = lambda: time.time() - 0.5
    storage.free_bytes = lambda folder: 1000
    storage.try_lock = lambda file: "taken"
    storage.measure_write = lambda path: path.write_bytes(b"x")
    caches.cache_folders = lambda: {"TMPDIR": Path("/proc")}

    def describe_device(device):
        raise ValueError("a driver of another age")

    devices.describe_device = describe_device
    read, exchange, sums = reading.read_samples, Context.exchange, compute.loss_sums
    reading.read_samples = lambda config: dataclasses.replace(
        read(config), fingerprint="another", samples_per_second=0.01
    )

    def slow_exchange(self, partner, sent, received):
        time.sleep(1 if sent.nbytes > network.TRIAL_BYTES else 0)  # a busy machine takes some 0.1 s
        exchange(self, partner, sent, received)

    Context.exchange = slow_exchange

    def wrong_sums(*arguments):
        total, count = sums(*arguments)
        return 1.01 * total, count

    compute.loss_sums = wrong_sums


def a_clock_of_rank_0_a_check_that_hangs_and_no_device(node, folder):
    """On a, b and c."""
    survey.Survey.ask_ranks.__defaults__ = (1.0,)
    if node == "b":
        software.hash_sources = lambda: time.sleep(600)
    if node == "c":
        command.choose_device = refuse_device
    if node == "a":
        clock.now = lambda: time.time() + 5


def nobody_is_patient(node, folder):
    """Nor has node b the device that it should have, so that it has something to say."""
    command.PATIENCE_SECONDS = 3.0
    if node == "b":
        command.choose_device = refuse_device


def refuse_device(name, launch):
    raise ConfigError("environment: local rank 8 with 4 visible devices")


def b_dies_in_a_check(node, folder):
    if node == "b":
        software.hash_sources = lambda: os._exit(9)


def two_processes_share_what_is_one_s_own(node, folder):
    """Two ranks of node b have one GPU and a CPU in common, and few open files; a has one CPU, and no shared memory."""
    found = {"kind": "cuda", "name": "cuda:0 GPU", "visible": {}, "assigned": None, "built_for": "", "refusal": None}
    devices.describe_device = lambda device: {**found, "identity": "1" if node in "bc" else "0"}
    socket.gethostname = lambda: {"a": "a", "b": "b", "c": "b"}[node]
    processors.usable_processors = lambda: {"a": [0], "b": [0, 1, 2], "c": [2, 3, 4]}[node]
    open_files, shared_memory_bytes = {"a": (20000, 1000), "b": (200, 10**9), "c": (20000, 10**9)}[node]
    limits.describe_limits = lambda needs_shared_memory: {
        "open_files": open_files,
        "hard_open_files": open_files,
        "shared_memory_bytes": shared_memory_bytes,
    }
