"""Runs killed at each place of benchmarks/kill_campaign.py and resumed are bit-identical to one that never stopped.

The runs that they are compared with are started as a user starts them, not forked.
"""

import signal

import pytest

from tests.support.forked_runs import Attack
from tests.support.kill_points import POINTS, Kill

pytestmark = pytest.mark.slow

# point, first step in which it counts, and a function on the stack of the killed process
IN_STEPS = [
    ("in the forward pass", 1, "trainer.py:train_step"),
    ("in the backward pass", 2, "_tensor.py:backward"),
    ("in the optimizer's step", 3, "adam.py:step"),
    ("between two steps", 5, "trainer.py:fit"),
    ("in a loader thread", 6, "loader.py:_fill"),
    ("in validation", 8, "trainer.py:validate"),
    ("after validation, before its save", 8, "trainer.py:_compare"),
    ("at the end of an epoch", 16, "trainer.py:fit"),
]
IN_SAVES_AND_RESUMES = [
    ("in the probe of a save", 1, "certificate.py:probe"),
    ("while the state is copied", 2, "saver.py:copy"),
    ("while state.pt is written", 2, "serialization.py:save"),
    ("between state.pt and the manifest", 3, "files.py:flush"),
    ("between manifest and rename", 4, "file.py:write_checkpoint"),
    ("between rename and pointers", 5, "file.py:write_checkpoint"),
    ("in the move of a pointer", 6, "directory.py:save"),
    ("after the file was read", 0, "file.py:read_checkpoint"),
    ("in the restore", 0, "resume.py:restore"),
    ("in the proof of the resume", 0, "certificate.py:probe"),
    ("between the pointers", 8, "directory.py:save"),
    ("while an old checkpoint is deleted", 9, "directory.py:prune"),
    ("between two steps", 11, "trainer.py:fit"),
    ("while metrics.jsonl is cut", 0, "logs.py:cut_metrics"),
]


def kill_and_resume(forked, program, processes, kills, *overrides):
    """Train and kill the run at each of the kills in turn; then let it finish."""
    arguments = program.command(*overrides)[2:]
    for point, step, place, *who in kills:
        rank, everyone = who or (0, False)
        ending = forked.run(arguments, processes, Attack(Kill(point, step), rank=rank, everyone=everyone))
        assert ending.note is not None, f"not killed {point}: {ending.statuses}\n{ending.output}"
        assert ending.note["point"] == point
        assert ending.note["step"] >= step
        assert place in ending.note["stack"]
        assert 0 not in ending.statuses
        assert ending.statuses[rank] == -signal.SIGKILL
    ending = forked.run(arguments, processes)
    assert ending.done, ending.output
    assert "resume from" in ending.output


def test_each_point_is_tried():
    assert {point for point, *_ in IN_STEPS + IN_SAVES_AND_RESUMES} == set(POINTS)


def test_killed_in_steps_and_validation(forked, program, assert_same_run):
    kill_and_resume(forked, program, 1, IN_STEPS, "checkpoint.every_steps=4")
    assert_same_run(1)


def test_killed_in_saves_and_resumes(forked, program, assert_same_run):
    kill_and_resume(forked, program, 1, IN_SAVES_AND_RESUMES, "checkpoint.every_steps=1", "checkpoint.keep_last=1")
    assert_same_run(1)


def test_one_of_two_ranks_or_both_killed(forked, program, assert_same_run):
    kills = [
        ("in the optimizer's step", 2, "adam.py:step", 0, True),
        ("in the backward pass", 5, "_tensor.py:backward", 1, False),
        ("in the restore", 0, "resume.py:restore", 1, False),
        ("between rename and pointers", 7, "file.py:write_checkpoint", 0, True),
    ]
    kill_and_resume(forked, program, 2, kills, "checkpoint.every_steps=2")
    assert_same_run(2)
