"""Which rank opens which files in a resume: counted in each process, and by the kernel for all of them."""

import ctypes
import ctypes.util
import json
import os
import struct
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.support.phases import WHOLE, record_phases
from tests.support.prepared import prepare_world
from topoflow.data import assembly

pytestmark = pytest.mark.slow

IN_CLOSE_NOWRITE, IN_OPEN = 0x10, 0x20
OF_THREE = ("data.threads=0", "train.global_batch_size=12")


@contextmanager
def opens_of(file: Path):
    """Return a function that returns how often any process has opened `file` since then (inotify, Linux).

    The kernel merges two equal consecutive unread events, so the close events in between are requested too.
    """
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    watch = libc.inotify_add_watch(descriptor, os.fsencode(file), IN_OPEN | IN_CLOSE_NOWRITE)
    assert watch >= 0, os.strerror(ctypes.get_errno())
    count = 0

    def opens():
        nonlocal count
        try:
            while events := os.read(descriptor, 2**16):
                # events of a watched file have no name
                count += sum(mask == IN_OPEN for _, mask, _, _ in struct.iter_unpack("iIII", events))
        except BlockingIOError:
            return count

    try:
        yield opens
    finally:
        os.close(descriptor)


@pytest.fixture
def saved_run(forked, program):
    """A run of three ranks that saved step 2."""
    ending = forked.run(program.command("train.max_steps=2", *OF_THREE)[2:], 3)
    assert ending.done, ending.output
    return program.folder / "run" / "checkpoints" / "step-00000002"


def test_one_rank_opens_checkpoint_and_metadata_once(forked, program, world, saved_run, tmp_path):
    with opens_of(saved_run / "state.pt") as of_state, opens_of(world / "days_2018.json") as of_metadata:
        arguments = program.command("train.max_steps=4", *OF_THREE)[2:]
        ending = forked.run(arguments, 3, prepare=partial(record_phases, tmp_path))
        in_all = of_state(), of_metadata()
    assert ending.done, ending.output
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text())[-1] for rank in range(3)]
    assert all(rank["phase"] == WHOLE for rank in ranks)
    # the restored checkpoint, and the best one, which is verified before the first step
    assert [rank["opens"].get("checkpoint", 0) for rank in ranks] == [2, 0, 0]
    assert [rank["opens"].get("metadata", 0) for rank in ranks] == [2, 0, 0]
    assert in_all == (1, 1)  # no file was opened by a library without Python noticing
    assert [rank["opens"]["fields"] for rank in ranks] == [1, 1, 1]  # each reads its own samples


def see_another_copy(data: Path) -> None:
    """Make rank 1 the first of another node, where the same path leads to another copy of the data."""
    if os.environ["RANK"] == "1":
        os.environ["LOCAL_RANK"] = "0"
        look = assembly.index_prepared
        assembly.index_prepared = lambda path: look(str(data))


def test_a_node_that_sees_other_data_is_refused(forked, program, tmp_path):
    prepare_world(tmp_path / "data", days=10, seed=1)
    ending = forked.run(program.command()[2:], 2, prepare=partial(see_another_copy, tmp_path / "data"))
    assert ending.statuses == [5, 5], ending.output
    assert "ranks disagree with the data open" in ending.output
    assert "on rank(s) 1" in ending.output


def see_nothing() -> None:
    """Make rank 1 the first of another node, which does not see the file system."""
    if os.environ["RANK"] == "1":
        os.environ["LOCAL_RANK"] = "0"
        look = assembly.index_prepared
        assembly.index_prepared = lambda path: look(f"{path}-elsewhere")


def test_a_node_that_does_not_see_the_data_is_named(forked, program, world):
    ending = forked.run(program.command(*OF_THREE)[2:], 2, prepare=see_nothing)
    assert set(ending.statuses) == {2}, ending.output
    assert f"rank 1, data: data.path: {world}-elsewhere does not exist" in ending.output


def test_a_refusal_by_rank_0_is_reported_once_and_unchanged(forked, program):
    ending = forked.run(program.command("data.path=nowhere")[2:], 2)
    assert ending.statuses == [2, 2], ending.output
    assert ending.output.count("nowhere") == 1
    assert "data.path: nowhere does not exist" in ending.output
    assert "rank 0" not in ending.output
