"""Several nodes, some of which really have the fault that the doctor is to find."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Node

from tests.support.prepared import prepare_world

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FAIL, WARNING = "FAIL", "WARNING"
CLOCK = """
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && clock == CLOCK_REALTIME) {
        long long moment = now->tv_sec * 1000000000LL + now->tv_nsec + atof(getenv("CLOCK_OFFSET")) * 1e9;
        now->tv_sec = moment / 1000000000, now->tv_nsec = moment % 1000000000;
    }
    return failed;
}
"""


SLOW_DISK = """
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
int madvise(void *begin, size_t length, int advice) {
    if (advice == MADV_WILLNEED) /* prepared data are mapped, and each hour is announced */
        usleep(10000);
    return syscall(SYS_madvise, begin, length, advice);
}
int fsync(int file) {
    sleep(5);
    return syscall(SYS_fsync, file);
}
"""


def compile_library(folder, source):
    """Variables that put C functions before those of the C library, for all programs of a process."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler, so no node with such a fault")
    (folder / "fault.c").write_text(source)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "fault.so", "fault.c"], cwd=folder, check=True)
    return {"LD_PRELOAD": str(folder / "fault.so")}


@pytest.fixture(scope="module")
def clock(tmp_path_factory):
    """Variables that put a process's clock so many seconds ahead: all its programs and libraries see that time."""
    library = compile_library(tmp_path_factory.mktemp("clock"), CLOCK)
    return lambda seconds: {**library, "CLOCK_OFFSET": str(seconds)}


def copy_of_the_program(folder):
    shutil.copytree(ROOT / "topoflow", folder / "topoflow", ignore=shutil.ignore_patterns("__pycache__"))
    return {"PYTHONPATH": str(folder)}


def test_each_fault_is_found_on_its_node(examine, place, clock, tmp_path):
    prepare_world(tmp_path / "other-world", days=8, seed=1)
    (tmp_path / "miopen").mkdir()
    other_program = copy_of_the_program(tmp_path / "program")
    with (tmp_path / "program/topoflow/text.py").open("a") as file:
        file.write("\n# changed\n")
    run, shared_cache = place / "run", {"MIOPEN_USER_DB_PATH": str(tmp_path / "miopen")}
    b = Node(
        f"mount -t tmpfs tmpfs {run}; ulimit -n 100; cd /",  # where the relative path of the data leads nowhere
        {**shared_cache, **clock(5), "GLOO_SOCKET_IFNAME": "nowhere0"},
    )
    overlay = f"lowerdir={run},upperdir=/mnt/upper,workdir=/mnt/work"
    c = Node(
        f"mount --bind {tmp_path}/other-world {place}/world; mount -t tmpfs tmpfs /mnt; mkdir /mnt/upper /mnt/work; "
        f"mount -t overlay overlay -o {overlay} {run}",
        {**shared_cache, **clock(-0.5), **other_program, "TMPDIR": "/proc"},
        ("run.seed=5", "run.device=cuda"),
    )
    examined = examine({"a": Node(environ=shared_cache), "b": b, "c": c}, "--json")
    assert examined.statuses == [1, 1, 1], examined.err
    assert examined.out[1:] == ["", ""]
    expected = {
        "ranks": (set(), []),
        "devices": ({(FAIL, "c")}, ["c: run.device: 'cuda' is not usable"]),
        "software": ({(FAIL, "c")}, ["c: sources of topoflow is", "c: run.seed is 5, but 0 on 2 other"]),
        "addresses": ({(FAIL, "b")}, ["GLOO_SOCKET_IFNAME=nowhere0: no interface nowhere0: expected one of .*eth0"]),
        "clocks": ({(FAIL, "b"), (WARNING, "c")}, [r"b: .* [45]\.\d+ s ahead of most", r"c: .* 0\.\d+ s behind most"]),
        "caches": (
            {(FAIL, "c"), (WARNING, "a"), (WARNING, "b"), (WARNING, "c")},
            ["c: TMPDIR, /proc: cannot be written", "a: MIOPEN_USER_DB_PATH, .*: other nodes write there too"],
        ),
        "data": ({(FAIL, "b"), (FAIL, "c")}, ["b: .*world.*does not exist", "c: world has other contents"]),
        "limits": ({(FAIL, "b")}, ["b: at most 100 open files"]),
        "run directory": (
            {(FAIL, "b"), (FAIL, "c")},
            ["b: .* is not that of rank 0", "c: what is written to .* never appears"],
        ),
    }
    for check, (found, patterns) in expected.items():
        texts = examined.texts(check)
        assert examined.findings(check, speed=False) == found, texts
        assert all(re.search(pattern, texts) for pattern in patterns), texts
    assert (FAIL, "c") in examined.findings("model")
    assert "c: rank 2 computes a loss of" in examined.texts("model")
    verdicts = {item["node"]: item["verdict"] for item in examined.report["nodes"]}
    assert verdicts == {"a": WARNING, "b": FAIL, "c": FAIL}
    assert examined.figures("b")["clock_offset_seconds"] == pytest.approx(5, abs=0.2)
    assert examined.figures("c")["clock_offset_seconds"] == pytest.approx(-0.5, abs=0.2)
    assert examined.figures("b")["open_files"] == 100
    assert examined.figures("a")["interface"] == "the node itself"
    assert examined.figures("c")["interface"] == "eth0"
    assert "data_samples_per_second" in examined.figures("a")
    assert "data_samples_per_second" not in examined.figures("b")
    assert not list(run.iterdir())
    assert not list(tmp_path.joinpath("miopen").iterdir())


