"""The process group, and the few things that ranks tell each other."""

import hashlib
import importlib
import json
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from topoflow import errors
from topoflow.config import DistributedConfig
from topoflow.errors import ConfigError, RanksDisagree, Refusal, StopRequested
from topoflow.launch import Launch, connect_when_needed, device_identity
from topoflow.run_dir import StopFlag
from topoflow.watch import Hub, Watch, allow_connections

TELL_SECONDS = 5.0
"""How long rank 0, which holds the store, stays for others that have not heard yet what is wrong."""


def require_distinct_processes(store: dist.Store, launch: Launch, device: torch.device) -> None:
    """Prove that no two processes that meet at `store` have the same rank or device, and all the same kind of device.

    The first to come asks all others: ranks are what is in doubt.

    Args: store, whose timeout is how long to wait for all.

    Raises:
        ConfigError: on every process, naming two.
        RanksDisagree: likewise, naming the ranks that did not come in time.
    """
    seconds = store.timeout.total_seconds()
    number = store.add("arrived", 1) - 1
    who = f"process {os.getpid()} on {socket.gethostname()}"
    store.set(f"process {number}", json.dumps([launch.rank, device.type, device_identity(device), who]))
    if number == 0:
        arrived = list(_arrivals(store, launch.world_size, seconds))
        store.set("missing", _name_missing({rank for rank, *_ in arrived}, launch.world_size, seconds))
        store.set("refusal", _find_contradiction(arrived))
    refusal = store.get("refusal").decode()
    missing = "" if refusal else store.get("missing").decode()
    if not refusal and not missing:
        return
    deadline, told = time.monotonic() + TELL_SECONDS, store.add("told", 1)
    while launch.is_main and told < store.add("arrived", 0) and time.monotonic() < deadline:
        time.sleep(0.05)
        told = store.add("told", 0)
    error = ConfigError(refusal) if refusal else RanksDisagree(missing)
    error.shared = True
    raise error


def _arrivals(store: dist.Store, world_size: int, seconds: float) -> Iterator[tuple[int, str, str, str]]:
    """What processes said, in the order of their coming, until all have come or the time is over."""
    deadline = time.monotonic() + seconds
    for number in range(world_size):
        left = max(deadline - time.monotonic(), 0.001)
        try:
            store.wait([f"process {number}"], timedelta(seconds=left))
        except dist.DistStoreError:
            return
        yield json.loads(store.get(f"process {number}"))


def _name_missing(arrived: set[int], world_size: int, seconds: float) -> str:
    missing = [str(rank) for rank in range(world_size) if rank not in arrived]
    if not missing:
        return ""
    more = f" and {len(missing) - 16} more" if len(missing) > 16 else ""
    return f"set-up: rank(s) {', '.join(missing[:16])}{more} of {world_size} did not arrive within {seconds:g} s"


def _find_contradiction(processes: Iterable[tuple[int, str, str, str]]) -> str:
    """What is wrong with [(rank, kind of device, identity of device, who)], in one line; empty if nothing is."""
    by_rank: dict[int, str] = {}
    by_device: dict[str, str] = {}
    by_kind: dict[str, str] = {}
    for rank, kind, identity, who in processes:
        if rank in by_rank:
            return f"environment: rank {rank} is that of {by_rank[rank]} and of {who}: expected one of each"
        by_rank[rank] = who
        named = f"rank {rank}, {who}"
        if identity and identity in by_device:
            return (
                f"environment: device {identity} is that of {by_device[identity]} and of {named}: "
                "expected one process per device"
            )
        by_device[identity] = named
        by_kind.setdefault(kind, named)
    if len(by_kind) > 1:
        found = " and ".join(f"{kind} for {named}" for kind, named in sorted(by_kind.items()))
        return f"run.device: {found}: expected the same kind for all"
    return ""


