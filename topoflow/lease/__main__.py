"""python -m topoflow.lease RUN [JOB [RESTART]]: exit 2, with one line, if that job could not have the run directory.

For launch scripts: nothing is taken, and torch is not imported.
"""

import sys
from pathlib import Path

from topoflow.errors import ConfigError, Refusal, RunDirectoryError
from topoflow.lease.lease import Lease


def main(arguments: list[str]) -> int:
    """Look at the lease of `arguments` = RUN, JOB ("": none), RESTART ("": 0); returns the exit status."""
    try:
        if not 1 <= len(arguments) <= 3:
            raise ConfigError(f"{len(arguments)} arguments: expected RUN [JOB [RESTART]]")
        run_dir, job, restart = (*arguments, "", "")[:3]
        if restart and not (restart.isascii() and restart.isdigit()):
            raise ConfigError(f"RESTART: {restart!r}, expected a whole number")
        try:
            Lease(Path(run_dir), job or None, int(restart or 0)).look()
        except OSError as error:
            raise RunDirectoryError(f"run.dir {run_dir}: cannot be read: {error.strerror}") from None
    except Refusal as refusal:
        print(f"topoflow: {refusal}", file=sys.stderr)
        return refusal.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
