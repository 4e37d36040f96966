"""What one process measures of the network: addresses, connections, clocks, and how fast all send at once."""

import fcntl
import ipaddress
import socket
import struct
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from topoflow.environment import INTERFACES, forget_interface, select_variables
from topoflow.launch import Launch
from topoflow.ranks import Context

CONNECT_SECONDS, CLOCK_ROUNDS = 3.0, 8
SIOCGIFADDR = 0x8915
"""From linux/sockios.h: the IPv4 address of an interface."""
FIRST_BYTES, PAIR_BYTES, MOST_BYTES, REPEATS = 4, 8 * 2**20, 32 * 2**20, 3
"""Sizes of the first message, which connects, of those between two nodes, and the most of a gradient: more would take
minutes on a slow network."""
SHIFTS = (1, 3, 5)
"""One a round, in which leader i and leader `shift - i` are partners. An even number of leaders leaves none alone."""


def serve_clock(listener: socket.socket) -> None:
    """Answer each byte that comes with this node's clock: 8 bytes, seconds since 1970 as a double.

    One connection after the other, until the listener is shut down.
    """
    with listener, suppress(OSError):
        while True:
            connection, _ = listener.accept()
            connection.settimeout(CONNECT_SECONDS)
            with connection, suppress(OSError):
                while connection.recv(1):
                    connection.sendall(struct.pack("d", time.time()))


def measure_clock_offset(listener: tuple[str, int]) -> dict[str, float]:
    """Return `offset` and `uncertainty` in seconds of this node's clock against the listener's (RFC 5905, section 8).

    The listener's reading is taken between our two. When is not known, so half the round trip bounds the error, and
    the shortest of a few round trips counts.
    """
    readings: list[tuple[float, float]] = []
    with socket.create_connection(listener, timeout=CONNECT_SECONDS) as connection:
        for _ in range(CLOCK_ROUNDS):
            before = time.time()
            connection.sendall(b"?")
            received = connection.recv(8, socket.MSG_WAITALL)
            after = time.time()
            if len(received) < 8:
                raise OSError("the connection was closed without an answer")
            readings.append(((after - before) / 2, (before + after) / 2 - struct.unpack("d", received)[0]))
    uncertainty, offset = min(readings)
    return {"offset": offset, "uncertainty": uncertainty}


def find_unreachable(listeners: Mapping[str, tuple[str, int]]) -> dict[str, dict[str, str]]:
    """Connect to the listener of each node; return {node: error} of those where that failed, as `nodes`."""

    def connect(listener: tuple[str, int]) -> str:
        if not listener[0]:
            return "it has no route to rank 0"
        try:
            socket.create_connection(listener, timeout=CONNECT_SECONDS).close()
        except OSError as error:
            return error.strerror or str(error)
        return ""

    with ThreadPoolExecutor(min(32, len(listeners))) as pool:
        errors = zip(listeners, pool.map(connect, listeners.values()), strict=True)
        return {"nodes": {node: error for node, error in errors if error}}


def drop_missing_interfaces() -> dict[str, tuple[list[str], bool]]:
    """Return {NAME=VALUE: `missing_interfaces`} of variables that name missing ones.

    Fatal ones are taken from this process, so that it can meet the others and this is reported.
    """
    found = {}
    for name, value in select_variables(INTERFACES).items():
        missing, is_fatal = missing_interfaces(name, value, list(local_addresses()))
        if missing:
            found[f"{name}={value}"] = missing, is_fatal
        if is_fatal:
            forget_interface(name)
    return found


def missing_interfaces(name: str, value: str, existing: list[str]) -> tuple[list[str], bool]:
    """Return the interfaces in NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME that do not exist, and whether that is fatal.

    NCCL takes beginnings of names, `=` for whole names and `^` for those to avoid (NCCL's documentation of its
    environment variables); gloo takes whole names, and fails if one is missing.
    """
    if value.startswith("^"):
        return [], False
    words = [word for word in value.removeprefix("=").split(",") if word]
    whole = name.startswith("GLOO") or value.startswith("=")
    missing = [
        word for word in words if not any(found == word or (not whole and found.startswith(word)) for found in existing)
    ]
    return missing, bool(missing) and (name.startswith("GLOO") or len(missing) == len(words))


def describe_address(launch: Launch, missing: Mapping[str, tuple[list[str], bool]]) -> dict[str, Any]:
    """Return rank 0's `address` as seen here and its `family`, this node's `own` address on the way, and the interface.

    `interface` is None on the node of rank 0; `link_mbit_s` is its speed, where the system knows.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(launch.address, launch.port or 1, type=socket.SOCK_DGRAM)[0]
    except OSError as error:
        raise OSError(f"{launch.address}, rank 0's address, cannot be resolved here: {error.strerror}") from None
    with socket.socket(family, socket.SOCK_DGRAM) as route:
        route.connect(target)  # sends nothing; chooses a route
        own = route.getsockname()[0]
    addresses = local_addresses()
    interface = next((name for name, known in addresses.items() if known == own), f"an interface with {own}")
    if ipaddress.ip_address(str(target[0])) == ipaddress.ip_address(own):
        interface = None
    speed = 0
    with suppress(OSError, ValueError):  # loopback and bridges have none
        speed = int(Path(f"/sys/class/net/{interface}/speed").read_text())
    return {
        "address": str(target[0]),
        "family": family,
        "own": own,
        "interface": interface,
        "link_mbit_s": speed if speed > 0 else None,
        "interfaces": list(addresses),
        "missing": missing,
    }


def local_addresses() -> dict[str, str | None]:
    """Return {network interface of this node: its IPv4 address, or None}."""
    found: dict[str, str | None] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            found[name] = None
            with suppress(OSError):  # it has no address
                answer = fcntl.ioctl(any_socket.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def time_all_reduce(context: Context, wanted_bytes: int, device: torch.device) -> dict[str, float]:
    """Return `seconds` and `bytes` of the fastest of a few all-reduces of `wanted_bytes`, or of a part of them."""

    def once(size: int) -> float:
        tensor = torch.zeros(max(1, size // 4), device=device)
        _barrier(context)
        start = time.monotonic()
        context.all_reduce_sum(tensor)
        return max(context.gather_objects(time.monotonic() - start))

    size = min(wanted_bytes, MOST_BYTES)
    once(FIRST_BYTES)
    return {"seconds": min(once(size) for _ in range(REPEATS)), "bytes": size}


def measure_pairs(context: Context, leaders: list[int], device: torch.device) -> dict[str, float | None]:
    """Return the `rate`, in bytes per second, at which this process, one of `leaders`, sends and receives at once.

    An all-reduce is as slow as its slowest member, so it names nobody. Nodes therefore send to each other in pairs,
    all pairs at once, in a few rounds with other partners; the best round counts, so that one slow node does not make
    its partners look slow. `rate` is None for other processes.
    """
    best, count = 0.0, len(leaders)
    for shift in dict.fromkeys(shift % count for shift in SHIFTS):
        partner = None
        if context.rank in leaders:
            partner = leaders[(shift - leaders.index(context.rank)) % count]
        for size in (FIRST_BYTES, *[PAIR_BYTES] * REPEATS):
            sent = torch.zeros(size // 4, device=device)
            received = torch.empty_like(sent)
            context.synchronize()
            _barrier(context)
            if partner not in (None, context.rank):
                start = time.monotonic()
                context.exchange(partner, sent, received)
                best = max(best, size / (time.monotonic() - start))
    _barrier(context)
    return {"rate": best or None}


def _barrier(context: Context) -> None:
    context.gather_rows(torch.zeros(1))
