"""The process group, and what ranks send each other on the host."""

import hashlib
import importlib
import os
import pickle
import resource
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]  (documented)

from topoflow import errors
from topoflow.activity import Activity
from topoflow.config import DistributedConfig
from topoflow.errors import ConfigError, RanksDisagree, Refusal, StopRequested
from topoflow.launch import Launch, device_identity, set_torch_defaults
from topoflow.run_dir import StopFlag
from topoflow.text import number_ranges, shorten
from topoflow.watch import Watch, WatchServer


class Context:
    """This process and its operations with the other ranks. With one process each is trivial and no group exists.

    config: of the launch's processes. stop: whether this process was asked to stop; others may have been.
    """

    def __init__(
        self,
        launch: Launch,
        device: torch.device,
        watch: Watch | None = None,
        config: DistributedConfig | None = None,
        stop: StopFlag | None = None,
    ):
        self.launch, self.device = launch, device
        self.config, self.stop = config or DistributedConfig(), stop or StopFlag()
        self.rank, self.world_size, self.is_main = launch.rank, launch.world_size, launch.is_main
        self.watch = watch or Activity()
        self._questions = 0

    def gather_objects(self, item: Any) -> list[Any]:
        """Return the `item` of every process, in the order of ranks, on every process (pickled, over the host)."""
        if self.world_size == 1:
            return [item]
        # up a binary tree and down by broadcast: log2 n messages in a row, where gloo's own gather passes a ring of n
        items, bit = [item], 1
        box: list[Any] = [None]
        with self.watch.waiting():
            while bit < self.world_size:
                if self.rank & bit:
                    dist.send_object_list([items], self.rank - bit, device=torch.device("cpu"))
                    break
                if self.rank + bit < self.world_size:
                    dist.recv_object_list(box, self.rank + bit, device=torch.device("cpu"))
                    items += box[0]
                bit *= 2
            box = [items]
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def broadcast_object(self, item: Any) -> Any:
        """Return rank 0's `item` on every process (pickled, over the host)."""
        if self.world_size == 1:
            return item
        box = [item]
        with self.watch.waiting():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def ask_main(self, item: Any, answer: Callable[[list[Any]], Any]) -> Any:
        """Return on every process what rank 0's `answer` makes of the items of all, in the order of ranks (pickled).

        They pass through the store, so a process needs a connection to rank 0 only, not to the others.
        """
        if self.world_size == 1:
            return answer([item])
        self._questions += 1
        store = PrefixStore(f"question {self._questions}", dist.distributed_c10d._get_default_store())
        store.set(f"item {self.rank}", pickle.dumps(item))  # pyright: ignore[reportArgumentType]  (takes bytes too)
        if self.is_main:
            with self.watch.waiting():
                items = [pickle.loads(_get_when_set(store, f"item {rank}")) for rank in range(self.world_size)]
            store.set("answer", pickle.dumps(answer(items)))  # pyright: ignore[reportArgumentType]  (takes bytes too)
        with self.watch.waiting():
            answered = pickle.loads(_get_when_set(store, "answer"))
            received = store.add("received", 1)
            while self.is_main and received < self.world_size:  # rank 0 holds the store, and may leave after this
                time.sleep(0.02)
                received = store.add("received", 0)
        return answered

    def broadcast_tensor(self, tensor: torch.Tensor) -> None:
        """Overwrite `tensor` with rank 0's, in place."""
        if self.world_size > 1:
            with self.watch.waiting():
                dist.broadcast(tensor, src=0)
                self.synchronize()

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all processes, in place; returned for convenience."""
        if self.world_size > 1:
            with self.watch.waiting():
                dist.all_reduce(tensor)
                self.synchronize()
        return tensor

    def agree(self, shares: torch.Tensor, *others: torch.Tensor) -> list[float]:
        """Return the sum of `shares` [n] over all processes, then the values of `others` (of one element), on the host.

        The one place where a step waits for what was queued on the device, and for the other processes.
        """
        if self.world_size > 1 and self.device.type == "cpu":
            # up a tree and down by broadcast, where gloo's own sum passes a ring
            shares = self.gather_rows(shares.unsqueeze(0)).sum(dim=0)
        with self.watch.waiting():
            if self.world_size > 1 and self.device.type != "cpu":
                dist.all_reduce(shares)
            return torch.cat([shares, *(other.to(shares.dtype).reshape(1) for other in others)]).tolist()

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Gather [n, ...] of each process into [world_size * n, ...], in the order of ranks, on every process."""
        if self.world_size == 1:
            return rows
        table = torch.empty((self.world_size, *rows.shape), dtype=rows.dtype)
        bit = 1
        with self.watch.waiting():
            table[self.rank] = rows
            while bit < self.world_size:  # as in gather_objects; a slice that ends past the last rank ends there
                if self.rank & bit:
                    dist.send(table[self.rank : self.rank + bit], self.rank - bit)
                    break
                if self.rank + bit < self.world_size:
                    dist.recv(table[self.rank + bit : self.rank + 2 * bit], self.rank + bit)
                bit *= 2
            dist.broadcast(table, src=0)
        return table.flatten(0, 1)

    def exchange(self, partner: int, sent: torch.Tensor, received: torch.Tensor) -> None:
        """Send a tensor to the process `partner`, and overwrite `received` with the one that it sends."""
        operations = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)]
        with self.watch.waiting():
            for work in dist.batch_isend_irecv(operations):
                work.wait()
            self.synchronize()

    def synchronize(self) -> None:
        """Wait for what was queued on a GPU: NCCL only queues, and the host should wait where the watch sees it."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    @contextmanager
    def together(self, phase: str) -> Iterator[None]:
        """Raise on all processes what one refuses in the block, so that none waits for another.

        Raises:
            Refusal: the first by rank; the message names the rank, unless all refused with the same.
        """
        refusal = None
        self.watch.mark(phase)
        try:
            yield
        except Refusal as error:
            refusal = error
        gathered = self.gather_objects(None if refusal is None else (type(refusal).__name__, str(refusal)))
        refused = [(rank, *item) for rank, item in enumerate(gathered) if item is not None]
        if not refused:
            return
        rank, kind, message = refused[0]
        is_same = len(refused) == self.world_size and len({text for _, _, text in refused}) == 1
        who = "" if is_same or self.world_size == 1 else f"rank {rank}, {phase}: "
        raise getattr(errors, kind)(who + message, shared=True) from refusal

    def stop_requested(self) -> str | None:
        """Return the signal by which this rank was asked to stop, or another as far as is known; tell the others."""
        if self.stop.signal_name is not None:
            self.watch.ask_to_stop(self.stop.signal_name)
        return self.stop.signal_name or self.watch.stop_asked

    def raise_if_stop_requested(self, phase: str) -> None:
        """End here if a signal arrived on any rank: `phase` has nothing that this would lose. Call on all ranks.

        Raises:
            StopRequested: on every rank.
        """
        names = [name for name in self.gather_objects(self.stop.signal_name) if name]
        if names:
            raise StopRequested(f"stopped by {names[0]} during {phase}", shared=True)

    def require_same(self, facts: Mapping[str, str], when: str) -> None:
        """Prove that `facts` {name: value} are equal on all processes; only their hash is sent if they are.

        Raises:
            RanksDisagree: on every process, with the ranks and hosts of each value of each fact that differs.
        """
        text = "\n".join(f"{name}={facts[name]}" for name in sorted(facts))
        digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.int64)
        rows = self.gather_rows(digest.unsqueeze(0))
        if not (rows == rows[0]).all():
            gathered = self.gather_objects((socket.gethostname(), dict(facts)))
            raise RanksDisagree(describe_differences(gathered, when), shared=True)


def _get_when_set(store: Store, key: str) -> bytes:
    """Return a value as soon as it is set. The watch ends this process if that will not happen."""
    while True:
        try:
            store.wait([key], timedelta(seconds=1))  # in short waits, so that signals are handled
            return store.get(key)
        except dist.DistStoreError:
            continue


MOST_FACTS = 8


def describe_differences(gathered: Sequence[tuple[str, Mapping[str, str]]], when: str) -> str:
    """Return a table of the facts that differ: below each name, its values with their ranks and hosts.

    Args: gathered, (host, {name: value}) of each rank.
    """
    names = sorted({name for _, facts in gathered for name in facts})
    differing = [name for name in names if len({facts.get(name) for _, facts in gathered}) > 1]
    lines = [f"ranks disagree {when}: expected the same values on all"]
    for name in differing[:MOST_FACTS]:
        ranks_with: dict[str, list[int]] = {}
        for rank, (_, facts) in enumerate(gathered):
            ranks_with.setdefault(facts.get(name, "nothing"), []).append(rank)
        lines.append(f"  {name}")
        for value, ranks in sorted(ranks_with.items(), key=lambda item: item[1]):
            hosts = shorten(sorted({gathered[rank][0] for rank in ranks}), 4)
            lines.append(f"    {value} on rank(s) {number_ranges(ranks)} ({hosts})")
    if len(differing) > MOST_FACTS:
        lines.append(f"  and {len(differing) - MOST_FACTS} more")
    return "\n".join(lines)


LINGER_SECONDS = 2.0
"""How long rank 0 stays, when the set-up fails, for ranks that have not come yet, so that they hear why."""


class _SetupWait:
    """Waits for other ranks in short pieces, so that a signal, the end of the launcher and the limit are noticed."""

    def __init__(self, launch: Launch, seconds: float, stop: StopFlag):
        self._who, self._stop = f"rank {launch.rank} on {socket.gethostname()}", stop
        self._seconds, self._deadline, self._launcher = seconds, time.monotonic() + seconds, os.getppid()

    def check(self) -> None:
        """Raise if this process is to end.

        Raises:
            StopRequested: a signal arrived.
            RanksDisagree: the process that started this one has ended.
        """
        if (name := self._stop.signal_name) is not None:
            raise StopRequested(f"stopped by {name} during set-up, before all ranks had met")
        if os.getppid() != self._launcher:
            raise RanksDisagree(f"set-up: {self._who}: its launcher (process {self._launcher}) has ended")

    def pause(self, problem: str) -> None:
        """Check, and sleep briefly.

        Raises:
            RanksDisagree: the limit is over; the message gives `problem`.
        """
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
    """Listen on a port of all interfaces, 0 for any that is free, and allow this process enough open files.

    Raises:
        ConfigError: the port cannot be used.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < (number := 2 * world_size + 512):  # two sockets a rank, of the watch and of the store
        most = number if hard == resource.RLIM_INFINITY else min(number, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=world_size + 8, dualstack_ipv6=dual)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise ConfigError(
            f"environment: rank 0 cannot listen on port {port} of {socket.gethostname()} ({why}): "
            "expected MASTER_PORT to be a free port"
        ) from None


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
    server = None
    ends_with_all = True
    try:
        server = _meet(launch, config, device, watch, stop)
        yield Context(launch, device, watch, config, stop)
    except BaseException as error:
        ends_with_all = isinstance(error, Refusal) and error.shared
        if not ends_with_all and (failure := watch.attribute_failure(error)) is not None:
            raise failure.refusal() from error
        raise
    finally:
        # NCCL waits here for what it began, which after a failure has no end; the process has one
        if dist.is_initialized() and (watch.failure is None or device.type == "cpu"):
            watch.enter("end of the run", "leaving the process group")
            dist.destroy_process_group()
        if ends_with_all and watch.failure is None:
            watch.enter("end of the run")
            watch.finish()
            while server is not None and not server.others_are_gone.wait(0.05):
                watch.raise_if_failed()


