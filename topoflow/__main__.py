"""Run a command: `python -m topoflow COMMAND`."""

import sys

from topoflow.cli import main

sys.exit(main())
