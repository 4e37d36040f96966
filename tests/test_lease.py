"""One process at a time in a run directory: real processes, stopped, killed and racing."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from topoflow import lease as lease_module
from topoflow.errors import RunDirectoryError
from topoflow.lease import FILE_NAME, Lease, host_identity, process_start
from topoflow.logs import cut_metrics
from topoflow.run_dir import RunDirectory

ROOT = Path(__file__).parents[1]
PRELUDE = """
import os, signal, sys, time
from pathlib import Path
from topoflow.errors import RunDirectoryError
from topoflow.lease import Lease
from topoflow.logs import cut_metrics
from topoflow.run_dir import RunDirectory

folder = Path(sys.argv[1])
"""


@pytest.fixture
def start(tmp_path):
    """Starts a process that runs some code with `folder` as its run directory; ended with the test."""
    processes = []

    def start_process(code, *arguments):
        process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + code, str(tmp_path), *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        processes.append(process)
        return process

    yield start_process
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def lease(tmp_path):
    """Makes leases of the run directory, released with the test."""
    made = []

    def make(*arguments, **options):
        made.append(Lease(tmp_path, *arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.release()


def contents(folder):
    """Every file: its bytes, and when it was written. Folders: when a name in them was changed."""
    paths = [folder, *folder.rglob("*")]
    return {path: (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns) for path in paths}


def read_lease(folder):
    return json.loads((folder / FILE_NAME).read_text())


def write_lease(folder, **changes):
    """A lease of this process, taken by hand, but for some changes."""
    record = {
        "generation": 7, "token": "by hand", "beat": 3, "seconds": 0.4, "released": False, "host": socket.gethostname(),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "pid_namespace": os.readlink("/proc/self/ns/pid"), "pid": os.getpid(),
        "started": Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19], "job": None, "restart": 0,
        "since": "2026-01-31 12:00:00 UTC",
    }  # fmt: skip
    (folder / "new").write_text(json.dumps(record | changes))
    (folder / "new").rename(folder / FILE_NAME)


# ---- who may have it


HOLD = """
lease = Lease(folder, *(sys.argv[2:3] or [None]))
lease.take()
print("held", flush=True)
sys.stdin.read()
"""


def test_the_second_process_is_refused_at_once_and_changes_nothing(start, lease, tmp_path):
    process = start(HOLD, "17")
    assert process.stdout.readline() == "held\n"
    before, began = contents(tmp_path), time.monotonic()
    said = rf"in use by process {process.pid} on {socket.gethostname()} \(job 17, restart 0\) since 20.* UTC: expected"
    for options in ({}, {"job": "17"}, {"job": "18", "restart": 3}):
        with pytest.raises(RunDirectoryError, match=said):
            lease(**options).take()
    assert time.monotonic() - began < 2
    assert contents(tmp_path) == before


FORK_AND_HOLD = """
def work():
    try:
        with lease.writing():
            (folder / "said").write_text("written by a child")
    except RunDirectoryError as refusal:
        (folder / "said").write_text(str(refusal))
    time.sleep(60)

lease = Lease(folder)
lease.take()
with lease.writing():
    child = os.fork()
    if child == 0:
        work()
while not (folder / "said").exists():
    time.sleep(0.01)