@contextmanager
def undone(*commands):
    """Run the first of each pair of commands, and the second at the end."""
    try:
        for do, _ in commands:
            subprocess.run(do.split(), check=True)
        yield
    finally:
        for _, undo in commands:
            subprocess.run(undo.split(), check=True)


def test_what_training_refuses_a_slow_link_and_a_slow_disk_are_found(examine, network, tmp_path):
    link = f"-n {network}c qdisc {{}} dev eth0 root"
    slow = f"tc {link.format('add')} tbf rate 40mbit burst 64kb latency 400ms"
    b = Node(environ={"OMP_NUM_THREADS": "2", **compile_library(tmp_path, SLOW_DISK)})
    nodes = {"b": b, "c": Node(arguments=("train.max_steps=7",))}
    with undone((slow, f"tc {link.format('del')}")):
        examined = examine({"a": Node(), **nodes}, "--json")
    assert examined.statuses == [1, 1, 1], examined.err
    assert examined.findings("software") == {(FAIL, "b"), (FAIL, "c")}
    assert "b: threads is 2, but 1 on 2 other(s)" in examined.texts("software")
    assert "c: train.max_steps is 7, but 6 on 2 other(s)" in examined.texts("software")
    assert (FAIL, "c") in examined.findings("network")
    assert re.search("c: sends and receives .*, the median node", examined.texts("network"))
    assert examined.findings("data") == {(WARNING, "b")}
    assert re.search("b: reads .* samples/s, the median node", examined.texts("data"))
    assert examined.findings("run directory") == {(WARNING, "b")}
    assert re.search("b: writes .*B/s, the median node", examined.texts("run directory"))


def test_nodes_that_cannot_reach_each_other_are_named(examine, network):
    cuts = [f"-n {network}{name} route {{}} unreachable 10.77.0.{other}/32" for name, other in (("b", 3), ("c", 2))]
    routes = [f"ip {cut}" for cut in cuts]
    with undone(*((route.format("add"), route.format("del")) for route in routes)):
        examined = examine({"a": Node(), "b": Node(), "c": Node()}, "--json")
    assert examined.statuses == [1, 1, 1], examined.err
    assert examined.findings("network", speed=False) == {(FAIL, "b"), (FAIL, "c")}
    assert "b: no TCP connection from b to c: No route to host" in examined.texts("network")
    assert "c: no TCP connection from c to b: No route to host" in examined.texts("network")
    assert examined.report["checks"][-1]["check"] == "model"
    assert examined.figures("b")["pass_seconds"]


def test_a_file_system_that_hangs_is_a_finding_and_nobody_waits(examine, tmp_path):
    program = copy_of_the_program(tmp_path)
    os.mkfifo(tmp_path / "topoflow" / "hangs.py")
    examined = examine({"a": Node(), "b": Node(environ=program)}, "--json")
    assert examined.statuses == [1, 1], examined.err
    assert examined.findings("software") == {(FAIL, "b")}
    assert "b: no answer within 10 s" in examined.texts("software")
    assert examined.report["checks"][-1]["check"] == "model"


