"""How ranks meet: each connects to the watch of rank 0, and when all have, they form the process group."""

import importlib
import os
import resource
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]  (documented)

from topoflow.config import DistributedConfig
from topoflow.environment import set_torch_defaults
from topoflow.errors import ConfigError, RanksDisagree, Refusal, StopRequested
from topoflow.launch import Launch, device_identity
from topoflow.ranks import Context
from topoflow.run_dir import StopFlag
from topoflow.watch import Watch
from topoflow.watch_server import WatchServer


class _SetupWait:
    """Waits for other ranks in short pieces, so that a signal, the end of the launcher and the limit are noticed."""

    def __init__(self, launch: Launch, seconds: float, stop: StopFlag):
        self._who, self._stop = f"rank {launch.rank} on {socket.gethostname()}", stop
        self._seconds, self._deadline, self._launcher = seconds, time.monotonic() + seconds, os.getppid()

    def check(self) -> None:
        """Raise if a signal arrived, or the process that started this one has ended."""
        if (name := self._stop.signal_name) is not None:
            raise StopRequested(f"stopped by {name} during set-up, before all ranks had connected")
        if os.getppid() != self._launcher:
            raise RanksDisagree(f"set-up: {self._who}: its launcher (process {self._launcher}) has ended")

    def pause(self, problem: str) -> None:
        """Sleep briefly; after the limit, raise RanksDisagree with `problem`."""
        self.check()
        if time.monotonic() > self._deadline:
            raise RanksDisagree(f"set-up: {self._who}: {problem} within {self._seconds:g} s")
        time.sleep(0.05)


def _reach(address: str, port: int, wait: _SetupWait) -> socket.socket:
    """Connect to a process that may not listen yet."""
    while True:
        try:
            return socket.create_connection((address, port), timeout=2)
        except OSError as error:
            wait.pause(f"no connection to rank 0 at {address}:{port} ({error.strerror or error})")


