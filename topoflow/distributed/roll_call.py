"""The roll call: before they do anything together, processes that meet prove that each is somebody else."""

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from topoflow.distributed.device import device_identity
from topoflow.distributed.launch import Launch
from topoflow.errors import ConfigError, RanksDisagree

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
