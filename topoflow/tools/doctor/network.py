"""Addresses, clocks and connections, and how fast all send at once: what processes find, and what rank 0 compares."""

import fcntl
import ipaddress
import socket
import statistics
import struct
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from topoflow.environment import INTERFACES, forget_interface, select_variables
from topoflow.errors import ConfigError
from topoflow.ranks import Context
from topoflow.tools.doctor.probe import Process
from topoflow.tools.doctor.report import FAIL, OK, WARNING, Found, Report, format_value

CONNECT_SECONDS, MOST_CONNECTIONS, CLOCK_ROUNDS = 3.0, 128, 8
CLOCK_WARNING_SECONDS, CLOCK_FAIL_SECONDS = 0.1, 1.0
SIOCGIFADDR = 0x8915
"""From linux/sockios.h: the IPv4 address of an interface."""
PAIR_BYTES, MOST_BYTES, REPEATS = 8 * 2**20, 32 * 2**20, 3
"""Sent between two nodes, and the most of a gradient: more would take minutes on a slow network."""
SHIFTS = (1, 3, 5)
"""One a round, in which leader i and leader `shift - i` are partners. An even number of leaders leaves none alone."""


def drop_missing_interfaces() -> Found:
    """Find the variables that name missing interfaces.

    Fatal ones are taken from this process, so that it can meet the others and this is reported.
    """
    found, existing = Found(), [*local_addresses()]
    for name, value in select_variables(INTERFACES).items():
        missing, is_fatal = missing_interfaces(name, value, existing)
        if missing:
            text = f"{name}={value}: no interface {', '.join(missing)}: expected one of {', '.join(existing)}"
            found.find(FAIL if is_fatal else WARNING, text)
        if is_fatal:
            forget_interface(name)
    return found


def missing_interfaces(name: str, value: str, existing: list[str]) -> tuple[list[str], bool]:
    """Return the interfaces in NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME that do not exist, and whether that is fatal.

    NCCL takes beginnings of names, `=` for whole names and `^` for those to avoid (NCCL's documentation of its
    environment variables); gloo takes whole names, and fails if one is missing.
    """
    words = [] if value.startswith("^") else [word for word in value.removeprefix("=").split(",") if word]
    if name.startswith("GLOO") or value.startswith("="):
        missing = [word for word in words if word not in existing]
    else:
        missing = [word for word in words if not any(found.startswith(word) for found in existing)]
    return missing, bool(missing) and (name.startswith("GLOO") or len(missing) == len(words))


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


def check_address(process: Process, found: Found) -> None:
    """Check that rank 0's address is one that others can reach, and listen for the other nodes."""
    launch = process.launch
    has_other_nodes = launch.local_world_size < launch.world_size
    try:
        family, _, _, _, target = socket.getaddrinfo(launch.address, launch.port or 1, type=socket.SOCK_DGRAM)[0]
    except OSError as error:
        text = f"{launch.address}, rank 0's address, cannot be resolved here: {error.strerror}"
        raise ConfigError(text) from None
    with socket.socket(family, socket.SOCK_DGRAM) as route:
        route.connect(target)  # sends nothing; chooses a route
        own = route.getsockname()[0]
    listener = socket.create_server(("", 0), family=family, backlog=1024)
    process.left.callback(listener.shutdown, socket.SHUT_RDWR)
    threading.Thread(target=_accept_all, args=(listener,), daemon=True).start()
    # rank 0 is reached by the name that all know; its own route to itself may be loopback
    found.facts["listener"] = (launch.address if launch.is_main else own, listener.getsockname()[1])
    address, interface, speed = str(target[0]), "the node itself", 0
    if has_other_nodes and ipaddress.ip_address(address).is_loopback:
        text = f"{launch.address} is {address} on this node, which reaches only itself: look at /etc/hosts"
        # on rank 0's own node that is usual (Debian), and harmless if the others resolve it to another address
        found.find(WARNING if launch.is_main else FAIL, text)
    if ipaddress.ip_address(own) != ipaddress.ip_address(address):
        known = {address: name for name, address in local_addresses().items()}
        interface = known.get(own, f"an interface with {own}")
    with suppress(OSError, ValueError):  # bridges have none
        speed = int(Path(f"/sys/class/net/{interface}/speed").read_text())
    found.figures |= {"address": address, "interface": interface, "link_mbit_s": speed if speed > 0 else None}
    way = f"{interface} ({speed / 1000:g} Gbit/s)" if speed > 0 else interface
    if not (launch.is_main and has_other_nodes):  # which know the way
        found.summary = f"rank 0 is at {launch.address}:{launch.port}, reached through {way}"
    if launch.world_size == 1:
        found.summary = "one process: no others to reach"


def _accept_all(listener: socket.socket) -> None:
    """Close each connection that comes, until the listener is shut down: its queue must not fill up."""
    with listener, suppress(OSError):
        while True:
            listener.accept()[0].close()


