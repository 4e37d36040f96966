"""The loader of batches: order, what happens ahead, refusals, and what an early end leaves behind."""

import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from topoflow.data.loader import BatchLoader
from topoflow.errors import DataError

ROOT = Path(__file__).parents[2]


LAYOUT = {"mask": (torch.bool, (3, 1)), "x": (torch.float32, (5, 7)), "index": (torch.int64, ())}


class Samples:
    """Sample i is full of i; `filled` lists (indices, thread) in the order in which batches were begun."""

    def __init__(self):
        self.layout = LAYOUT
        self.filled = []

    def fill(self, indices, batch):
        self.filled.append((list(indices), threading.current_thread()))
        assert batch["index"].shape == (len(indices),)
        for row, i in enumerate(indices):
            batch["mask"][row] = i % 2
            batch["x"][row] = batch["index"][row] = i


class LateFirst(Samples):
    """The first batches take longest, so that later ones are ready before them."""

    def fill(self, indices, batch):
        time.sleep(max(0.0, 0.02 - 0.005 * indices[0]))
        super().fill(indices, batch)


class Refusing(Samples):
    """Refuses sample 3."""

    def fill(self, indices, batch):
        if 3 in indices:
            raise DataError("data.path: sample 3 is gone")
        super().fill(indices, batch)


class Held(Samples):
    """Batches other than the first one wait until they are released."""

    def __init__(self):
        super().__init__()
        self.released = threading.Event()

    def fill(self, indices, batch):
        super().fill(indices, batch)
        if 0 not in indices:
            assert self.released.wait(30)


def is_of(batch, indices):
    assert batch.keys() == LAYOUT.keys()
    assert batch["index"].tolist() == indices
    assert torch.equal(batch["x"], torch.tensor(indices, dtype=torch.float32).view(-1, 1, 1).expand(-1, 5, 7))
    assert torch.equal(batch["mask"], (torch.tensor(indices) % 2).bool().view(-1, 1, 1).expand(-1, 3, 1))
    return True


def becomes(condition):
    """Whether a condition comes true within 10 s."""
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


@pytest.mark.parametrize("threads", [0, 1, 2, 3])
def test_batches_of_any_size_come_in_order_and_stay(threads):
    wanted = [list(range(i, i + 1 + i % 4)) for i in range(40)]
    kept = list(BatchLoader(LateFirst(), wanted, threads))
    assert all(is_of(batch, indices) for batch, indices in zip(kept, wanted, strict=True))
    kept[0]["x"].zero_()
    assert is_of(kept[1], wanted[1])


@pytest.mark.parametrize("threads", [0, 2])
def test_tensors_have_the_types_of_the_layout(threads):
    [batch] = BatchLoader(Samples(), [[4, 2]], threads)
    assert is_of(batch, [4, 2])
    for name, (dtype, _) in LAYOUT.items():
        assert batch[name].dtype == dtype
        assert batch[name].is_contiguous()


def test_without_threads_a_batch_is_loaded_when_it_is_requested():
    samples = Samples()
    for number, _ in enumerate(BatchLoader(samples, [[i] for i in range(4)], threads=0)):
        assert len(samples.filled) == number + 1
    assert {thread for _, thread in samples.filled} == {threading.current_thread()}


@pytest.mark.parametrize(("threads", "ahead", "most"), [(1, None, 2), (2, None, 3), (2, 6, 6)])
def test_so_many_batches_are_loaded_ahead_and_no_more(threads, ahead, most):
    samples, asked = Samples(), []
    wanted = (asked.append(i) or [i] for i in range(100))
    for number, batch in enumerate(BatchLoader(samples, wanted, threads, ahead)):
        expected = min(number + 1 + most, 100)
        assert becomes(lambda expected=expected: len(samples.filled) == expected)
        assert len(asked) == expected
        assert is_of(batch, [number])
    used = {thread for _, thread in samples.filled}
    assert threading.current_thread() not in used
    assert len(used) <= threads


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_refusal_is_raised_as_it_is_after_the_batches_before_it(threads):
    batches, seen = iter(BatchLoader(Refusing(), [[i] for i in range(24)], threads)), []
    with pytest.raises(DataError) as refusal:
        seen.extend(batch["index"].item() for batch in batches)
    assert seen == [0, 1, 2]
    assert str(refusal.value) == "data.path: sample 3 is gone"


