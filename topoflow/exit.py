"""How a program ends: what it says to the user, its exit status, and RUN/exit.json."""

import logging
import os
import sys
from collections.abc import Callable

from topoflow.distributed import Launch
from topoflow.errors import EXIT_DONE, Refusal
from topoflow.run_directory import RunDirectory
from topoflow.tracking import close_logging

log = logging.getLogger(__name__)


def run_to_exit(body: Callable[[], None], launch: Launch, directory: RunDirectory | None = None) -> int:
    """Run `body`; a refusal becomes one line on stderr and its exit status, which rank 0 also writes to exit.json.

    What every rank refuses alike is said by rank 0 alone. Anything but a refusal is a defect, with Python's traceback
    and status 1. Of several processes, one that does not end well ends here: to take its process group apart could
    mean to wait for a process that is gone, with the interpreter's lock held, so that not even the watch could end it.
    """
    try:
        body()
    except Refusal as refusal:
        say_refusal(refusal, launch)
        _leave(refusal.exit_status, str(refusal), launch, directory)
        if launch.world_size > 1:
            _end_now(refusal.exit_status)
        return refusal.exit_status
    except BaseException as error:
        if launch.world_size > 1:
            sys.excepthook(type(error), error, error.__traceback__)
        _leave(1, f"crashed: {type(error).__name__}: {error}", launch, directory)
        if launch.world_size > 1:
            _end_now(1)
        raise
    _leave(EXIT_DONE, "done", launch, directory)
    return EXIT_DONE


def _leave(status: int, reason: str, launch: Launch, directory: RunDirectory | None) -> None:
    if directory is not None and launch.is_main:
        directory.leave(status, reason)
    close_logging()


def _end_now(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def say_refusal(refusal: Refusal, launch: Launch | None = None) -> None:
    """One line on stderr, and in the log file once there is one. Without a launch the process speaks for itself."""
    is_main = launch is None or launch.is_main
    if is_main and logging.getLogger("topoflow").handlers:
        log.error("%s", refusal)
    elif is_main or not refusal.shared:
        who = "" if is_main else f"rank {launch.rank}: "
        print(f"topoflow: {who}{refusal}", file=sys.stderr, flush=True)