def _meet(
    launch: Launch,
    config: DistributedConfig,
    device: torch.device,
    watch: Watch,
    stop: StopFlag,
) -> WatchServer | None:
    """Connect to the watch, wait there for all ranks, and form the process group. Returns the server on rank 0."""
    backend = _choose_backend(config, device)
    # DDP and the optimizers import it sooner or later. Imported for the first time while a group exists, it keeps that
    # group, and with it gloo's threads, to the end of the interpreter, which then may abort (torch 2.13).
    importlib.import_module("torch._dynamo")
    set_torch_defaults()
    wait = _SetupWait(launch, config.setup_timeout_seconds, stop)
    limit = timedelta(seconds=config.setup_timeout_seconds)
    store, server, port, token = _find_server(launch, config, watch, wait)
    address = "localhost" if launch.is_main else launch.address
    connection = _reach(address, port, wait)
    watch.connect(connection, address, token, device.type, device_identity(device), wait.pause)
    with watch.waiting():
        while not watch.met and watch.failure is None:
            wait.check()
            time.sleep(0.02)
        lingers = time.monotonic() + LINGER_SECONDS
        while server is not None and watch.failure and not server.has_all() and time.monotonic() < lingers:
            time.sleep(0.02)
        watch.raise_if_failed()
        try:
            if store is None:
                store = TCPStore(address, watch.met["store"], timeout=limit, wait_for_workers=False)
            dist.init_process_group(
                backend,
                store=store,
                rank=launch.rank,
                world_size=launch.world_size,
                device_id=device if device.type == "cuda" else None,
                # the watch knows sooner, and who; this is for the case that it fails itself
                timeout=timedelta(seconds=10 * max(config.setup_timeout_seconds, config.timeout_seconds)),
            )
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            raise RanksDisagree(f"no process group: {str(error).splitlines()[0]}") from None
        except RuntimeError as error:
            if "Unable to find address for" not in str(error):
                raise
            here = ", ".join(name for _, name in socket.if_nameindex())
            raise ConfigError(
                f"environment: GLOO_SOCKET_IFNAME={str(error).rpartition(': ')[2]}: no such network interface on "
                f"{socket.gethostname()}: expected one of {here}"
            ) from None
    return server


