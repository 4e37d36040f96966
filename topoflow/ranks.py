"""What ranks send each other on the host: objects, small tensors, questions to rank 0, comparisons."""

import hashlib
import pickle
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]  (documented)

from topoflow import errors
from topoflow.activity import Activity
from topoflow.config import DistributedConfig
from topoflow.errors import RanksDisagree, Refusal, StopRequested
from topoflow.launch import Launch
from topoflow.run_dir import StopFlag
from topoflow.text import number_ranges, shorten


class Context:
    """This process and its operations with the other ranks. With one process each is trivial and no group exists.

    Args:
        watch: records phases and progress.
        config: of the launch's processes.
        stop: whether this process was asked to stop; others may have been.
        store: of the process group; needed with several processes only.
    """

    def __init__(
        self,
        launch: Launch,
        device: torch.device,
        watch: Activity | None = None,
        config: DistributedConfig | None = None,
        stop: StopFlag | None = None,
        store: Store | None = None,
    ):
        self.launch, self.device = launch, device
        self.config, self.stop = config or DistributedConfig(), stop or StopFlag()
        self.rank, self.world_size, self.is_main = launch.rank, launch.world_size, launch.is_main
        self.watch = watch or Activity()
        self._store, self._questions = store, 0
        # To gather, each rank collects from the _span ranks that begin with itself, up a binary tree, and rank 0
        # broadcasts all: log2 n messages in a row, where gloo's own gather takes n in a ring.
        self._span = self.rank & -self.rank or self.world_size
        bits = [1 << n for n in range(self.world_size.bit_length())]
        self._children = [self.rank + bit for bit in bits if bit < self._span and self.rank + bit < self.world_size]

    def gather_objects(self, item: Any) -> list[Any]:
        """Return the `item` of every process, in the order of ranks, on every process (pickled, over the host)."""
        if self.world_size == 1:
            return [item]
        items, cpu = [item], torch.device("cpu")
        box: list[Any] = [None]
        with self.watch.waiting():
            for child in self._children:
                dist.recv_object_list(box, child, device=cpu)
                items += box[0]
            if self.rank > 0:
                dist.send_object_list([items], self.rank - self._span, device=cpu)
            box = [items]
            dist.broadcast_object_list(box, src=0, device=cpu)
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

        They are sent through the store, so that a process only needs a connection to rank 0.
        """
        if self._store is None:
            return answer([item])
        self._questions += 1
        store = PrefixStore(f"question {self._questions}", self._store)
        store.set(f"item {self.rank}", pickle.dumps(item))  # pyright: ignore[reportArgumentType]  (takes bytes too)
        if self.is_main:
            with self.watch.waiting():
                items = [pickle.loads(_get_when_set(store, f"item {rank}")) for rank in range(self.world_size)]
            store.set("answer", pickle.dumps(answer(items)))  # pyright: ignore[reportArgumentType]  (takes bytes too)
        with self.watch.waiting():
            return pickle.loads(_get_when_set(store, "answer"))

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

        The only place where a step waits for the device and for the other processes.
        """
        if self.world_size > 1 and self.device.type == "cpu":
            # up a tree and down by broadcast, where gloo's own sum uses a ring
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
        table[self.rank] = rows
        with self.watch.waiting():
            for child in self._children:
                dist.recv(table[child : 2 * child - self.rank], child)  # the last may be shorter
            if self.rank > 0:
                dist.send(table[self.rank : self.rank + self._span], self.rank - self._span)
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
        """Wait for a GPU: NCCL only queues work, and the host should wait where the watch notices it."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    @contextmanager
    def together(self, phase: str) -> Iterator[None]:
        """Raise a refusal of one process in the block on all processes, so that none waits for another.

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
        """Return the signal that asked this rank, or another one as far as known, to stop; tell the others."""
        if self.stop.signal_name is not None:
            self.watch.stop_asked = self.stop.signal_name
        return self.watch.stop_asked

    def raise_if_stop_requested(self, phase: str) -> None:
        """End here if a signal arrived on any rank, because nothing in `phase` would be lost. Call on all ranks.

        Raises:
            StopRequested: on every rank.
        """
        names = [name for name in self.gather_objects(self.stop.signal_name) if name]
        if names:
            raise StopRequested(f"stopped by {names[0]} during {phase}", shared=True)

    def require_same(self, facts: Mapping[str, str], when: str) -> None:
        """Check that `facts` {name: value} are equal on all processes; only their hash is sent if they are.

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