print(child, flush=True)
sys.stdin.read()
"""


def test_a_killed_process_is_followed_at_once_though_its_children_survive(start, lease, tmp_path):
    process = start(FORK_AND_HOLD)
    child = int(process.stdout.readline())
    try:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and left a zombie
        began = time.monotonic()
        assert lease().take() is None
        assert time.monotonic() - began < 2
    finally:
        os.kill(child, signal.SIGKILL)
    assert "not held by this process: nothing was written" in (tmp_path / "said").read_text()


def test_each_taking_has_the_next_generation_also_after_a_release(lease, tmp_path):
    for generation in (1, 2, 3):
        one = lease()
        assert one.take() is None
        assert read_lease(tmp_path)["generation"] == generation
        one.release()
        with pytest.raises(RunDirectoryError, match="not held by this process"), one.writing():
            pass


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, False),
        ({"started": "1"}, True),  # the number of a process that is gone, used again
        ({"started": ""}, False),  # where the system does not say, it counts as alive
        ({"pid": 2**22 + 1}, True),  # beyond the highest number of a process
        ({"released": True}, True),
        ({"job": "17"}, False),
        ({"job": "17", "restart": -1}, True),
        ({"job": "17", "restart": 1}, False),
        ({"job": "17", "restart": 1, "released": True}, True),
        ({"job": "18", "restart": -1}, False),
        ({"pid": 1, "started": ""}, False),
    ],
)
def test_a_holder_on_this_machine(lease, tmp_path, changes, taken):
    write_lease(tmp_path, **changes)
    if not taken:
        with pytest.raises(RunDirectoryError, match="in use by"):
            lease(job="17").take()
        return
    lease(job="17").take()
    assert read_lease(tmp_path)["generation"] == 8


@pytest.mark.parametrize("elsewhere", [{"host": "n2"}, {"boot": "another"}, {"pid_namespace": "pid:[1]"}])
def test_a_holder_elsewhere_that_stands_still_is_taken_over_after_its_time(lease, tmp_path, elsewhere):
    write_lease(tmp_path, **elsewhere)
    with pytest.raises(RunDirectoryError, match="in use by"):
        lease().take(wait=False)
    began = time.monotonic()
    note = lease().take()
    assert time.monotonic() - began >= 0.4
    assert "taken over from process" in note
    assert "no heartbeat for 0.4 s" in note


@pytest.mark.parametrize(("change", "taken"), [({"beat": 4}, False), ({"released": True}, True)])
def test_a_holder_elsewhere_is_watched(lease, tmp_path, change, taken):
    write_lease(tmp_path, host="n2", seconds=60)
    threading.Timer(0.3, write_lease, [tmp_path], {"host": "n2", "seconds": 60, **change}).start()
    began = time.monotonic()
    with contextlib.nullcontext() if taken else pytest.raises(RunDirectoryError, match=r"in use by process .* on n2"):
        lease().take()
    assert time.monotonic() - began < 10


def test_a_lower_restart_never_takes_from_one_that_may_live(lease, tmp_path):
    write_lease(tmp_path, host="n2", job="17", restart=2, seconds=0.01)
    before = contents(tmp_path)
    with pytest.raises(RunDirectoryError, match=r"a later start of this job, process .* restart 2\).* not restart 1"):
        lease(job="17", restart=1).take()
    assert contents(tmp_path) == before
    assert "an earlier start of this job" in lease(job="17", restart=3).take()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"generation": 3}', "typed"])
def test_a_damaged_lease_bars_nobody_for_long(lease, tmp_path, content):
    if content == "typed":
        write_lease(tmp_path, pid="12")
    else:
        (tmp_path / FILE_NAME).write_text(content)
    began = time.monotonic()
    note = lease(seconds=0.3).take()
    assert time.monotonic() - began >= 0.3
    assert "its damaged .lease does not name" in note


RACE = """
lease = None
for number in sys.stdin:
    lease = Lease(folder / number.strip())
    try:
        lease.take()
        print("won", flush=True)
    except RunDirectoryError:
        print("refused", flush=True)
"""


def test_of_processes_that_start_together_one_wins(start, tmp_path):
    processes = [start(RACE) for _ in range(4)]
    for number in range(120):
        (tmp_path / str(number)).mkdir()
        if number % 2:
            write_lease(tmp_path / str(number), released=True)
        for process in processes:
            process.stdin.write(f"{number}\n")
            process.stdin.flush()
        assert sorted(process.stdout.readline() for process in processes) == ["refused\n"] * 3 + ["won\n"]


# ---- what the one who lost it can still do


TAKE_TURNS = """
path = folder / "metrics.jsonl"
end = time.monotonic() + 120
for restart in range(int(sys.argv[2]), 60, 2):
    lease = Lease(folder, "17", restart)
    time.sleep(0.1)  # time for the other to write
    try:
        lease.take()
        cut_metrics(path, 60, lease.writing)
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        while restart < 58 and time.monotonic() < end:
            with lease.writing():
                os.write(file, f'{{"event": "train", "step": {restart}}}\\n'.encode())
    except RunDirectoryError:
        pass
"""


def test_no_line_is_appended_after_another_took_over(start, tmp_path):
    for process in [start(TAKE_TURNS, first) for first in (0, 1)]:
        process.communicate(timeout=180)
        assert process.returncode == 0
    writers = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(set(writers)) > 20  # so many takings from a process that was writing
    assert writers == sorted(writers)


STOP_INSIDE = """
def stop():
    print("inside", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)

def stop_and_replace(*arguments, replace=os.replace):
    stop()
    replace(*arguments)

directory = RunDirectory(folder, "17", 0)
directory.hold()
directory.write_json("resume.json", {"by": 0})
metrics = open(folder / "metrics.jsonl", "ab", buffering=0)
metrics.write(b'{"event": "train", "step": 1}\\n')
try:
    if sys.argv[2] == "append":
        with directory.writing():
            stop()
            metrics.write(b'{"event": "train", "step": 2}\\n')
    else:
        os.replace = stop_and_replace
        if sys.argv[2] == "rename":
            directory.write_json("resume.json", {"by": "the one that lost"})
        else:
            directory._lease._update(beat=5)
except RunDirectoryError as refusal:
    print(refusal)
directory.write_exit(1, "by the one that lost")
try:
    directory.write_json("resume.json", {"by": "the one that lost"})
except RunDirectoryError as refusal:
    print(refusal)
