"""A rank that is lost or stalls in a SLURM step: the others end, and say whose fault it was."""

import json
import re
import sys
import time
from pathlib import Path

import pytest

MISFORTUNES = Path(__file__).parents[1] / "program" / "misfortunes.py"
LIMIT = 5
BUSY = 10.0
"""What a machine that others use as well may take on top, in seconds."""


def meet(cluster, misfortune):
    """Two tasks on two nodes, one of which meets with a misfortune: what ended, seconds it took, and exit.json."""
    limits = [f"distributed.timeout_seconds={LIMIT}", f"run.dir={cluster.folder / 'run'}"]
    step = ["srun", "-N2", "-n2", "--kill-on-bad-exit=1"]
    done = cluster.run(*step, sys.executable, str(MISFORTUNES), misfortune, str(cluster.config), *limits)
    ended = time.time()
    [befell] = re.findall(r"it befalls at ([\d.]+)", done.stderr)
    return done, ended - float(befell), json.loads((cluster.folder / "run" / "exit.json").read_text())


@pytest.mark.parametrize(
    ("misfortune", "words"),
    [
        ("killed:reduced:1", "lost while rank 0 was in step 3 (forward and backward)"),
        ("raises:step:1", "step 3 (loading data): ZeroDivisionError: a misfortune"),
    ],
)
def test_a_task_that_is_lost_or_fails_is_named(cluster, misfortune, words):
    done, seconds, record = meet(cluster, misfortune)
    assert done.returncode != 0
    assert re.search(rf"rank 1 on n\d(, |: ){re.escape(words)}", done.stderr), done.stderr
    assert record["status"] == 5
    assert words in record["reason"]
    assert seconds < 5 + BUSY


def test_a_task_that_stalls_is_named_and_all_end(cluster):
    done, seconds, record = meet(cluster, "sleeps:step:1")
    assert done.returncode != 0
    assert "step 3 (forward and backward): rank 1 on n" in done.stderr
    assert f"did not arrive within {LIMIT} s" in record["reason"]
    assert LIMIT - 0.5 < seconds < LIMIT + 2 + BUSY
