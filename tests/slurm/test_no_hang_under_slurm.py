"""A rank is lost or stalls in a SLURM step: the others end and name it."""

import json
import re
import sys
import time
from pathlib import Path

import pytest

RANK_FAILURES = Path(__file__).parents[1] / "program" / "rank_failures.py"
LIMIT = 5
BUSY = 10.0
"""Extra seconds allowed on a busy machine."""


def run_failing(cluster, failure):
    """Run two tasks on two nodes, one of which fails; return the finished process, the seconds, and exit.json."""
    limits = [f"distributed.timeout_seconds={LIMIT}", f"run.dir={cluster.folder / 'run'}"]
    step = ["srun", "-N2", "-n2", "--kill-on-bad-exit=1"]
    done = cluster.run(*step, sys.executable, str(RANK_FAILURES), failure, str(cluster.config), *limits)
    ended = time.time()
    [failed_at] = re.findall(r"fails at ([\d.]+)", done.stderr)
    return done, ended - float(failed_at), json.loads((cluster.folder / "run" / "exit.json").read_text())


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ("killed:reduced:1", "lost while rank 0 was in step 3 (forward and backward)"),
        ("raises:step:1", "step 3 (loading data): ZeroDivisionError: an injected failure"),
    ],
)
def test_a_task_that_is_lost_or_fails_is_named(cluster, failure, words):
    done, seconds, record = run_failing(cluster, failure)
    assert done.returncode != 0
    assert re.search(rf"rank 1 on n\d(, |: ){re.escape(words)}", done.stderr), done.stderr
    assert record["status"] == 5
    assert words in record["reason"]
    assert seconds < 5 + BUSY


def test_a_task_that_stalls_is_named_and_all_end(cluster):
    done, seconds, record = run_failing(cluster, "sleeps:step:1")
    assert done.returncode != 0
    assert "step 3 (forward and backward): rank 1 on n" in done.stderr
    assert f"did not arrive within {LIMIT} s" in record["reason"]
    assert LIMIT - 0.5 < seconds < LIMIT + 2 + BUSY
