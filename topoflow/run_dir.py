"""The run directory: held by one process at a time, changed only by its holder, with exit.json when the run ends.

`python -m topoflow.run_dir RUN [JOB [RESTART]]` checks whether a job could use RUN, without importing torch.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from topoflow.config import Config
from topoflow.config_io import dump_config
from topoflow.errors import EXIT_DONE, ConfigError, Refusal, RunDirectoryError
from topoflow.files import remove_unfinished, write_atomically
from topoflow.launch import Launch
from topoflow.lease import Lease
from topoflow.logs import close_logging
from topoflow.terminal import prepare_process, print_error

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopFlag:
    """Name of the first stop signal that arrived, or None. Further signals change nothing."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    @contextmanager
    def listening(self, until_exit: bool = False) -> Iterator["StopFlag"]:
        """Catch the stop signals (Ctrl-C, preemption and scancel, SLURM's warning, the terminal closed) in the block.

        until_exit: the process exits after the block, so a signal that arrives then must not change its status.
        SIGHUP stays ignored where the caller ignores it: nohup does.
        """
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        previous = {number: signal.signal(number, self._note) for number in set(STOP_SIGNALS) - ignored}
        # launch/srun.sh starts the program with these blocked: one sent during the start arrives now
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, signal.SIG_IGN if until_exit else handler)

    def _note(self, number: int, frame: object) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name


class RunDirectory:
    """RUN: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, resume.json, evaluation/, exit.json.

    Args: job, restart: of the launch, see `Lease`.
    """

    def __init__(self, path: str | Path, job: str | None = None, restart: int = 0):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.evaluation = self.path / "evaluation"
        self._lease = Lease(self.path, job, restart)
        self._was_requested = False

    def hold(self, wait: bool = True) -> list[str]:
        """Create the folder and take its lease, which ends with this process.

        Returns warnings for the user: from which process it was taken over, if it was.

        Args: wait, whether to watch a holder on another machine for a heartbeat (30 s), or to be refused at once.

        Raises:
            RunDirectoryError: another process holds it, and nothing was changed; or it cannot be created or written.
        """
        self._was_requested = True
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            warning = self._lease.take(wait)
            with self.writing():
                remove_unfinished(self.path)  # of the holder before, which could otherwise still rename them
                (self.path / "exit.json").unlink(missing_ok=True)  # of an earlier process: this one has not ended
        except OSError as error:
            raise RunDirectoryError(f"run.dir {self.path}: cannot be written: {error.strerror}") from None
        return [warning] if warning else []

    def release(self) -> None:
        """Release the folder, so that another process can take it."""
        self._lease.release()

    def finish(self, status: int, reason: str) -> None:
        """Write exit.json and release the folder."""
        self.write_exit(status, reason)
        self.release()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Enter this around each single change of the folder (rename, append, removal); see `Lease.writing`.

        Raises:
            RunDirectoryError: this process does not hold the folder, or has lost it.
            OSError: the file system refused.
        """
        with self._lease.writing():
            yield

    def require_held(self) -> None:
        """Check that this process still holds the folder.

        Raises:
            RunDirectoryError: another process took it, or it cannot be read.
        """
        try:
            with self.writing():
                pass
        except OSError as error:
            raise RunDirectoryError(f"run.dir {self.path}: cannot be read: {error.strerror}") from None

    def write_config(self, config: Config) -> None:
        """Write RUN/config.yaml: the resolved config, enough to repeat the run."""
        self._write("config.yaml", dump_config(config))

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write RUN/`name` as JSON."""
        self._write(name, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def write_exit(self, status: int, reason: str) -> None:
        """Write RUN/exit.json: the exit status, which torchrun does not pass on.

        Does nothing where another process holds the folder: exit.json belongs to the run that is active.
        """
        try:
            if not self._was_requested:
                self.hold(wait=False)
            self.write_json("exit.json", {"status": status, "reason": reason})
        except RunDirectoryError:
            return  # a folder that another process holds, or that cannot be written, has already been refused

    def _write(self, name: str, text: str) -> None:
        try:
            write_atomically(self.path / name, text, self.writing)
        except OSError as error:
            raise RunDirectoryError(f"{self.path / name}: cannot be written: {error.strerror}") from None


def run_to_exit(body: Callable[[], None], launch: Launch, directory: RunDirectory | None = None) -> int:
    """Run `body` and return its exit status, which rank 0 also writes to exit.json.

    A refusal becomes one line on stderr; one that all ranks share is printed by rank 0 alone. Any other exception is a
    defect: Python's traceback and status 1. With several processes, one that fails ends here with os._exit: destroying
    the process group could wait for a process that is gone, while holding the interpreter's lock.
    """
    try:
        body()
    except Refusal as refusal:
        report_refusal(refusal, launch)
        _finish(refusal.exit_status, str(refusal), launch, directory)
        if launch.world_size > 1:
            _exit_now(refusal.exit_status)
        return refusal.exit_status
    except BaseException as error:
        if launch.world_size > 1:
            sys.excepthook(type(error), error, error.__traceback__)
        _finish(1, f"crashed: {type(error).__name__}: {error}", launch, directory)
        if launch.world_size > 1:
            _exit_now(1)
        raise
    _finish(EXIT_DONE, "done", launch, directory)
    return EXIT_DONE


def _finish(status: int, reason: str, launch: Launch, directory: RunDirectory | None) -> None:
    if directory is not None and launch.is_main:
        directory.finish(status, reason)
    close_logging()


def _exit_now(status: int) -> None:
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # closed by its reader
        pass
    finally:
        os._exit(status)


def report_refusal(refusal: Refusal, launch: Launch | None = None) -> None:
    """Print one line on stderr, or log it once logging is set up; launch None: from the only process."""
    is_main = launch is None or launch.is_main
    if is_main and logging.getLogger("topoflow").handlers:
        log.error("%s", refusal)
    elif is_main or not refusal.shared:
        print_error(f"{refusal}" if launch is None or launch.is_main else f"rank {launch.rank}: {refusal}")


def main(arguments: list[str]) -> int:
    """Check the lease for `arguments` = RUN, JOB ("": none), RESTART ("": 0); return the exit status."""
    try:
        if not 1 <= len(arguments) <= 3:
            raise ConfigError(f"{len(arguments)} arguments: expected RUN [JOB [RESTART]]")
        run_dir, job, restart = (*arguments, "", "")[:3]
        if restart and not (restart.isascii() and restart.isdigit()):
            raise ConfigError(f"RESTART: {restart!r}, expected a whole number")
        try:
            Lease(Path(run_dir), job or None, int(restart or 0)).check()
        except OSError as error:
            raise RunDirectoryError(f"run.dir {run_dir}: cannot be read: {error.strerror}") from None
    except Refusal as refusal:
        print_error(str(refusal))
        return refusal.exit_status
    return 0


if __name__ == "__main__":
    prepare_process()
    sys.exit(main(sys.argv[1:]))