def _listen(port: int, world_size: int) -> socket.socket:
    """Listen on a port of all interfaces, 0 for any that is free, and allow this process enough open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < (number := 2 * world_size + 512):  # two sockets per rank: one of the watch, one of the store
        most = number if hard == resource.RLIM_INFINITY else min(number, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=world_size + 8, dualstack_ipv6=dual)
    except OSError as error:
        where = f"port {port} of {socket.gethostname()} ({os.strerror(error.errno or 0)})"
        expected = "expected MASTER_PORT to be a free port"
        raise ConfigError(f"environment: rank 0 cannot listen on {where}: {expected}") from None


@contextmanager
def distributed_context(
    launch: Launch,
    config: DistributedConfig,
    device: torch.device,
    on_forced_exit: Callable[[int, str], None] | None = None,
    stop: StopFlag | None = None,
) -> Iterator[Context]:
    """Join the process group of the launch (none for one process), and leave it at the end.

    While the block runs, and until the last process has ended, the ranks watch each other: where one raises, is lost or
    does not arrive, all end.

    Args:
        on_forced_exit: see `Watch`.
        stop: whether this process was asked to stop.

    Raises:
        ConfigError: two processes have the same rank or device, or rank 0 cannot open the port.
        RanksDisagree: not all processes arrived within `distributed.setup_timeout_seconds`; in the block, another rank
            failed first, was lost, or did not arrive.
        StopRequested: a signal came before all processes had arrived.
    """
    stop = stop or StopFlag()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.world_size == 1:
        yield Context(launch, device, None, config, stop)
        return
    watch = Watch(launch, config.setup_timeout_seconds, config.timeout_seconds, on_forced_exit)
    ends_with_all = True
    try:
        store = _meet(launch, config, device, watch, stop)
        yield Context(launch, device, watch, config, stop, store)
    except BaseException as error:
        ends_with_all = isinstance(error, Refusal) and error.shared
        if not ends_with_all and (failure := watch.attribute_failure(error)) is not None:
            raise failure.refusal() from error
        raise
    finally:
        # NCCL waits here for its operations, forever after a failure; then the process just exits
        if dist.is_initialized() and (watch.failure is None or device.type == "cpu"):
            watch.enter("end of the run", "leaving the process group")
            dist.destroy_process_group()
        if ends_with_all and watch.failure is None:
            watch.enter("end of the run")
            watch.finish()


def _meet(launch: Launch, config: DistributedConfig, device: torch.device, watch: Watch, stop: StopFlag) -> Store:
    """Connect to the watch, wait there for all ranks, and form the process group; return its store."""
    backend = choose_backend(config, device)
    # DDP and the optimizers import it sooner or later. Imported for the first time while a group exists, it keeps that
    # group, and with it gloo's threads, to the end of the interpreter, which then may abort (torch 2.13).
    importlib.import_module("torch._dynamo")
    set_torch_defaults()
    wait = _SetupWait(launch, config.setup_timeout_seconds, stop)
    limit = timedelta(seconds=config.setup_timeout_seconds)
    listener, port, token = _find_server(launch, limit, wait)
    store = None
    address = launch.address
    if listener is not None:
        address = "localhost"
        store = TCPStore(address, 0, is_master=True, timeout=limit, wait_for_workers=False)
        WatchServer(listener, token, store.port, watch, config.timeout_seconds).start()
    watch.connect(_reach(address, port, wait), port, token, device.type, device_identity(device))
    with watch.waiting():
        while watch.store_port is None and watch.failure is None:
            wait.check()
            time.sleep(0.02)
        watch.raise_if_failed()
        assert watch.store_port is not None
        with _translated_errors():
            store = store or TCPStore(address, watch.store_port, timeout=limit, wait_for_workers=False)
            dist.init_process_group(
                backend,
                store=store,
                rank=launch.rank,
                world_size=launch.world_size,
                device_id=device if device.type == "cuda" else None,
                # the watch notices earlier and knows the rank; this is for a failure of the watch itself
                timeout=timedelta(seconds=10 * max(config.setup_timeout_seconds, config.timeout_seconds)),
            )
    return store


def _find_server(launch: Launch, limit: timedelta, wait: _SetupWait) -> tuple[socket.socket | None, int, str]:
    """Return the port and token of the watch server, and on rank 0 the socket that listens there.

    Under torchrun, whose agent has the port of the launch, rank 0 publishes them in the agent's store. Else the server
    listens on the port of the launch.
    """
    listener = _listen(0 if launch.has_agent_store else launch.port, launch.world_size) if launch.is_main else None
    if not launch.has_agent_store:
        return listener, launch.port, f"job-{launch.job}.{launch.restart}"
    _reach(launch.address, launch.port, wait).close()  # the store itself would wait without heeding signals
    agent = TCPStore(launch.address, launch.port, timeout=limit, wait_for_workers=False)
    store = PrefixStore(f"topoflow/{launch.attempt}", agent)
    own = found = ""
    if listener is not None:
        own = f"{listener.getsockname()[1]} {secrets.token_hex(16)}"
        found = store.compare_set("watch", "", own).decode()
    while not found:
        wait.pause("rank 0 did not publish its port in torchrun's store")
        found = store.get("watch").decode() if store.check(["watch"]) else ""
    if listener is not None and found != own:  # another process also has rank 0, and reports both
        listener.close()
        listener = None
    port, token = found.split()
    return listener, int(port), token


def choose_backend(config: DistributedConfig, device: torch.device) -> str:
    """Return the backends of the process group: host tensors and objects go over gloo in any case."""
    on_device = {"auto": "nccl" if device.type == "cuda" else "gloo"}.get(config.backend, config.backend)
    if device.type == "cpu" and on_device == "nccl":
        raise ConfigError("distributed.backend: 'nccl' is not usable on CPU: expected gloo or auto")
    if device.type == "cuda" and on_device == "gloo" and config.reduction == "canonical":
        raise ConfigError("distributed.backend: 'gloo' cannot send between two GPUs: expected nccl or auto")
    return "gloo" if device.type == "cpu" else f"cpu:gloo,cuda:{on_device}"


@contextmanager
def _translated_errors() -> Iterator[None]:
    """Turn torch's errors of a process group that cannot be formed into refusals."""
    try:
        yield
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise RanksDisagree(f"the process group could not be created: {str(error).splitlines()[0]}") from None
    except RuntimeError as error:
        if "Unable to find address for" not in str(error):
            raise
        here = ", ".join(name for _, name in socket.if_nameindex())
        raise ConfigError(
            f"environment: GLOO_SOCKET_IFNAME={str(error).rpartition(': ')[2]}: no such network interface on "
            f"{socket.gethostname()}: expected one of {here}"
        ) from None
