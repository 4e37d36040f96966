"""The process group, and the few things that processes say to each other."""

import hashlib
import importlib
import os
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from topoflow import errors
from topoflow.config import DistributedConfig
from topoflow.distributed.launch import Launch
from topoflow.errors import ConfigError, RanksDisagree, Refusal


class Context:
    """This process among the others. With one process every operation is trivial and no group exists."""

    def __init__(self, launch: Launch, device: torch.device):
        self.launch, self.device = launch, device
        self.rank, self.world_size, self.is_main = launch.rank, launch.world_size, launch.is_main

    def gather_objects(self, item: Any) -> list[Any]:
        """`item` of every process, in the order of ranks, on every process (pickled, over the host)."""
        if self.world_size == 1:
            return [item]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, item)
        return gathered

    def broadcast_object(self, item: Any) -> Any:
        """Rank 0's `item` on every process (pickled, over the host)."""
        if self.world_size == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def broadcast_tensor(self, tensor: torch.Tensor) -> None:
        """Overwrite `tensor` by rank 0's, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0)

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all processes, in place; returned for convenience."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, ...] of each process -> [world_size * n, ...] in the order of ranks, on every process."""
        if self.world_size == 1:
            return rows
        gathered = rows.new_empty((self.world_size * rows.shape[0], *rows.shape[1:]))
        dist.all_gather(list(gathered.chunk(self.world_size)), rows.contiguous())
        return gathered

    def exchange(self, partner: int, sent: torch.Tensor, received: torch.Tensor) -> None:
        """Send one tensor to the process `partner` while it sends one here, which overwrites `received`."""
        operations = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    @contextmanager
    def together(self, phase: str) -> Iterator[None]:
        """What one process refuses here, all refuse with the same message, so that none waits for another.

        Raises:
            Refusal: of the first process that raised one; if not all said the same, the message names its rank.
        """
        refusal = None
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

    def require_same(self, values: Mapping[str, str], what: str) -> None:
        """Prove that `values` {name: what is held} are equal on all processes; only their hash travels if they are.

        Raises:
            RanksDisagree: naming the first name that differs, and the ranks that differ from most others.
        """
        text = "\n".join(f"{name}={values[name]}" for name in sorted(values))
        digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.int64)
        rows = self.gather_rows(digest.unsqueeze(0).to(self.device))
        if (rows == rows[0]).all():
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
def distributed_context(launch: Launch, config: DistributedConfig, device: torch.device) -> Iterator[Context]:
    """Join the process group of the launch (none for one process), leave it at the end.

    Raises:
        RanksDisagree: not all processes arrived within `distributed.setup_timeout_seconds`.
    """
    context = Context(launch, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.world_size == 1:
        yield context
        return
    _join(launch, config, device)
    try:
        yield context
    finally:
        dist.destroy_process_group()


def require_distinct_ranks(store: dist.Store, launch: Launch) -> None:
    """Prove that no two of the processes that meet at `store` have the same rank: the first to come asks all others.

    Raises:
        ConfigError: on every process, naming two that have.
    """
    number = store.add("arrived", 1) - 1
    store.set(f"process {number}", f"{launch.rank} process {os.getpid()} on {socket.gethostname()}")
    if number == 0:
        processes: dict[str, str] = {}
        refusal = ""
        for other in range(launch.world_size):
            rank, _, who = store.get(f"process {other}").decode().partition(" ")
            if rank in processes:
                refusal = f"environment: rank {rank} is that of {processes[rank]} and of {who}: expected one of each"
            processes[rank] = who
        store.set("refusal", refusal)
    refusal = store.get("refusal").decode()
    if refusal:
        error = ConfigError(refusal)
        error.shared = True
        raise error


def _join(launch: Launch, config: DistributedConfig, device: torch.device) -> None:
    # Host tensors and objects go over gloo beside the devices' own backend.
    on_device = {"auto": "nccl" if device.type == "cuda" else "gloo"}.get(config.backend, config.backend)
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,cuda:{on_device}"
    if device.type == "cpu" and on_device == "nccl":
        raise ConfigError("distributed.backend: 'nccl' is not usable on CPU: expected gloo or auto")
    if device.type == "cuda" and on_device == "gloo" and config.reduction == "canonical":
        raise ConfigError("distributed.backend: 'gloo' sends nothing between GPUs one by one: expected nccl or auto")
    setup = timedelta(seconds=config.setup_timeout_seconds)
    url = "env://" if launch.launcher == "torchrun" else f"tcp://{launch.address}:{launch.port}"
    # DDP and the optimizers import it sooner or later. Imported for the first time while a group exists, it keeps that
    # group, and with it gloo's threads, to the end of the interpreter, which then may abort (torch 2.13).
    importlib.import_module("torch._dynamo")
    try:
        store, _, _ = next(dist.rendezvous(url, launch.rank, launch.world_size, timeout=setup))
        store.set_timeout(setup)
        require_distinct_ranks(dist.PrefixStore("topoflow", store), launch)
        dist.init_process_group(
            backend,
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(seconds=config.timeout_seconds),
        )
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise RanksDisagree(
            f"set-up: rank {launch.rank} of {launch.world_size} on {socket.gethostname()} did not meet the others at "
            f"{launch.address}:{launch.port} within {config.setup_timeout_seconds:g} s: {str(error).splitlines()[0]}"
        ) from None
