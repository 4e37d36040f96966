"""Whatever befalls one rank of a run, in whatever phase: all end soon, and the log says whose fault it was."""

import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import misfortunes
import pytest

LIMIT = 4
BUSY = 6.0
"""What a machine that others use as well may take on top, in seconds."""
HOST = socket.gethostname()


def run_rank(words, said, launched):
    os.environ.update(launched)
    with open(said, "w") as stream:
        os.dup2(stream.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.exit(misfortunes.main(words))


@pytest.fixture
def meet(program, store_port):
    """Three forked ranks, one of which meets with a misfortune; returns statuses, seconds it took, what rank 0 said."""

    def start(misfortune, *overrides):
        limits = [f"distributed.timeout_seconds={LIMIT}", f"distributed.setup_timeout_seconds={2 * LIMIT}"]
        small = ["train.global_batch_size=24", "train.max_steps=12", "data.workers=0", "train.validate_every_steps=3"]
        words = [misfortune, str(program.config), f"run.dir={program.folder / 'run'}", *limits, *small, *overrides]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store_port), "WORLD_SIZE": "3"}
        common["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        processes = []
        for rank in range(3):
            mine = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "a test"}
            target = (words, program.folder / f"said-{rank}", mine)
            processes.append(multiprocessing.get_context("fork").Process(target=run_rank, args=target))
            processes[-1].start()
        for process in processes:
            process.join(120)
        ended, statuses = time.time(), [process.exitcode for process in processes]
        said = [(program.folder / f"said-{rank}").read_text() for rank in range(3)]
        [befell] = re.findall(r"it befalls at ([\d.]+)", "".join(said)) or [ended]
        return statuses, ended - float(befell), said[0]

    return start


@pytest.mark.parametrize(
    ("misfortune", "statuses", "words"),
    [
        ("raises:data:2", [5, 5, 1], f"rank 2 on {HOST}, set-up (model): ZeroDivisionError: a misfortune"),
        ("killed:reduced:1", [5, -9, 5], f"rank 1 on {HOST}: lost while rank 0 was in step 3 (forward and backward)"),
        ("exits:validation:2", [5, 5, 0], f"rank 2 on {HOST}: lost while rank 0 was in validation after step 3"),
        ("raises:save:0", [1, 5, 5], "a misfortune"),
    ],
)
def test_a_rank_that_fails_ends_all_and_is_named(meet, program, misfortune, statuses, words):
    ended, seconds, said = meet(misfortune)
    assert ended == statuses, said
    assert seconds < 5 + BUSY
    assert words in said
    record = program.exit_record()
    assert record["status"] == statuses[0]
    assert words in record["reason"]


@pytest.mark.parametrize(
    ("misfortune", "limit", "words"),
    [
        ("sleeps:data:1", 2 * LIMIT, "rank 1 on"),
        ("sleeps:step:2", LIMIT, "step 3 (forward and backward): rank 2 on"),
        ("sleeps:validation:1", LIMIT, "validation after step 3: rank 1 on"),
        ("sleeps:save:0", LIMIT, "save after step 12: rank 0 on"),
    ],
)
def test_a_rank_that_stalls_ends_all_within_the_limit_and_is_named(meet, program, misfortune, limit, words):
    ended, seconds, said = meet(misfortune, "checkpoint.every_steps=12", "checkpoint.keep_best=false")
    assert ended == [5, 5, 5], said
    assert limit - 0.5 < seconds < limit + 2 + BUSY
    assert words in said
    assert f"did not arrive within {limit} s" in said
    assert program.exit_record()["status"] == 5


def test_a_rank_that_stalls_in_a_resume_is_named(meet, program):
    done = program.train("train.max_steps=1", "train.global_batch_size=24")
    assert done.returncode == 0, done.stderr
    ended, seconds, said = meet("sleeps:resume:1")
    assert ended == [5, 5, 5], said
    assert seconds < 2 * LIMIT + 2 + BUSY
    assert "resume (" in said
    assert "rank 1 on" in said


def test_ranks_with_other_configs_are_refused_with_the_table_of_who_has_what(meet, program):
    ended, _, said = meet("other_config::1")
    assert ended == [5, 5, 5], said
    table = [line for line in said.splitlines() if "rank" in line]
    assert "ranks disagree at the start" in table[0]
    assert table[1:] == [f"    0.001 on rank(s) 0, 2 ({HOST})", f"    0.5 on rank(s) 1 ({HOST})"]
    assert "  optim.learning_rate\n" in said
    assert not (program.folder / "run" / "metrics.jsonl").exists()


# the launcher's own way of ending what is left
def test_under_torchrun_a_lost_rank_is_named_and_all_end(program):
    script = Path(__file__).with_name("misfortunes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    command += ["killed:reduced:1", str(program.config), f"run.dir={program.folder / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=program.environment(), timeout=180)
    ended = time.time()
    [befell] = re.findall(r"it befalls at ([\d.]+)", done.stderr)
    assert done.returncode == 1
    assert ended - float(befell) < 1.4 + 5 + 3 * BUSY
    assert f"rank 1 on {HOST}: lost while rank 0 was in step 3 (forward and backward)" in done.stderr
    assert json.loads((program.folder / "run" / "exit.json").read_text())["status"] == 5


@pytest.mark.parametrize(
    ("misfortune", "words"),
    [("raises:step:1", "ZeroDivisionError: a misfortune"), ("killed:reduced:1", "Signal 9 (SIGKILL)")],
)
def test_torchruns_report_names_the_rank_that_failed_first(program, misfortune, words):
    script = Path(__file__).with_name("misfortunes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    command += [misfortune, str(program.config), f"run.dir={program.folder / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=program.environment(), timeout=180)
    _, _, root_cause = done.stderr.partition("Root Cause")
    assert re.search(r"rank +: 1 \(local_rank: 1\)", root_cause), done.stderr
    assert words in root_cause


def test_torchrun_may_start_all_ranks_again(program):
    script = Path(__file__).with_name("misfortunes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command += [str(script), "killed:reduced:1", str(program.config), f"run.dir={program.folder / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=program.environment(), timeout=180)
    assert done.returncode == 0, done.stderr
    assert f"rank 1 on {HOST}: lost while rank 0 was in step 3" in done.stderr
    assert program.exit_record()["status"] == 0
