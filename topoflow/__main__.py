"""`python -m topoflow COMMAND`, also installed as `topoflow`."""

import sys

from topoflow.terminal import prepare_process, run_program


def main() -> int:
    """Run a command from the shell; return the exit status."""
    prepare_process()
    from topoflow.cli import main as run_command

    return run_program(run_command)


if __name__ == "__main__":
    sys.exit(main())