def test_a_rank_that_dies_is_named_with_status_5(examine, place, tmp_path):
    program = copy_of_the_program(tmp_path)
    hangs = tmp_path / "topoflow" / "hangs.py"
    os.mkfifo(hangs)

    def kill_b(ranks):
        with hangs.open("wb"):  # as soon as the doctor reads it
            ranks[1].kill()

    examined = examine({"a": Node(), "b": Node(environ=program)}, "--json", meanwhile=kill_b)
    assert examined.statuses == [5, -9], examined.err
    assert examined.report["checks"][-1]["check"] == "connection"
    assert "rank 1 on b" in examined.texts("connection")
    assert not list((place / "run").iterdir())


def test_ranks_that_never_come_are_named_with_their_hosts(examine):
    step = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_NODELIST": "a,b,c",
        "SLURM_STEP_TASKS_PER_NODE": "1(x3)", "SLURM_LOCALID": "0",
    }  # fmt: skip
    nodes = {
        name: Node(environ={**step, "SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)})
        for rank, name in enumerate("ab")
    }
    examined = examine(nodes, "distributed.setup_timeout_seconds=8", "--json")
    assert examined.statuses == [5, 5], examined.err
    assert examined.findings("ranks") == {(FAIL, "a"), (FAIL, "c")}
    assert re.search(r"rank\(s\) 2 of 3 did not arrive within 8 s", examined.texts("ranks"))
    assert "c: never connected" in examined.texts("ranks")
    assert [(item["node"], item["ranks"]) for item in examined.report["nodes"]] == [("a", [0]), ("c", [2])]
    assert examined.report["processes"] == 3


def test_a_config_that_one_node_cannot_use_is_status_2_on_all(examine):
    examined = examine({"a": Node(), "b": Node(arguments=("train.max_step=7",))}, "--json")
    assert examined.statuses == [2, 2], examined.err
    assert examined.findings("config") == {(FAIL, "b")}
    assert "train.max_steps" in examined.texts("config")


def test_what_two_processes_of_a_node_share_is_found(examine):
    on_cpu_0 = Node("taskset -p -c 0 $$ >&2")
    words = ("train.global_batch_size=8", "model.img_size=[8, 10]", "--json")
    if len(os.sched_getaffinity(0)) < 2 or 0 not in os.sched_getaffinity(0):
        pytest.skip("takes CPU 0 and another one")
    examined = examine([("a", on_cpu_0), ("b", Node()), ("b", on_cpu_0)], *words)
    assert examined.statuses == [1, 1, 1], examined.err
    assert examined.findings("ranks") == {(FAIL, "a"), (FAIL, "b")}
    assert "world size 3 does not divide" in examined.texts("ranks")
    assert "the launcher reports 1 process(es) on this node, found 2" in examined.texts("ranks")
    assert examined.findings("CPUs") == {(WARNING, "a"), (WARNING, "b")}
    assert "1 CPU(s) per process for the training and data.threads=1: give 2" in examined.texts("CPUs")
    assert "ranks 1-2 share CPU(s) 0:" in examined.texts("CPUs")
    assert all(examined.figures(node)["network_bytes_per_second"] > 0 for node in "ab")
    assert examined.findings("data", speed=False) == {(FAIL, "a"), (FAIL, "b")}
    assert "model.img_size: [8, 10]: expected the data's [8, 12]" in examined.texts("data")


def test_torchrun_is_examined_and_the_table_can_be_read(place):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "topoflow"]
    done = subprocess.run(
        [*command, "doctor", "run.yaml", f"run.dir={place / 'run'}"],
        cwd=place, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "c10d" not in done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 120
    named = [line.split("  ")[0] for line in lines if re.match(r"[a-zA-Z ]+  +(ok|WARNING) ", line)]
    assert named == [
        "ranks", "devices", "CPUs", "software", "addresses", "clocks", "caches", "data", "limits", "run directory",
        "network", "model",
    ]  # fmt: skip
    assert "2 process(es) on 1 node(s), 2 on each; launcher: torchrun" in done.stdout
    header, row = lines[-4:-2]
    assert header.startswith("node")
    assert "0-1" in row.split()
    assert not list((place / "run").iterdir())
