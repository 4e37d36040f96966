"""Errors reported to the user in one line, each with its exit status; and how a program starts and ends.

Any other exception is a bug in this program and ends it with a traceback and status 1.
"""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

EXIT_DONE = 0
EXIT_INTERRUPTED = 130


class Refusal(Exception):
    """An expected error: the program reports it in one line and ends without a traceback."""

    exit_status = 1
    shared = False
    """Whether all ranks raise the same error, so that only rank 0 reports it."""


class ConfigError(Refusal, ValueError):
    """The config or the command line has an invalid key, value or combination of values."""

    exit_status = 2


class DataError(Refusal, ValueError):
    """A data set does not match the config or its format."""

    exit_status = 2


class MissingPath(Refusal, FileNotFoundError):
    """A file or folder named by the user does not exist."""

    exit_status = 2


class RunDirectoryError(Refusal):
    """The run directory cannot be used: it is not writable, in use by another job, or holds another run."""

    exit_status = 2


class ResumeRefused(Refusal):
    """A checkpoint cannot be restored completely."""

    exit_status = 3


class CheckpointUnreadable(ResumeRefused):
    """A checkpoint cannot be read at the moment but may be intact: an older one is never used in its place."""


class TrainingDiverged(Refusal):
    """A loss, gradient or forecast is not finite."""

    exit_status = 4


class RanksDisagree(Refusal):
    """Ranks hold different states, or one of them stalled or was lost."""

    exit_status = 5


class StopRequested(Refusal):
    """A signal stopped the run after a checkpoint of all finished steps was committed."""

    exit_status = 75


def prepare_process() -> None:
    """Prepare the streams and Ctrl-C of a program; call it first in an entry point, before the heavy imports.

    A standard stream that the caller has closed becomes /dev/null: otherwise the next file that is opened would get its
    number, and with it what libraries print. Ctrl-C during an import ends the process with one line and status 130,
    because an exception inside the import of torch is a traceback or an abort.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (for as long as the process lives)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not in the background of a shell script
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    caller = frame
    while caller is not None:
        if caller.f_code.co_filename.startswith("<frozen importlib"):
            print_error("interrupted")
            os._exit(EXIT_INTERRUPTED)
        caller = caller.f_back
    signal.default_int_handler(number, frame)


def run_program(main: Callable[[], int]) -> int:
    """Return the exit status of `main`; Ctrl-C is one line and status 130."""
    try:
        return main()
    except KeyboardInterrupt:
        print_error("interrupted")
        return EXIT_INTERRUPTED


def print_error(text: str) -> None:
    """Print one line on stderr, if anybody reads it."""
    write_stderr(f"topoflow: {text}\n")


def write_stderr(text: str) -> None:
    """Write to stderr; once its reader has gone, all that follows is dropped, also at the end of the process."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