@pytest.mark.parametrize("samples", [Samples(), Refusing()])
def test_no_thread_is_left_at_the_end_or_after_a_refusal(samples):
    before = set(threading.enumerate())
    gc.disable()  # what a cycle of references holds would stay
    try:
        try:
            list(BatchLoader(samples, [[i] for i in range(8)], threads=2))
        except DataError:
            assert isinstance(samples, Refusing)
        assert becomes(lambda: set(threading.enumerate()) <= before)
    finally:
        gc.enable()


@pytest.mark.parametrize("end", ["break", "raise", "drop"])
def test_an_early_end_waits_for_nothing_and_begins_no_other_batch(end):
    before, samples = set(threading.enumerate()), Held()
    batches = iter(BatchLoader(samples, [[i] for i in range(100)], threads=2, ahead=10))
    try:
        for _ in batches:
            assert becomes(lambda: len(samples.filled) == 3)  # the first, and one in each thread
            if end == "raise":
                raise KeyboardInterrupt
            break
    except KeyboardInterrupt:
        pass
    del batches
    samples.released.set()
    assert becomes(lambda: set(threading.enumerate()) <= before)
    assert len(samples.filled) == 3


def test_two_iterations_of_one_loader_do_not_meet():
    wanted = [[i] for i in range(12)]
    loader = BatchLoader(Samples(), wanted, threads=1)
    for one, other, indices in zip(loader, loader, wanted, strict=True):
        assert is_of(one, indices)
        assert is_of(other, indices)


def run_python(code):
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60)


def test_a_process_ends_though_many_batches_are_still_to_come():
    code = """
import itertools, time, torch
from topoflow.data.loader import BatchLoader

class Slow:
    layout = {"x": (torch.float32, ())}
    def fill(self, indices, batch):
        time.sleep(0.1)

batches = iter(BatchLoader(Slow(), ([i] for i in itertools.count()), threads=2))
next(batches)
began = time.monotonic()
import atexit
atexit.register(lambda: print(time.monotonic() - began < 5))
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_loader_threads_start_no_threads_of_torch(dtype, tmp_path):
    """They would take the processors of the training step."""
    code = f"""
import dataclasses, os, threading, time
from pathlib import Path
import numpy as np, torch
from topoflow.config import DataConfig
from topoflow.data.assembly import open_forecast_data
from topoflow.data.loader import BatchLoader
from topoflow.tools.demo.world import make_demo_data
from topoflow.tools.prepare.command import load_recipe, prepare

def threads_of_torch():
    return len(os.listdir("/proc/self/task")) - threading.active_count()

folder = Path({str(tmp_path)!r})
make_demo_data(folder / "raw", days=2, grid=(96, 128), seed=0, progress=False)
recipe = dataclasses.replace(load_recipe([str(folder / "raw")]), dtype={dtype!r})
prepare(recipe, folder / "data", progress=False)
config = DataConfig(path=str(folder / "data"), train=(("2018-10-01", "2018-10-02"),), lead_times_hours=(6,))
data = open_forecast_data(config, True, True)
dataset = data.dataset("train", data.build_normalization())
torch.set_num_threads(2)
before = threads_of_torch()
for _ in BatchLoader(dataset, [[i, i + 1] for i in range(8)], threads=2):
    print(threads_of_torch() - before)
time.sleep(0.5)  # the system ends the loader's threads a little later than Python
torch.nan_to_num_(torch.ones(2**20))
print(threads_of_torch() - before)
"""
    done = run_python(code)
    assert done.stdout.split() == ["0"] * 8 + ["1"], done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("threads", [0, 2])
def test_a_gpu_takes_its_batches_from_pinned_memory(threads):
    """Copies that the GPU makes later find the batch unchanged, though many others are loaded meanwhile."""
    torch.cuda.init()
    wanted, copies = [[2 * i, 2 * i + 1] for i in range(50)], []
    torch.cuda._sleep(10**9)  # the copies wait for it
    for batch in BatchLoader(Samples(), wanted, threads):
        assert all(tensor.is_pinned() for tensor in batch.values())
        copies.append({name: tensor.to("cuda", non_blocking=True) for name, tensor in batch.items()})
    for copy, indices in zip(copies, wanted, strict=True):
        assert is_of({name: tensor.cpu() for name, tensor in copy.items()}, indices)
