import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from topoflow import activity as start_clock
from topoflow.activity import StartClock
from topoflow.launch import Launch
from topoflow.ranks import Context


@pytest.fixture
def times(monkeypatch):
    """The list of times that the clock returns from now on, in seconds."""
    readings = iter([100.0, 101.0, 103.0, 103.5, 103.52, 103.54, 103.96])
    monkeypatch.setattr(start_clock, "time", SimpleNamespace(monotonic=readings.__next__))


def test_phases_add_up_by_name_and_short_ones_are_not_shown(times):
    clock = StartClock(with_imports=False)
    for phase in ("data", "model", "data", "config", "model"):
        clock.begin(phase)
    expected = {"set-up": 1.0, "data": 2.02, "model": 0.92, "config": 0.02}
    assert clock.seconds() == pytest.approx(expected)


def test_the_summary_of_what_took_long(times):
    clock = StartClock(with_imports=False)
    for phase in ("data", "model", "data", "config", "model"):
        clock.begin(phase)
    assert clock.summary() == "first step after 4.0 s: set-up 1.0, data 2.0, model 0.9"


def test_the_watch_updates_its_clock_until_the_first_step_is_done():
    watch = Context(Launch("a test", "a test"), torch.device("cpu")).watch
    assert watch.end_setup() is None
    watch.clock = StartClock(with_imports=False)
    watch.mark("data")
    watch.enter("step 1", "loading data")
    watch.enter("validation after step 1")
    assert list(watch.clock.seconds()) == ["set-up", "data", "loading data", "validation after step 1"]
    assert watch.end_setup().startswith("first step after 0.0 s: ")
    watch.mark("saving")
    assert watch.end_setup() is None


@pytest.mark.skipif(sys.platform != "linux", reason="the age of a process is read from /proc")
def test_imports_begin_with_the_process():
    code = "import time; time.sleep(0.3); from topoflow.activity import StartClock as C; print(C(True).seconds())"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    tick = 1 / os.sysconf("SC_CLK_TCK")  # /proc rounds the start of a process down to one
    assert 0.3 <= eval(done.stdout)["imports"] <= time.monotonic() - began + tick
