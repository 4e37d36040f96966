"""The refusals that a user can meet, each with the exit status it ends the program with.

Anything else that is raised is a defect of ours and keeps Python's traceback and status 1.
"""

EXIT_DONE = 0


class Refusal(Exception):
    """The program stops on purpose: one line for the user, no traceback."""

    exit_status = 1
    shared = False
    """Every rank raises it alike, so rank 0 alone says it."""


class ConfigError(Refusal, ValueError):
    """A key, a value or a combination in the config or on the command line that cannot be used."""

    exit_status = 2


class DataError(Refusal, ValueError):
    """A data set that is not what the config or the format says."""

    exit_status = 2


class MissingPath(Refusal, FileNotFoundError):
    """A file or folder that was named and is not there."""

    exit_status = 2


class RunDirectoryError(Refusal):
    """The run directory cannot be used as asked (not writable, in use, or holds another run)."""

    exit_status = 2


class ResumeRefused(Refusal):
    """A checkpoint that cannot be restored whole."""

    exit_status = 3


class CheckpointUnreadable(ResumeRefused):
    """A checkpoint that is perhaps whole, and cannot be read here and now: never passed over for an older one."""


class TrainingDiverged(Refusal):
    """A loss or gradient that is not finite."""

    exit_status = 4


class RanksDisagree(Refusal):
    """Processes that should hold the same state do not, or one of them was lost."""

    exit_status = 5


class StopRequested(Refusal):
    """A signal asked the run to stop, and a checkpoint was committed."""

    exit_status = 75
