"""Errors reported to the user in one line, each with the exit status of the program.

Any other exception is a bug in this program and ends it with a traceback and status 1.
"""

EXIT_DONE = 0
EXIT_INTERRUPTED = 130


class Refusal(Exception):
    """An expected error: the program reports it in one line and ends without a traceback."""

    exit_status = 1

    def __init__(self, message: str, *, shared: bool = False):
        super().__init__(message)
        self.shared = shared
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
