"""Describe the machine that a benchmark ran on: python -m benchmarks.machine"""

import os
import sys

import torch

from topoflow.reproducibility import describe_software


def main(arguments: list[str] | None = None) -> int:
    """Print processor, cores, threads, memory, software, and how busy the machine is with other work. Linux only."""
    software = describe_software(torch.device("cpu"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    print(f"processor  {software['device']}, {cores} cores, {memory / 1e9:.0f} GB; {software['threads']} threads")
    print(f"software   torch {software['torch']}, numpy {software['numpy']}, Python {software['python']}")
    print(f"load       {', '.join(f'{load:.2f}' for load in os.getloadavg())} over 1, 5 and 15 minutes\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