class Context:
    """This process among the others. With one process every operation is trivial and no group exists.

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
        self.launch, self.device, self.config, self.stop = (
            launch,
            device,
            config or DistributedConfig(),
            stop or StopFlag(),
        )
        self.rank, self.world_size, self.is_main = launch.rank, launch.world_size, launch.is_main
        self.watch = watch or Watch(launch)

    def gather_objects(self, item: Any) -> list[Any]:
        """`item` of every process, in the order of ranks, on every process (pickled, over the host)."""
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
        """Rank 0's `item` on every process (pickled, over the host)."""
        if self.world_size == 1:
            return item
        box = [item]
        with self.watch.waiting():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def broadcast_tensor(self, tensor: torch.Tensor) -> None:
        """Overwrite `tensor` by rank 0's, in place."""
        if self.world_size > 1:
            with self.watch.waiting():
                dist.broadcast(tensor, src=0)
                self.settle()

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all processes, in place; returned for convenience."""
        if self.world_size > 1:
            with self.watch.waiting():
                dist.all_reduce(tensor)
                self.settle()
        return tensor

    def agree(self, shares: torch.Tensor, *others: torch.Tensor) -> list[float]:
        """The sum of `shares` [n] over all processes, then the values of `others` (each of one element), on the host.

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
        """[n, ...] of each process -> [world_size * n, ...] in the order of ranks, on the host of every process."""
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
        """Send one tensor to the process `partner` while it sends one here, which overwrites `received`."""
        operations = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)]
        with self.watch.waiting():
            for work in dist.batch_isend_irecv(operations):
                work.wait()
            self.settle()

    def settle(self) -> None:
        """Wait for what was queued on a GPU: NCCL only queues, and the host should wait where the watch sees it."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    @contextmanager
    def together(self, phase: str) -> Iterator[None]:
        """What one process refuses here, all refuse with the same message, so that none waits for another.

        Raises:
            Refusal: of the first process that raised one; if not all said the same, the message names its rank.
        """
        refusal = None
        self.watch.mark(phase)
        try:
            yield
        except Refusal as error:
            refusal = error
        said = self.gather_objects(None if refusal is None else (type(refusal).__name__, str(refusal)))
        refused = [(rank, *item) for rank, item in enumerate(said) if item is not None]
        if not refused:
            return
        rank, kind, message = refused[0]
        alike = len(refused) == self.world_size and len({text for _, _, text in refused}) == 1
        who = "" if alike or self.world_size == 1 else f"rank {rank}, {phase}: "
        shared = getattr(errors, kind)(who + message)
        shared.shared = True
        raise shared from refusal

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
            refusal = StopRequested(f"stopped by {names[0]} during {phase}")
            refusal.shared = True
            raise refusal

    def are_same(self, values: Mapping[str, str]) -> bool:
        """Whether `values` {name: what is held} are equal on all processes; only their hash travels."""
        text = "\n".join(f"{name}={values[name]}" for name in sorted(values))
        digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.int64)
        rows = self.gather_rows(digest.unsqueeze(0))
        return bool((rows == rows[0]).all())

    def require_same(self, values: Mapping[str, str], what: str) -> None:
        """Prove that `values` {name: what is held} are equal on all processes; only their hash travels if they are.

        Raises:
            RanksDisagree: naming the first name that differs, and the ranks that differ from most others.
        """
        if self.are_same(values):
            return
        gathered = self.gather_objects(dict(values))
        for name in sorted({name for held in gathered for name in held}):
            held = [values.get(name) for values in gathered]
            usual, times = Counter(held).most_common(1)[0]
            if times < self.world_size:
                odd = ", ".join(str(rank) for rank, value in enumerate(held) if value != usual)
                most = f"from {times} others" if times > 1 else "from every other"
                refusal = RanksDisagree(f"{what}: {name} differs on rank(s) {odd} {most}")
                refusal.shared = True
                raise refusal


@contextmanager
def distributed_context(
    launch: Launch,
    config: DistributedConfig,
    device: torch.device,
    last_words: Callable[[int, str], None] | None = None,
    stop: StopFlag | None = None,
) -> Iterator[Context]:
    """Join the process group of the launch (none for one process), leave it at the end.

    While the block runs, the ranks watch each other: where one raises, is lost or does not arrive, all end.

    Args: last_words, see `Watch`.

    Raises:
        RanksDisagree: not all processes arrived within `distributed.setup_timeout_seconds`; in the block, another rank
            failed first, was lost, or did not arrive.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.world_size == 1:
        yield Context(launch, device, None, config, stop)
        return
    watch = Watch(launch, config.setup_timeout_seconds, config.timeout_seconds, last_words)
    hub = None
    try:
        hub = _join(launch, config, device, watch)
        yield Context(launch, device, watch, config, stop)
    except BaseException as error:
        if not (isinstance(error, Refusal) and error.shared):
            verdict = watch.explain(error)
            if verdict is not None:
                raise verdict.refusal() from error
        raise
    finally:
        watch.leave()
        # NCCL waits here for what it began, which after a failure has no end; the process has one
        if dist.is_initialized() and (watch.verdict is None or device.type == "cpu"):
            dist.destroy_process_group()
        if hub is not None and watch.verdict is None:
            hub.close()
        elif hub is None:
            watch.await_goodbye()


