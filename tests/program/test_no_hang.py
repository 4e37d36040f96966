"""If one rank fails in any way and any phase, all ranks end soon and the log names it."""

import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rank_failures

pytestmark = pytest.mark.slow

LIMIT = 4
BUSY = 6.0
"""Extra seconds allowed on a busy machine."""
HOST = socket.gethostname()


def run_rank(words, output, launched):
    os.environ.update(launched)
    with open(output, "w") as stream:
        os.dup2(stream.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.exit(rank_failures.main(words))


@pytest.fixture
def run_failing(program, store_port):
    """A function that runs three forked ranks, one of which fails; returns statuses, seconds and rank 0's output."""

    def start(failure, *overrides):
        limits = [f"distributed.timeout_seconds={LIMIT}", f"distributed.setup_timeout_seconds={2 * LIMIT}"]
        small = ["train.global_batch_size=24", "train.max_steps=12", "data.threads=0", "train.validate_every_steps=3"]
        words = [failure, str(program.config), f"run.dir={program.folder / 'run'}", *limits, *small, *overrides]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store_port), "WORLD_SIZE": "3"}
        common["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        processes = []
        for rank in range(3):
            mine = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "a test"}
            target = (words, program.folder / f"output-{rank}", mine)
            processes.append(multiprocessing.get_context("fork").Process(target=run_rank, args=target))
            processes[-1].start()
        for process in processes:
            process.join(120)
        ended, statuses = time.time(), [process.exitcode for process in processes]
        output = [(program.folder / f"output-{rank}").read_text() for rank in range(3)]
        [failed_at] = re.findall(r"fails at ([\d.]+)", "".join(output)) or [ended]
        return statuses, ended - float(failed_at), output[0]

    return start


@pytest.mark.parametrize(
    ("failure", "statuses", "words"),
    [
        ("raises:data:2", [5, 5, 1], f"rank 2 on {HOST}, set-up (samples): ZeroDivisionError: an injected failure"),
        ("killed:reduced:1", [5, -9, 5], f"rank 1 on {HOST}: lost while rank 0 was in step 3 (forward and backward)"),
        ("exits:validation:2", [5, 5, 0], f"rank 2 on {HOST}: lost while rank 0 was in validation after step 3"),
        ("raises:save:0", [1, 5, 5], "an injected failure"),
    ],
)
def test_a_rank_that_fails_ends_all_and_is_named(run_failing, program, failure, statuses, words):
    ended, seconds, output = run_failing(failure)
    assert ended == statuses, output
    assert seconds < 5 + BUSY
    assert words in output
    record = program.exit_record()
    assert record["status"] == statuses[0]
    assert words in record["reason"]


@pytest.mark.parametrize(
    ("failure", "limit", "words"),
    [
        ("sleeps:data:1", 2 * LIMIT, "rank 1 on"),
        ("sleeps:step:2", LIMIT, "step 3 (forward and backward): rank 2 on"),
        ("sleeps:validation:1", LIMIT, "validation after step 3: rank 1 on"),
        ("sleeps:save:0", LIMIT, "save after step 12: rank 0 on"),
    ],
)
def test_a_rank_that_stalls_ends_all_within_the_limit_and_is_named(run_failing, program, failure, limit, words):
    ended, seconds, output = run_failing(failure, "checkpoint.every_steps=12", "checkpoint.keep_best=false")
    assert ended == [5, 5, 5], output
    assert limit - 0.5 < seconds < limit + 2 + BUSY
    assert words in output
    assert f"did not arrive within {limit} s" in output
    assert program.exit_record()["status"] == 5


def test_a_rank_that_stalls_in_a_resume_is_named(run_failing, program):
    done = program.train("train.max_steps=1", "train.global_batch_size=24")
    assert done.returncode == 0, done.stderr
    ended, seconds, output = run_failing("sleeps:resume:1")
    assert ended == [5, 5, 5], output
    assert seconds < 2 * LIMIT + 2 + BUSY
    assert "resume (" in output
    assert "rank 1 on" in output


def test_ranks_with_different_configs_are_refused_with_a_table_of_the_values_per_rank(run_failing, program):
    ended, _, output = run_failing("other_config::1")
    assert ended == [5, 5, 5], output
    table = [line for line in output.splitlines() if "rank" in line]
    assert "ranks disagree at the start" in table[0]
    assert table[1:] == [f"    0.001 on rank(s) 0, 2 ({HOST})", f"    0.5 on rank(s) 1 ({HOST})"]
    assert "  optim.learning_rate\n" in output
    assert not (program.folder / "run" / "metrics.jsonl").exists()


# here the launcher ends the remaining ranks
def test_under_torchrun_a_lost_rank_is_named_and_all_end(program):
    script = Path(__file__).with_name("rank_failures.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    command += ["killed:reduced:1", str(program.config), f"run.dir={program.folder / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=program.environment(), timeout=180)
    ended = time.time()
    [failed_at] = re.findall(r"fails at ([\d.]+)", done.stderr)
    assert done.returncode == 1
    assert ended - float(failed_at) < 1.4 + 5 + 3 * BUSY
    assert f"rank 1 on {HOST}: lost while rank 0 was in step 3 (forward and backward)" in done.stderr
    assert json.loads((program.folder / "run" / "exit.json").read_text())["status"] == 5


@pytest.mark.parametrize(
    ("failure", "words"),
    [("raises:step:1", "ZeroDivisionError: an injected failure"), ("killed:reduced:1", "Signal 9 (SIGKILL)")],
)
def test_torchruns_report_names_the_rank_that_failed_first(program, failure, words):
    script = Path(__file__).with_name("rank_failures.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    command += [failure, str(program.config), f"run.dir={program.folder / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=program.environment(), timeout=180)
    _, _, root_cause = done.stderr.partition("Root Cause")
    assert re.search(r"rank +: 1 \(local_rank: 1\)", root_cause), done.stderr
    assert words in root_cause


def test_torchrun_may_start_all_ranks_again(program):
    script = Path(__file__).with_name("rank_failures.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command += [str(script), "killed:reduced:1", str(program.config), f"run.dir={program.folder / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=program.environment(), timeout=180)
    assert done.returncode == 0, done.stderr
    assert f"rank 1 on {HOST}: lost while rank 0 was in step 3" in done.stderr
    assert program.exit_record()["status"] == 0
