"""distributed.reduction=canonical: bit-identical on any number of ranks.

With two ranks and four micro-batches DDP adds along the same tree, (0 + 1) + (2 + 3). So canonical runs are compared
with torch's own run on two ranks, in losses, weights, moments, rates and progress.
"""

import shutil

import pytest

from tests.support.forked_runs import Attack
from tests.support.kill_points import Kill

pytestmark = pytest.mark.slow

CANONICAL = "distributed.reduction=canonical"


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_whole_runs_on_1_2_and_4_ranks(program, forked, assert_same_run, processes):
    ending = forked.run(program.command(CANONICAL)[2:], processes)
    assert ending.done, ending.output
    assert_same_run(2)


def test_killed_on_two_ranks_and_resumed_on_one_and_four(program, forked, assert_same_run):
    ending = forked.run(program.command(CANONICAL)[2:], 2, Attack(Kill("between two steps", 15), everyone=True))
    assert ending.note["step"] == 15, ending.output
    for processes in (1, 4):
        run = f"resumed{processes}"
        shutil.copytree(program.folder / "run", program.folder / run)
        ending = forked.run(program.command(CANONICAL, run=run)[2:], processes)
        assert ending.done, ending.output
        assert program.events(run, "resume")[-1]["step"] == 12
        assert_same_run(2, run)


def test_ddp_depends_on_the_number_of_ranks(undisturbed):
    assert undisturbed(1)[0] != undisturbed(2)[0]


def test_ranks_that_would_not_hold_whole_subtrees(program, forked):
    sizes = ("train.global_batch_size=24", "train.micro_batch_size=2")
    ending = forked.run(program.command(CANONICAL, *sizes)[2:], 3)
    assert ending.statuses == [2, 2, 2]
    assert ending.output.count("with 12 micro-batches a step") == 1
    assert "expected a world size of 1, 2, 4\n" in ending.output


def test_another_reduction_on_resume_is_refused(program):
    assert program.train("train.max_steps=2").returncode == 0
    done = program.train(CANONICAL, "train.max_steps=3")
    assert done.returncode == 3
    assert "distributed.reduction: 'ddp' -> 'canonical'" in done.stderr
