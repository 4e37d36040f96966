"""Interrupt `prepare` at chosen places."""

import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.small_data import damage_of
from topoflow.tools.prepare import writing
from topoflow.tools.prepare.year_writer import YearWriter


class Interrupted(BaseException):
    """Raised in place of a kill."""


def interrupt():
    raise Interrupted


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def trace_lines(at, act):
    """Call `act` when so many lines of the writer have run; return a function that stops and returns their number."""
    count = 0
    folder, files = str(Path(writing.__file__).parent), str(Path(writing.__file__).parents[2] / "files.py")

    def trace(frame, kind, _):
        nonlocal count
        name = frame.f_code.co_filename
        if not (name.startswith(folder) or name == files):
            return None
        if kind == "line":
            count += 1
            if count == at:
                act()
        return trace

    sys.settrace(trace)
    return lambda: (sys.settrace(None), count)[1]


def interrupt_everywhere(act, prepare_it, output, points):
    """Yield after each interruption of `prepare_it` at evenly spaced lines that it runs."""
    stop = trace_lines(-1, interrupt)
    prepare_it()
    lines = stop()
    shutil.rmtree(output)
    for line in np.unique(np.linspace(1, lines - 3, points).astype(int)):
        yield line
        if act is kill:
            child = os.fork()
            if child == 0:
                trace_lines(line, kill)
                prepare_it()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
        else:
            stop = trace_lines(line, interrupt)
            with pytest.raises(Interrupted):
                prepare_it()
            stop()
        if output.exists():  # as soon as it exists it is whole
            assert damage_of(output) == []
        prepare_it()
        yield line


def begin(prepare_it, days=3, error=Interrupted):
    """Interrupt `prepare_it` when so many days have been written."""
    whole = YearWriter.write

    def write(self, *arguments):
        whole(self, *arguments)
        if len(self.days) == days:
            raise error

    YearWriter.write = write
    try:
        with pytest.raises(error):
            prepare_it()
    finally:
        YearWriter.write = whole