def _choose_backend(config: DistributedConfig, device: torch.device) -> str:
    """Return the backends of the process group: host tensors and objects go over gloo in any case."""
    on_device = {"auto": "nccl" if device.type == "cuda" else "gloo"}.get(config.backend, config.backend)
    if device.type == "cpu" and on_device == "nccl":
        raise ConfigError("distributed.backend: 'nccl' is not usable on CPU: expected gloo or auto")
    if device.type == "cuda" and on_device == "gloo" and config.reduction == "canonical":
        raise ConfigError("distributed.backend: 'gloo' sends nothing between GPUs one by one: expected nccl or auto")
    return "gloo" if device.type == "cpu" else f"cpu:gloo,cuda:{on_device}"


def _find_server(
    launch: Launch, config: DistributedConfig, watch: Watch, wait: _SetupWait
) -> tuple[Store | None, WatchServer | None, int, str]:
    """Return the store if this process has one already, the server on rank 0, and the server's port and token.

    Under torchrun, whose agent has the port of the launch, rank 0 publishes them in the agent's store. Else the server
    listens on the port of the launch.
    """
    store: Store | None = None
    server, port, token = None, launch.port, f"job-{launch.job}.{launch.restart}"
    if launch.has_agent_store:
        port, token = 0, secrets.token_hex(16)
    listener = _listen(port, launch.world_size) if launch.is_main else None
    limit = timedelta(seconds=config.setup_timeout_seconds)
    if launch.has_agent_store:
        _reach(launch.address, launch.port, wait).close()
        agent = TCPStore(launch.address, launch.port, timeout=limit, wait_for_workers=False)
        store = PrefixStore(f"topoflow/{launch.attempt}", agent)
        own = f"{listener.getsockname()[1]} {token}" if listener else ""
        found = store.compare_set("watch", "", own).decode() if listener else ""
        while not found:
            wait.pause("rank 0 did not publish its port in torchrun's store")
            found = store.get("watch").decode() if store.check(["watch"]) else ""
        port, token = int(found.split()[0]), found.split()[1]
        if listener is not None and found != own:  # another process has rank 0, too, and names both
            listener.close()
            listener = None
    if listener is not None:
        store_port = None
        if store is None:
            store = own_store = TCPStore("localhost", 0, is_master=True, timeout=limit, wait_for_workers=False)
            store_port = own_store.port
        met = {"store": store_port}
        server = WatchServer(listener, launch.world_size, token, met, config.timeout_seconds, lambda: watch.phase)
    return store, server, port, token
