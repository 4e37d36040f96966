"""The loader of batches, its workers, and what ends them."""

import gc
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import get_worker_info

from topoflow.data import loader
from topoflow.data.loader import BatchLoader
from topoflow.errors import DataError


class WorkerProbe:
    """A batch says (worker's pid, its threads), after the signals that were asked for."""

    def __init__(self, send=()):
        self.source = self
        self.send = send

        self.closed = False

    def close(self):
        self.closed = True

    def batch(self, indices):
        assert get_worker_info() is not None
        assert self.closed  # by the parent, before the fork
        for name in self.send:
            os.kill(os.getpid(), getattr(signal, name))
        return {"who": torch.tensor([os.getpid(), torch.get_num_threads()])}


def test_workers_use_one_thread_and_outlive_signals_that_are_not_their_parents():
    threads = torch.get_num_threads()
    probe = WorkerProbe(send=("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"))
    rows = torch.stack([batch["who"] for batch in BatchLoader(probe, [[0], [1], [2], [3]], workers=2)])
    assert len(set(rows[:, 0].tolist())) == 2
    assert rows[:, 1].tolist() == [1, 1, 1, 1]
    assert torch.get_num_threads() == threads


def ends_within_seconds(pid, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if all(child.pid != pid for child in multiprocessing.active_children()):
            return True
        time.sleep(0.01)
    return False


def test_workers_end_when_the_parent_says_so():
    batches = iter(BatchLoader(WorkerProbe(), [[0]] * 100, workers=1))
    pid = int(next(batches)["who"][0])
    os.kill(pid, signal.SIGTERM)
    assert ends_within_seconds(pid, 10)


def test_leaving_an_epoch_early_ends_the_workers():
    batches = iter(BatchLoader(WorkerProbe(), [[0]] * 100, workers=1))
    pid = int(next(batches)["who"][0])
    del batches
    assert ends_within_seconds(pid, 10)


def test_neither_thread_nor_worker_is_left():
    def alive():
        return {*threading.enumerate(), *multiprocessing.active_children()}

    before = alive()
    batches = iter(BatchLoader(WorkerProbe(), [[0]] * 100, workers=1))
    next(batches)
    started = alive() - before
    assert sum(isinstance(one, threading.Thread) for one in started) >= 1
    assert sum(isinstance(one, multiprocessing.process.BaseProcess) for one in started) == 1
    del batches
    deadline = time.monotonic() + 10
    while started & alive() and time.monotonic() < deadline:  # a thread of a queue ends by itself
        time.sleep(0.01)
    assert not started & alive()


def test_no_worker_is_left_where_one_refused():
    gc.disable()  # what a cycle of references holds would stay
    try:
        with pytest.raises(DataError, match="gone"):
            list(BatchLoader(Refusing(), [[0]] * 24, workers=1))
        deadline = time.monotonic() + 10
        while multiprocessing.active_children() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


class Refusing(WorkerProbe):
    def batch(self, indices):
        raise DataError("gone")


class OfOddSizes(WorkerProbe):
    def batch(self, indices):
        return {"mask": torch.ones(3, 1, dtype=torch.bool), "x": torch.ones(5, 7), "index": torch.tensor(indices)}


def test_tensors_from_workers_begin_where_torch_would_let_them():
    [batch] = BatchLoader(OfOddSizes(), [[4, 2]], workers=1)
    for name, expected in OfOddSizes().batch([4, 2]).items():
        assert batch[name].dtype == expected.dtype
        assert torch.equal(batch[name], expected)
        assert batch[name].data_ptr() % 64 == 0
        assert batch[name].is_contiguous()


def test_a_worker_whose_parent_is_killed_while_it_starts_ends(tmp_path, monkeypatch):
    noted = tmp_path / "pid"
    start = loader._start_worker

    def start_late(*arguments):
        noted.write_text(str(os.getpid()))
        time.sleep(0.5)
        start(*arguments)

    monkeypatch.setattr(loader, "_start_worker", start_late)
    parent = os.fork()
    if parent == 0:
        batches = iter(BatchLoader(WorkerProbe(), [[0]] * 100, workers=1))
        while not (noted.exists() and noted.read_text()):
            time.sleep(0.01)
        assert batches is not None
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(parent, 0)[1] == signal.SIGKILL
    worker = int(noted.read_text())
    deadline = time.monotonic() + 10
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    alive = is_running(worker)
    if alive:
        os.kill(worker, signal.SIGKILL)
    assert not alive


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