directory.release()
"""


@pytest.mark.parametrize("action", ["rename", "append", "beat"])
def test_a_process_stopped_in_the_middle_of_a_change_damages_nothing_when_it_wakes(start, tmp_path, action):
    process = start(STOP_INSIDE, action)
    assert process.stdout.readline() == "inside\n"
    successor = RunDirectory(tmp_path, "17", 1)
    [taken] = successor.hold()
    assert "taken over from an earlier start of this job" in taken
    cut_metrics(tmp_path / "metrics.jsonl", 1, successor.writing)
    before = contents(tmp_path)
    process.send_signal(signal.SIGCONT)
    said, _ = process.communicate(timeout=30)
    assert said.splitlines()[-1].endswith(
        f"taken over by process {os.getpid()} on {socket.gethostname()} (job 17, restart 1) since "
        f"{read_lease(tmp_path)['since']}, generation 2; this process held generation 1: nothing was written"
    )
    assert contents(tmp_path) == before
    successor.write_exit(0, "done")
    assert json.loads((tmp_path / "exit.json").read_text())["status"] == 0
    successor.release()


def test_a_lease_that_was_meddled_with_stops_its_holder(lease, tmp_path):
    one = lease()
    one.take()
    (tmp_path / FILE_NAME).write_bytes(b"?")
    with pytest.raises(RunDirectoryError, match=r"its \.lease is damaged.*nothing was written"), one.writing():
        pass
    (tmp_path / FILE_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"\.lease is gone"), one.writing():
        pass


# ---- how it lives


def wait_for_beat(folder, beat):
    deadline = time.monotonic() + 30
    while read_lease(folder)["beat"] < beat:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_it_beats_also_after_the_file_system_was_away(lease, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    one = Lease(folder, seconds=0.3)
    one.take()
    wait_for_beat(folder, 2)
    folder.rename(tmp_path / "away")
    folder.write_text("what is under the mount point")
    with pytest.raises(NotADirectoryError), one.writing():
        pass
    time.sleep(0.2)
    folder.unlink()
    (tmp_path / "away").rename(folder)
    wait_for_beat(folder, read_lease(folder)["beat"] + 2)
    with one.writing():
        pass
    one.release()
    assert read_lease(folder)["released"]
    assert sorted(path.name for path in folder.iterdir()) == [".lease"]


def test_the_beat_of_one_who_lost_it_is_not_written(lease, tmp_path):
    lease(job="17", seconds=0.1).take()
    lease(job="17", restart=1).take()
    before = contents(tmp_path)
    time.sleep(0.3)
    assert contents(tmp_path) == before


@pytest.mark.skipif(not Path("/bin/ps").exists(), reason="no ps")
def test_where_there_is_no_proc_the_system_is_asked_by_ps(start, lease, monkeypatch, tmp_path):
    process = start("print('up', flush=True); sys.stdin.read()")
    process.stdout.readline()
    monkeypatch.setattr(lease_module, "PROC", tmp_path / "nothing")
    assert host_identity() == (socket.gethostname(), "", "")
    first = process_start(process.pid)
    assert first
    assert first == process_start(process.pid)
    assert process_start(1) not in (None, "", first)
    one = lease()
    one.take()
    with pytest.raises(RunDirectoryError, match="in use by"):
        lease().take()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert process_start(process.pid) is None
    process.wait()
    assert process_start(process.pid) is None


# ---- the run directory, and launch scripts


def test_a_run_directory_that_was_refused_is_not_touched_when_the_program_ends(lease, tmp_path):
    one = lease()
    one.take()
    (tmp_path / "exit.json").write_text("another's")
    before = contents(tmp_path)
    refused = RunDirectory(tmp_path)
    with pytest.raises(RunDirectoryError, match="in use by"):
        refused.hold()
    refused.write_exit(2, "in use")
    early = RunDirectory(tmp_path)
    early.write_exit(2, "before it came to the run directory")
    assert contents(tmp_path) == before
    one.release()
    refused.write_exit(2, "in use")
    assert (tmp_path / "exit.json").read_text() == "another's"
    early = RunDirectory(tmp_path)
    early.write_exit(2, "before it came to the run directory")
    early.release()
    assert json.loads((tmp_path / "exit.json").read_text())["status"] == 2
    assert read_lease(tmp_path)["released"]


def test_holding_removes_an_earlier_exit_and_what_was_not_finished(tmp_path):
    (tmp_path / "exit.json").write_text("{}")
    (tmp_path / ".writing-config.yaml-1").write_text("run:")
    directory = RunDirectory(tmp_path)
    assert directory.hold() == []
    directory.release()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lease"]


def test_launch_scripts_can_ask(lease, tmp_path):
    def ask(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "topoflow.run_dir", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
        )

    assert ask(tmp_path / "not there").returncode == 0
    write_lease(tmp_path, job="17", host="n2", seconds=0.2)
    before = contents(tmp_path)
    assert (ask(tmp_path, "17", "1").returncode, ask(tmp_path, "", "").returncode) == (0, 0)
    write_lease(tmp_path, job="17", restart=1)
    refused = ask(tmp_path, "17", "")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "in use by a later start of this job" in refused.stderr
    assert len(contents(tmp_path)) == len(before)
    for arguments in (("17", "abc"), ("17", "-1"), ("17", "1", "more")):
        refused = ask(tmp_path, *arguments)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert "expected" in refused.stderr
    assert ask().returncode == 2
