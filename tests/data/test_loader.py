"""The loader of batches, its workers, and what ends them."""

import gc
import multiprocessing
import os
import queue
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import get_worker_info

from topoflow.data import loader
from topoflow.data.batch_memory import SharedSlots
from topoflow.data.loader import BatchLoader
from topoflow.data.worker_process import WorkerContext
from topoflow.errors import DataError


class WorkerProbe:
    """A batch says (worker's pid, its threads), after the signals that were asked for."""

    def __init__(self, send=()):
        self.layout = {"who": (torch.int64, (2,))}
        self.source = self
        self.send = send

        self.closed = False

    def close(self):
        self.closed = True

    def fill(self, indices, batch):
        assert get_worker_info() is not None
        assert self.closed  # by the parent, before the fork
        for name in self.send:
            os.kill(os.getpid(), getattr(signal, name))
        batch["who"][:] = torch.tensor([os.getpid(), torch.get_num_threads()])


def test_workers_use_one_thread_and_outlive_signals_that_are_not_their_parents():
    threads = torch.get_num_threads()
    probe = WorkerProbe(send=("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"))
    rows = torch.cat([batch["who"] for batch in BatchLoader(probe, [[0], [1], [2], [3]], 1, workers=2)])
    assert len(set(rows[:, 0].tolist())) == 2
    assert rows[:, 1].tolist() == [1, 1, 1, 1]
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="not on Linux")
def test_workers_do_not_interrupt_who_computes():
    class Policy(WorkerProbe):
        def fill(self, indices, batch):
            batch["who"][:] = os.sched_getscheduler(0)

    [batch] = BatchLoader(Policy(), [[0]], 1, workers=1)
    assert batch["who"].tolist() == [[os.SCHED_BATCH] * 2]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_queue_gives_what_was_put_or_says_that_it_is_empty():
    here = WorkerContext().Queue()
    with pytest.raises(queue.Empty):
        here.get(timeout=0.01)
    for message in ((0, [1, 2]), None):
        here.put(message)  # written when this returns
    assert not here.empty()
    assert [here.get(timeout=1), here.get()] == [(0, [1, 2]), None]


def ends_within_seconds(pid, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if all(child.pid != pid for child in multiprocessing.active_children()):
            return True
        time.sleep(0.01)
    return False


def test_workers_end_when_the_parent_says_so():
    batches = iter(BatchLoader(WorkerProbe(), [[0]] * 100, 1, workers=1))
    pid = int(next(batches)["who"][0, 0])
    os.kill(pid, signal.SIGTERM)
    assert ends_within_seconds(pid, 10)


def test_leaving_an_epoch_early_ends_the_workers():
    batches = iter(BatchLoader(WorkerProbe(), [[0]] * 100, 1, workers=1))
    pid = int(next(batches)["who"][0, 0])
    del batches
    assert ends_within_seconds(pid, 10)


def test_neither_thread_nor_worker_is_left():
    def alive():
        return {*threading.enumerate(), *multiprocessing.active_children()}

    before = alive()
    batches = iter(BatchLoader(WorkerProbe(), [[0]] * 100, 1, workers=1))
    next(batches)
    started = alive() - before
    [worker] = started  # and no thread: on CPU it would take the interpreter's lock from the loop
    assert isinstance(worker, multiprocessing.process.BaseProcess)
    del batches
    deadline = time.monotonic() + 10
    while started & alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not started & alive()


def test_no_worker_is_left_where_one_refused():
    gc.disable()  # what a cycle of references holds would stay
    try:
        with pytest.raises(DataError, match="gone"):
            list(BatchLoader(Refusing(), [[0]] * 24, 1, workers=1))
        deadline = time.monotonic() + 10
        while multiprocessing.active_children() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


def test_what_is_fetched_ahead_comes_in_order_and_one_at_a_time():
    taken, before = [], threading.active_count()
    source = (taken.append((i, threading.current_thread())) or i for i in range(4))
    seen = []
    for number in loader._fetch_ahead(source):
        deadline = time.monotonic() + 10
        while len(taken) < min(number + 2, 4) and time.monotonic() < deadline:
            time.sleep(0.001)
        seen.append((number, [i for i, _ in taken]))
    assert seen == [(0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2, 3]), (3, [0, 1, 2, 3])]
    assert threading.current_thread() not in {thread for _, thread in taken}
    assert threading.active_count() == before


def test_what_fails_ahead_is_raised_where_it_is_used():
    def source():
        yield 0
        raise DataError("gone")

    ahead = loader._fetch_ahead(source())
    assert next(ahead) == 0
    with pytest.raises(DataError, match="gone"):
        next(ahead)


class Refusing(WorkerProbe):
    def fill(self, indices, batch):
        raise DataError("gone")


