"""Saving during training: what is written, when the loop waits, and how failures are handled."""

import os
import signal
import subprocess
import sys
import threading
import traceback

import pytest
import torch

from topoflow.checkpoint.directory import CheckpointDirectory
from topoflow.checkpoint.file import FORMAT, read_checkpoint
from topoflow.checkpoint.saver import CheckpointSaver, HostBuffer
from topoflow.config import CheckpointConfig
from topoflow.errors import RunDirectoryError
from topoflow.launch import Launch
from topoflow.ranks import Context
from topoflow.run_dir import StopFlag

FULL = OSError(28, "No space left on device")
SECONDS = 30


class HeldDirectory(CheckpointDirectory):
    """Writes when it is allowed to; raises the next of `errors`, if not None, in place of a write."""

    def __init__(self, path, errors=()):
        super().__init__(path)
        self.errors = list(errors)
        self.started, self.go = threading.Event(), threading.Event()

    def save(self, state, is_best):
        self.started.set()
        assert self.go.wait(SECONDS)
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        return super().save(state, is_best)


class Run:
    """A live state of one tensor, and its saver. held: writes wait until `directory.go` is set."""

    def __init__(self, path, errors=(), held=False, **config):
        self.step, self.weight = 0, torch.zeros(1000)
        self.commits, self.captures = [], 0
        self.directory = HeldDirectory(path, errors)
        if not held:
            self.directory.go.set()
        self.saver = CheckpointSaver(
            Context(Launch("a test", "a test"), torch.device("cpu")),
            self.directory,
            CheckpointConfig(**config),
            self.capture,
            lambda step, folder: self.commits.append((step, folder, threading.current_thread())),
        )

    def capture(self):
        self.captures += 1
        return {
            "format": FORMAT,
            "model": {"w": self.weight},
            "optimizer": {"groups": [], "state": {}},
            "progress": {"step": self.step},
            "certificate": {},
        }

    def advance(self):
        self.step += 1
        self.weight.fill_(self.step)

    def save(self, is_best=False):
        self.advance()
        self.saver.save(self.step, is_best)

    def wait(self):
        """Wait for the end of the write; return whether it failed."""
        self.directory.go.set()
        self.saver._write.exception(SECONDS)
        return self.saver.poll()


@pytest.fixture
def start(tmp_path):
    runs = []

    def start(**options):
        runs.append(Run(tmp_path / "checkpoints", **options))
        return runs[-1]

    yield start
    for run in runs:
        run.directory.go.set()
        run.saver.close()


def test_training_continues_while_the_earlier_state_is_written(start):
    run = start(held=True)
    run.save()
    assert run.directory.started.wait(SECONDS)
    run.advance()  # in place, as an optimizer does
    assert not run.saver.poll()
    assert run.commits == []
    assert not run.wait()
    folder = run.directory.folder(1)
    assert run.commits == [(1, folder, threading.main_thread())]
    assert run.directory.pointer("last") == folder
    assert torch.equal(read_checkpoint(folder)["model"]["w"], torch.full((1000,), 1.0))


def test_memory_that_was_prepared_is_enough_for_the_first_copy(start, monkeypatch):
    """Memory for weights and two moments was prepared; the optimizer's step counts are additional."""
    run = start()
    run.saver.prepare(run.weight.nbytes)
    run.saver._reserved.result(SECONDS)
    monkeypatch.setattr("topoflow.checkpoint.saver.mmap.mmap", None)
    captured = run.capture()
    captured["optimizer"]["state"] = {"w": {"step": torch.tensor(1.0)}}
    run.saver._capture = lambda: captured
    run.save()
    assert not run.wait()


def test_one_write_is_in_flight(start):
    run = start(held=True)
    run.save()
    threading.Timer(0.2, run.directory.go.set).start()
    run.save()  # waits for the first
    assert [step for step, _, _ in run.commits] == [1]
    run.wait()
    assert [step for step, _, _ in run.commits] == [1, 2]
    assert run.directory.steps() == [1, 2]


def test_a_step_is_saved_once(start):
    run = start()
    run.save()
    run.saver.save(1, False)
    run.saver.require_saved(1, "the end of the run")
    assert (run.captures, len(run.commits)) == (1, 1)


def test_a_failed_write_stops_the_run(start):
    run = start(errors=[FULL])
    run.save()
    assert run.wait()
    with pytest.raises(
        RunDirectoryError, match="checkpoints: not written: No space left on device; no checkpoint exists"
    ) as end:
        run.saver.handle_failed_save()
    assert end.value.shared
    assert run.commits == []


def test_a_failed_write_is_reported_and_training_continues(start, caplog):
    run = start(errors=[FULL], on_error="continue")
    run.save()
    assert run.wait()
    run.saver.handle_failed_save()
    assert "No space left on device" in caplog.text
    assert "training continues (checkpoint.on_error=continue)" in caplog.text
    assert not run.saver.poll()
    run.save()
    assert not run.wait()
    run.saver.require_saved(2, "the end of the run")
    assert run.directory.steps() == [2]


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_later_save_that_works_clears_a_failure_that_was_not_acted_on(start, caplog, on_error):
    run = start(errors=[FULL], on_error=on_error)
    run.save()
    run.save()
    run.saver.require_saved(2, "the end of the run")
    assert "No space left on device; existing checkpoints: step 2; the later save of step 2 succeeded" in caplog.text