def measure_clock(context: Context) -> Found:
    """Measure `offset` and `uncertainty` in seconds of this process's clock against that of rank 0; call it on all.

    Rank 0's reading is taken between our two. When is not known, so half the time between ours bounds the error (RFC
    5905, section 8), and the shortest of a few rounds counts.
    """
    readings: list[tuple[float, float]] = []
    for _ in range(CLOCK_ROUNDS):
        before = time.time()
        on_main = context.ask_main(None, lambda _: time.time())
        after = time.time()
        readings.append(((after - before) / 2, (before + after) / 2 - on_main))
    uncertainty, offset = (0.0, 0.0) if context.is_main else min(readings)
    return Found(facts={"offset": offset, "uncertainty": uncertainty})


def compare_clocks(_: Report, found: Mapping[str, Found]) -> str:
    """Check that each node's clock agrees with rank 0's, or with most others where there are more than two."""
    offsets = [item.facts["offset"] for item in found.values()]
    by_most = len(offsets) > 2  # with two clocks it is unknown which one is wrong
    usual, whom = (statistics.median(offsets), "most others") if by_most else (0.0, "that of rank 0")
    for item in found.values():
        offset, uncertainty = item.facts["offset"] - usual, item.facts["uncertainty"]
        item.figures |= {"clock_offset_seconds": offset, "clock_uncertainty_seconds": uncertainty}
        least, way = abs(offset) - uncertainty, "ahead of" if offset > 0 else "behind"
        verdict = FAIL if least > CLOCK_FAIL_SECONDS else WARNING if least > CLOCK_WARNING_SECONDS else OK
        text = f"the clock is {abs(offset):.3f} s {way} {whom}: synchronize it (chronyc tracking, timedatectl)"
        item.find(verdict, text)
    if len(offsets) == 1:
        return "one node, one clock"
    worst_ms = 1e3 * max(item.facts["uncertainty"] for item in found.values())
    return f"at most {(max(offsets) - min(offsets)) * 1e3:.1f} ms apart (measured to within {worst_ms:.1f} ms)"


def check_connections(process: Process, found: Found) -> None:
    """Connect to the first process of each node."""

    def connect(rank: int) -> str:
        listener = process.others[rank]["listener"]
        if listener is None:
            return "its address is not known"
        try:
            socket.create_connection(listener, CONNECT_SECONDS).close()
        except OSError as error:
            return error.strerror or str(error)
        return ""

    with ThreadPoolExecutor(MOST_CONNECTIONS) as pool:
        errors = pool.map(connect, process.leaders)
    for host, error in zip(process.ranks_of, errors, strict=True):
        text = f"no TCP connection from {process.host} to {host}: {error}"
        found.find(FAIL if error else OK, f"{text}: check routes, firewalls and cables")
    alone = len(process.others) == 1
    found.summary = "one process: nothing is sent" if alone else "some nodes cannot connect: nothing was sent"


def measure_speed(context: Context, process: Process, found: Found, gradient_bytes: int) -> None:
    """Time a few all-reduces of the gradient, or of a part of it, and then messages between pairs of nodes.

    An all-reduce is as slow as its slowest member, so it names nobody. Nodes therefore send to each other in pairs,
    all pairs at once, in a few rounds with other partners; the best round counts, so that one slow node does not make
    its partners look slow.
    """
    on_gpu = process.config.distributed.backend != "gloo"  # which has no point-to-point transfers between GPUs
    device, size = process.device if on_gpu else torch.device("cpu"), min(gradient_bytes, MOST_BYTES)
    tensor, taken, rate = torch.zeros(max(1, size // 4), device=device), [], 0.0
    for part in (tensor[:1], *[tensor] * REPEATS):  # the first connects
        start = time.monotonic()
        context.all_reduce_sum(part)
        taken.append(time.monotonic() - start)
    seconds, leaders = max(context.gather_objects(min(taken[1:]))), process.leaders
    sent = torch.zeros(PAIR_BYTES // 4, device=device)
    received = torch.empty_like(sent)
    for shift in dict.fromkeys(shift % len(leaders) for shift in SHIFTS) if context.rank in leaders else ():
        partner = leaders[(shift - leaders.index(context.rank)) % len(leaders)]
        for count in (1, *[len(sent)] * REPEATS) if partner != context.rank else ():  # the first connects
            start = time.monotonic()
            context.exchange(partner, sent[:count], received[:count])
            rate = max(rate, 4 * count / (time.monotonic() - start))
    found.figures |= {"all_reduce_seconds": seconds, "all_reduce_bytes": size}
    if rate > 0:
        found.figures["network_bytes_per_second"] = rate
    part = "" if size == gradient_bytes else f" ({format_value(size, 'B')} of them)"
    speed = format_value(2 * (1 - 1 / context.world_size) * size / seconds, "B/s")
    what = f"all-reduce of the gradient, {format_value(gradient_bytes, 'B')}{part}"
    found.summary = f"{what}: {seconds:.4f} s, {speed} per process"
