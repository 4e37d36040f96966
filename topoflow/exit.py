"""How a program ends: what it says to the user, its exit status, and RUN/exit.json."""

import logging
import sys
from collections.abc import Callable

from topoflow.distributed import Launch
from topoflow.errors import EXIT_DONE, Refusal
from topoflow.run_directory import RunDirectory
from topoflow.tracking import close_logging

log = logging.getLogger(__name__)


def run_to_exit(body: Callable[[], None], launch: Launch, directory: RunDirectory | None = None) -> int:
    """Run `body`; a refusal becomes one line on stderr and its exit status, which rank 0 also writes to exit.json.

    What every rank refuses alike is said by rank 0 alone. Anything but a refusal is a defect and passes through, with
    Python's traceback and status 1.
    """
    status, reason = 1, "crashed"
    try:
        body()
        status, reason = EXIT_DONE, "done"
    except Refusal as refusal:
        status, reason = refusal.exit_status, str(refusal)
        say_refusal(refusal, launch)
    except BaseException as error:
        reason = f"crashed: {type(error).__name__}: {error}"
        raise
    finally:
        if directory is not None and launch.is_main:
            directory.leave(status, reason)
        close_logging()
    return status


def say_refusal(refusal: Refusal, launch: Launch | None = None) -> None:
    """One line on stderr, and in the log file once there is one. Without a launch the process speaks for itself."""
    is_main = launch is None or launch.is_main
    if is_main and logging.getLogger("topoflow").handlers:
        log.error("%s", refusal)
    elif is_main or not refusal.shared:
        who = "" if is_main else f"rank {launch.rank}: "
        print(f"topoflow: {who}{refusal}", file=sys.stderr, flush=True)