class OfOddSizes(WorkerProbe):
    """Sample i is full of i."""

    def __init__(self):
        super().__init__()
        self.layout = {"mask": (torch.bool, (3, 1)), "x": (torch.float32, (5, 7)), "index": (torch.int64, ())}

    def fill(self, indices, batch):
        assert batch["index"].shape == (len(indices),)
        for row, i in enumerate(indices):
            batch["mask"][row] = i % 2
            batch["x"][row] = batch["index"][row] = i


def is_of(batch, indices):
    assert batch.keys() == OfOddSizes().layout.keys()
    assert batch["index"].tolist() == indices
    assert torch.equal(batch["x"], torch.tensor(indices, dtype=torch.float32).view(-1, 1, 1).expand(-1, 5, 7))
    assert torch.equal(batch["mask"], (torch.tensor(indices) % 2).bool().view(-1, 1, 1).expand(-1, 3, 1))
    return True


@pytest.mark.parametrize("workers", [0, 1])
def test_tensors_begin_where_torch_would_let_them(workers):
    [batch] = BatchLoader(OfOddSizes(), [[4, 2]], 3, workers)
    assert is_of(batch, [4, 2])
    for name, (dtype, _) in OfOddSizes().layout.items():
        assert batch[name].dtype == dtype
        assert batch[name].data_ptr() % 64 == 0
        assert batch[name].is_contiguous()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_of_any_size_come_in_order_and_stay(workers):
    wanted = [list(range(i, i + 1 + i % 4)) for i in range(40)]
    kept = list(BatchLoader(OfOddSizes(), wanted, 4, workers))
    assert all(is_of(batch, indices) for batch, indices in zip(kept, wanted, strict=True))
    kept[0]["x"].zero_()
    assert is_of(kept[1], wanted[1])


@pytest.mark.parametrize("workers", [1, 2])
def test_no_slot_is_filled_anew_before_its_batch_is_copied(workers, monkeypatch):
    copy = SharedSlots.copy

    def copy_late(*arguments):
        time.sleep(0.03)  # the workers have long filled all that they may
        return copy(*arguments)

    monkeypatch.setattr(SharedSlots, "copy", copy_late)
    wanted = [[i, i + 1] for i in range(20)]
    for batch, indices in zip(BatchLoader(OfOddSizes(), wanted, 2, workers), wanted, strict=True):
        assert is_of(batch, indices)


def test_two_that_iterate_over_one_loader_have_slots_of_their_own():
    wanted = [[i] for i in range(12)]
    loader = BatchLoader(OfOddSizes(), wanted, 1, workers=1)
    for one, other, indices in zip(loader, loader, wanted, strict=True):
        assert is_of(one, indices)
        assert is_of(other, indices)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_gpu_takes_its_batches_from_pinned_memory(workers):
    torch.cuda.init()
    for batch in BatchLoader(OfOddSizes(), [[1, 2], [3]], 2, workers):
        assert all(tensor.is_pinned() for tensor in batch.values())


def test_a_worker_whose_parent_is_killed_while_it_starts_ends(tmp_path, monkeypatch):
    noted = tmp_path / "pid"
    start = loader.start_worker

    def start_late(*arguments):
        noted.write_text(str(os.getpid()))
        time.sleep(0.5)
        start(*arguments)

    monkeypatch.setattr(loader, "start_worker", start_late)
    parent = os.fork()
    if parent == 0:
        batches = iter(BatchLoader(WorkerProbe(), [[0]] * 100, 1, workers=1))
        while not (noted.exists() and noted.read_text()):
            time.sleep(0.01)
        assert batches is not None
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(parent, 0)[1] == signal.SIGKILL
    worker = int(noted.read_text())
    assert ends_or_is_killed(worker)


class Stuck(WorkerProbe):
    """Its reads never return: they wait for a writer of a pipe, as one waits for a file system that is away."""

    def __init__(self, folder):
        super().__init__()
        self.pipe, self.noted = folder / "pipe", folder / "pid"
        os.mkfifo(self.pipe)

    def fill(self, indices, batch):
        self.noted.write_text(str(os.getpid()))
        self.pipe.read_bytes()


@pytest.mark.parametrize("end", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(5)])
def test_a_worker_stuck_in_a_read_ends_with_its_rank(tmp_path, end):
    stuck = Stuck(tmp_path)
    parent = os.fork()
    if parent == 0:
        batches = iter(BatchLoader(stuck, [[0]] * 100, 1, workers=1))
        while not (stuck.noted.exists() and stuck.noted.read_text()):
            time.sleep(0.01)
        assert batches is not None
        end()
    os.waitpid(parent, 0)
    worker = int(stuck.noted.read_text())
    assert ends_or_is_killed(worker)


def ends_or_is_killed(pid):
    """Return whether a process ends within 10 s; kill it if not."""
    deadline = time.monotonic() + 10
    while is_running(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.05)
    return True


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
