import os
from pathlib import Path

import pytest
import torch

# the bits of a sum depend on the number of threads, and the tests share the cores
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real measurements and golden checkpoints, which are no part of the project."""
    path = os.environ.get("TOPOFLOW_SHARED")
    if not path:
        pytest.skip("TOPOFLOW_SHARED names no folder with the real data")
    return Path(path)
