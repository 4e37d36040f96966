"""How a program starts and ends on a terminal: closed streams, Ctrl-C, and lines on stderr. Imports nothing heavy."""

import gc
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

from topoflow.errors import EXIT_INTERRUPTED, ConfigError


def prepare_process() -> None:
    """Prepare the streams and Ctrl-C of a program; call it first in an entry point, before the heavy imports.

    A standard stream that the caller has closed becomes /dev/null: otherwise the next file that is opened would get its
    number, and with it what libraries print. Ctrl-C during an import ends the process with one line and status 130,
    because an exception inside the import of torch is a traceback or an abort. `run_program` lets garbage be collected:
    during the imports three full collections would find none and take 0.3 s.
    """
    gc.disable()
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
    gc.freeze()  # what was imported stays
    gc.enable()
    try:
        return main()
    except KeyboardInterrupt:
        print_error("interrupted")
        return EXIT_INTERRUPTED


def print_output(text: str) -> None:
    """Print what a command found on stdout; once its reader has gone (such as head), all that follows is dropped.

    Where stdout cannot be written, as on a full disk, end the program with one line and status 2.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
        if not isinstance(error, BrokenPipeError):
            print_error(f"stdout: cannot be written: {error.strerror}")
            sys.exit(ConfigError.exit_status)


def print_error(text: str) -> None:
    """Print one line on stderr, unless it has no reader."""
    write_stderr(f"topoflow: {text}\n")


def write_stderr(text: str) -> None:
    """Write to stderr; once its reader has closed it, further output is dropped, also at the end of the process."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