def test_the_end_retries_a_failed_step_once_and_then_refuses(start):
    run = start(errors=[FULL, None], on_error="continue")
    run.save(is_best=True)
    run.saver.require_saved(1, "the end of the run")
    assert run.directory.pointer("best") == run.directory.folder(1)
    run = start(errors=[FULL, FULL], on_error="continue")
    run.step = 1
    run.save()
    with pytest.raises(RunDirectoryError, match="the end of the run: the checkpoint of step 2 was not written") as end:
        run.saver.require_saved(2, "the end of the run")
    assert end.value.shared
    assert run.directory.steps() == [1]


def test_a_run_that_was_taken_over_stops_for_any_on_error(start):
    run = start(errors=[RunDirectoryError("run: taken over by process 7")], on_error="continue")
    run.save()
    run.save()
    run.wait()
    with pytest.raises(RunDirectoryError, match=r"^run: taken over by process 7$"):
        run.saver.handle_failed_save()


def test_a_defect_is_raised_with_the_traceback_of_the_thread(start):
    run = start(errors=[KeyError("a defect")], on_error="continue")
    run.save()
    assert run.wait()
    with pytest.raises(RuntimeError, match=r"KeyError\('a defect'\)") as end:
        run.saver.handle_failed_save()
    assert "raise error" in "".join(traceback.format_exception(end.value))


def test_no_memory_for_the_copy_is_a_failed_save(start, monkeypatch):
    run = start()
    monkeypatch.setattr("topoflow.checkpoint.saver.mmap.mmap", lambda *_, **__: os.open("/dev/null/memory", 0))
    run.save()
    assert run.saver.poll()
    with pytest.raises(RunDirectoryError, match="not written"):
        run.saver.handle_failed_save()


def test_close_waits_and_logs_a_failure_that_was_not_handled(start, caplog):
    run = start(errors=[None, FULL], held=True)
    run.save()
    threading.Timer(0.2, run.directory.go.set).start()
    run.saver.close()
    assert [step for step, _, _ in run.commits] == [1]
    run = start(errors=[FULL])
    run.save()
    run.saver.close()
    assert "not written: No space left on device" in caplog.text
    assert "Traceback" not in caplog.text
    run = start(errors=[KeyError("a defect")])
    run.save()
    run.saver.close()
    assert "Traceback" in caplog.text


def test_signals_do_not_break_a_save(start):
    run = start(held=True)
    with StopFlag().listening() as stop:
        run.save()
        for delay in (0.1, 0.2):
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGTERM)).start()
        threading.Timer(0.4, run.directory.go.set).start()
        run.saver.require_saved(1, "stopped")
        assert stop.signal_name == "SIGTERM"
    assert read_checkpoint(run.directory.folder(1))["progress"]["step"] == 1


def test_old_checkpoints_stay_until_the_new_one_is_whole(start, caplog):
    run = start(keep_last=2, keep_best=False)
    for _ in range(2):
        run.save(is_best=True)
        assert not run.wait()
    run = start(errors=[FULL], keep_last=1, on_error="continue")  # resumed from one of them
    run.step = 2
    run.save()
    assert run.wait()
    run.saver.handle_failed_save()
    assert "not written: No space left on device; existing checkpoints: step 1, 2; training continues" in caplog.text
    assert run.directory.steps() == [1, 2]
    assert run.directory.pointer("best") is None  # keep_best=false
    run.save()
    assert not run.wait()
    assert run.directory.steps() == [4]


def test_the_copy_reuses_its_memory_and_has_storages_of_its_own():
    buffer = HostBuffer(pinned=False)
    tree = {
        "a": {"w": torch.randn(5, 7), "half": torch.randn(3).bfloat16(), "step": torch.tensor(4.0)},
        "list": [{"name": "x", "betas": [0.9, 0.99]}],
        "strided": torch.arange(12.0).reshape(3, 4).t(),
        "empty": torch.zeros(0, 3),
        "flag": torch.tensor([True, False]),
    }
    buffer.reserve(10_000)
    first = buffer.copy(tree)
    for ours, theirs in ((first["a"][name], tree["a"][name]) for name in tree["a"]):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
        assert ours.untyped_storage().nbytes() == theirs.nbytes
    assert first["list"] == tree["list"]
    assert torch.equal(first["strided"], tree["strided"])
    assert first["empty"].shape == (0, 3)
    assert torch.equal(first["flag"], tree["flag"])
    tree["a"]["w"].add_(1)
    second = buffer.copy(tree)
    assert second["a"]["w"].data_ptr() == first["a"]["w"].data_ptr() != tree["a"]["w"].data_ptr()
    assert torch.equal(second["a"]["w"], tree["a"]["w"])


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_writing_thread_starts_no_threads_of_torch():
    code = """
import os, threading
import torch
from topoflow.checkpoint.fingerprint import fingerprints
from topoflow.checkpoint.saver import HostBuffer

def threads_of_torch():
    return len(os.listdir("/proc/self/task")) - threading.active_count()

torch.set_num_threads(2)
none = threads_of_torch()
tensor = torch.ones(2**20)
team, done, over = threads_of_torch() - none, threading.Event(), threading.Event()

def work():
    HostBuffer(pinned=False).reserve(2**22)
    fingerprints({"tensor": tensor})
    done.set()
    over.wait()  # a thread team would end with its thread

threading.Thread(target=work).start()
done.wait()
print(team, threads_of_torch() - none)
over.set()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["1", "1"]