def _join(
    launch: Launch,
    config: DistributedConfig,
    device: torch.device,
    watch: Watch,
) -> Hub | None:
    """Meet the other processes: at the store, at the hub (returned on rank 0), and in the process group."""
    # Host tensors and objects go over gloo beside the devices' own backend.
    on_device = {"auto": "nccl" if device.type == "cuda" else "gloo"}.get(config.backend, config.backend)
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,cuda:{on_device}"
    if device.type == "cpu" and on_device == "nccl":
        raise ConfigError("distributed.backend: 'nccl' is not usable on CPU: expected gloo or auto")
    if device.type == "cuda" and on_device == "gloo" and config.reduction == "canonical":
        raise ConfigError("distributed.backend: 'gloo' sends nothing between GPUs one by one: expected nccl or auto")
    setup = timedelta(seconds=config.setup_timeout_seconds)
    # DDP and the optimizers import it sooner or later. Imported for the first time while a group exists, it keeps that
    # group, and with it gloo's threads, to the end of the interpreter, which then may abort (torch 2.13).
    importlib.import_module("torch._dynamo")
    connect_when_needed()
    hub = None
    if launch.is_main:
        allow_connections(launch.world_size)
    try:
        store = _meet(launch, setup)
        require_distinct_processes(dist.PrefixStore("topoflow", store), launch, device)
        if launch.is_main:
            hub = Hub(launch.world_size, secrets.token_hex(16), lambda: watch.phase)
            store.set("watch", f"{hub.port} {hub.token}")
        port, token = store.get("watch").decode().split()
        watch.connect("localhost" if launch.is_main else launch.address, int(port), token)
        dist.init_process_group(
            backend,
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            # the watch knows sooner, and who; this is for the case that it fails itself
            timeout=timedelta(seconds=10 * max(config.setup_timeout_seconds, config.timeout_seconds)),
        )
    except OSError as error:
        raise RanksDisagree(
            f"set-up: rank {launch.rank} on {socket.gethostname()}: no connection to rank 0 at {launch.address}: "
            f"{error.strerror or error}"
        ) from None
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise RanksDisagree(
            f"set-up: rank {launch.rank} of {launch.world_size} on {socket.gethostname()} did not meet the others at "
            f"{launch.address}:{launch.port} within {config.setup_timeout_seconds:g} s: {str(error).splitlines()[0]}"
        ) from None
    return hub


def _meet(launch: Launch, timeout: timedelta) -> dist.Store:
    """The store that all processes share: torchrun's own, else one that rank 0 opens at the launch's address."""
    if launch.launcher == "torchrun":
        store, _, _ = next(dist.rendezvous("env://", launch.rank, launch.world_size, timeout=timeout))
        store.set_timeout(timeout)
        return store
    # not waiting for the others here: torch's wait would count them, and not say who is missing
    return dist.TCPStore(
        launch.address, launch.port, launch.world_size, launch.is_main, timeout=timeout, wait_for_workers=False
    )


def require_agreement(context: Context, facts: Mapping[str, str], when: str) -> None:
    """Prove that `facts` {name: value} are equal on all processes; only their hash travels if they are.

    Raises:
        RanksDisagree: on every process: a line for each fact that differs, with ranks and hosts for each value.
    """
    if context.are_same(facts):
        return
    gathered = context.gather_objects((socket.gethostname(), dict(facts)))
    lines = [f"ranks disagree {when}: expected one program on one data set"]
    for name in sorted({name for _, held in gathered for name in held}):
        ranks_with: dict[str, list[int]] = {}
        for rank, (_, held) in enumerate(gathered):
            ranks_with.setdefault(held.get(name, "nothing"), []).append(rank)
        if len(ranks_with) > 1:
            lines.append(f"  {name}")
            for value, ranks in sorted(ranks_with.items(), key=lambda item: item[1]):
                hosts = ", ".join(sorted({gathered[rank][0] for rank in ranks})[:4])
                lines.append(f"    {value} on rank(s) {_shorten(ranks)} ({hosts})")
    refusal = RanksDisagree("\n".join(lines))
    refusal.shared = True
    raise refusal


def _shorten(ranks: list[int]) -> str:
    """`0-3, 7` of increasing numbers."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
