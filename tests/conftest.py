import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

# The last bits of a sum depend on the number of threads, and the tests share the cores: BLAS threads that wait for each
# other take most of them. Before numpy and torch are imported, and for all processes that the tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from torch.distributed import TCPStore


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real measurements and golden checkpoints, which are not part of the project."""
    path = os.environ.get("TOPOFLOW_SHARED")
    if not path:
        pytest.skip("TOPOFLOW_SHARED does not name a folder with the real data")
    return Path(path)


@pytest.fixture
def store_port() -> Iterator[int]:
    """The port of a store like that of torchrun's agent, in a process of its own: one with threads must not fork."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writer, f"{store.port}\n".encode())
        signal.pause()
    with open(reader) as lines:
        yield int(lines.readline())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(writer)


@pytest.fixture
def held_port() -> Iterator[int]:
    """A port that no other process gets by chance, and on which a process can listen explicitly."""
    with socket.socket(socket.AF_INET6) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        holder.bind(("", 0))
        yield holder.getsockname()[1]
