"""What one process measures on its own machine: plain values, which rank 0 judges.

Measurements raise OSError or a Refusal where the machine or the data refuse; `Probe.ask` makes an answer of these.
"""

import dataclasses
import fcntl
import importlib.metadata
import ipaddress
import os
import platform
import resource
import secrets
import shutil
import socket
import socketserver
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.cuda.nccl

import topoflow
from topoflow.build import program_facts
from topoflow.config import Config
from topoflow.data.assembly import open_forecast_data
from topoflow.data.normalization import Normalization
from topoflow.environment import CACHES, INTERFACES, VISIBLE_DEVICES, forget_interface, select_variables
from topoflow.errors import Refusal
from topoflow.launch import Launch, assigned_devices, device_identity

PREFIX = ".topoflow-doctor-"
SHARED_MEMORY = Path("/dev/shm")
PACKAGES = ("torch", "numpy", "xarray", "zarr")
DATA_SECONDS, READ_SECONDS, MOST_SAMPLES = 20.0, 2.0, 64
BLOCK_BYTES, MOST_BYTES, WRITE_SECONDS = 4 * 2**20, 32 * 2**20, 3.0
VISIBLE_SECONDS = 3.0
"""How long a node may take to see a file that another has written (network file systems cache folders)."""
CONNECT_SECONDS, CLOCK_ROUNDS = 3.0, 8
_MIOPEN_DEFAULTS = {"MIOPEN_USER_DB_PATH": ".config/miopen", "MIOPEN_CUSTOM_CACHE_DIR": ".cache/miopen"}
"""Where MIOpen writes without its variables, below the home folder."""
_SIOCGIFADDR = 0x8915
"""From linux/sockios.h: the IPv4 address of an interface."""


@dataclass(frozen=True)
class Answer:
    """The result of one measurement, or why there is none. is_late: it took too long; is_minor: that is no failure."""

    value: Any = None
    error: str | None = None
    is_late: bool = False
    is_minor: bool = False


@dataclass(frozen=True)
class Greeting:
    """What each process tells all others first: its node, where it listens, and the files that it left for them.

    refusals: see `Probe`. token: for rank 0, a `Token` in the run directory. marks: of `Probe.mark_caches`.
    """

    node: str
    device_kind: str
    refusals: tuple[str, str]
    address: str | None
    port: int
    token: Answer
    marks: Answer


@dataclass(frozen=True)
class Token:
    """A folder in the run directory, the text of its file `token`, and the error of locking that file, if any."""

    folder: Path
    text: str
    lock_error: str | None


@dataclass
class Probe:
    """The measurements of this process.

    is_configured: whether there is a config. refusals: why this process cannot use the config, and the device; "" if it
    can. is_stuck: a measurement never returned, and its thread still hangs.
    """

    launch: Launch
    config: Config
    device: torch.device
    run_dir: Path
    is_configured: bool
    refusals: tuple[str, str]
    is_stuck: bool = False
    _temporary: list[Path] = field(default_factory=list)
    _locked: list[int] = field(default_factory=list)

    def ask(self, question: Callable[[], Any], seconds: float = 10.0) -> Answer:
        """Return the result of `question`, which must call no collective operation; an error or a timeout is a result.

        A file system that does not respond blocks a system call forever: only the thread that made it waits.
        """
        answers: list[Answer] = []

        def run() -> None:
            try:
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)  # each thread has a current device of its own
                answers.append(Answer(question()))
            except Refusal as refusal:
                answers.append(Answer(error=str(refusal)))
            except OSError as error:
                where = f"{error.filename}: " if error.filename else ""
                answers.append(Answer(error=f"{where}{error.strerror or error}"))
            except Exception as error:  # noqa: BLE001 (a measurement that breaks is a finding, and must be reported)
                first_line = (str(error).splitlines() or [""])[0]
                answers.append(Answer(error=f"{type(error).__name__}: {first_line}"))

        thread = threading.Thread(target=run, name="doctor", daemon=True)
        thread.start()
        thread.join(seconds)
        if answers:
            return answers[0]
        self.is_stuck = True
        return Answer(error=f"no answer within {seconds:g} s: does a file system or a device hang?", is_late=True)

    @contextmanager
    def temporary_files(self) -> Iterator[None]:
        """Remove the files of this probe at the end."""
        try:
            yield
        finally:
            self.ask(self.remove_files)

    def remove_files(self) -> None:
        """Remove what this probe left for the others to find."""
        while self._locked:
            os.close(self._locked.pop())
        for path in self._temporary:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def greet(self, route: Answer, port: int) -> Greeting:
        """Leave files for the others, and tell them where. route: of `find_route`."""
        return Greeting(
            node=socket.gethostname(),
            device_kind=self.device.type,
            refusals=self.refusals,
            # rank 0 is reached by the name that all know; its own route to itself may be loopback
            address=self.launch.address if self.launch.is_main or route.value is None else route.value[2],
            port=port,
            token=self.ask(self.leave_token) if self.launch.is_main else Answer(),
            marks=self.ask(self.mark_caches),
        )

    def run(self, greetings: list[Greeting], forgotten: Mapping[str, str]) -> dict[str, Answer]:
        """Make all measurements of this process; those about the node are made by its first process only.

        forgotten: see `forget_missing_interfaces`.
        """
        rank, nodes = self.launch.rank, [greeting.node for greeting in greetings]
        first_ranks = {node: nodes.index(node) for node in dict.fromkeys(nodes)}
        listeners = {node: (greetings[first].address, greetings[first].port) for node, first in first_ranks.items()}
        answers = {
            "launch": self.ask(lambda: dataclasses.asdict(self.launch)),
            "device": self.ask(lambda: describe_device(self.device)),
            "processors": self.ask(usable_processors),
            "software": self.ask(lambda: describe_software(self.config, self.device)),
            "unreachable": self.ask(lambda: find_unreachable(listeners), 60.0),
            "limits": self.ask(lambda: describe_limits(self.device)),
        }
        if rank == first_ranks[nodes[rank]]:
            others = [greeting for greeting in greetings if greeting.node != nodes[rank]]
            answers["address"] = self.ask(lambda: describe_address(self.launch, forgotten))
            if rank > 0:
                answers["clock"] = self.ask(lambda: measure_clock_offset(listeners[nodes[0]]))
            answers["shared caches"] = self.ask(lambda: find_shared_caches(others))
            if self.is_configured:
                # different samples on each node and in each call, so that caches help little
                answers["data"] = self.ask(lambda: read_samples(self.config), DATA_SECONDS)
            token = greetings[0].token.value
            if token is not None:
                answers["storage"] = self.ask(lambda: self.examine_folder(token, len(first_ranks)))
        return answers

    def leave_token(self) -> Token:
        """Make a folder in the run directory (or the nearest existing folder above it), with a locked file `token`."""
        token = Token(nearest_folder(self.run_dir) / f"{PREFIX}{secrets.token_hex(8)}", secrets.token_hex(16), None)
        token.folder.mkdir()
        self._temporary.append(token.folder)
        descriptor = os.open(token.folder / "token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._locked.append(descriptor)
        os.write(descriptor, token.text.encode())
        os.fsync(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return dataclasses.replace(token, lock_error=error.strerror)
        return token

    def examine_folder(self, token: Token, nodes: int) -> dict[str, Any]:
        """Return whether this node sees rank 0's token and its lock, the free space, and the speed of writing."""
        folder = nearest_folder(self.run_dir)
        status = os.statvfs(folder)
        free_bytes = status.f_bavail * status.f_frsize
        found = {"sees": False, "folder": str(folder), "free_bytes": free_bytes}
        path = folder / token.folder.name / "token"
        if not wait_until(path.is_file) or path.read_text() != token.text:
            return found
        if self.launch.rank > 0:
            with path.open("rb") as file:
                found["lock"] = try_lock(file.fileno())
        mine = path.with_name(f"node-{self.launch.rank}")
        self._temporary.append(mine)
        rate = measure_write(mine, min(MOST_BYTES, free_bytes // (2 * nodes)))
        return {**found, "sees": True, "write_bytes_per_second": rate}

    def mark_caches(self) -> dict[str, tuple[str, str | None]]:
        """Write a small file into each cache folder (or the nearest existing folder above it).

        Returns {variable: (file, error)}.
        """
        found: dict[str, tuple[str, str | None]] = {}
        for name, folder in cache_folders().items():
            mark, error = nearest_folder(folder) / f"{PREFIX}{secrets.token_hex(8)}", None
            try:
                mark.write_bytes(b"x")
                self._temporary.append(mark)
            except OSError as refused:
                error = refused.strerror
            found[name] = (str(mark), error)
        return found


class ClockServer(socketserver.ThreadingTCPServer):
    """A TCP listener that answers each byte with this node's clock: 8 bytes, seconds since 1970 as a double."""

    daemon_threads, request_queue_size = True, 1024

    def __init__(self, family: socket.AddressFamily):
        self.address_family = family
        super().__init__(("", 0), _ClockHandler)
        self.port: int = self.server_address[1]
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()

    def __exit__(self, *error: Any) -> None:
        self.shutdown()
        super().__exit__(*error)


class _ClockHandler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with suppress(OSError):
            while self.request.recv(1):
                self.request.sendall(struct.pack("d", time.time()))


def find_unreachable(listeners: Mapping[str, tuple[str | None, int]]) -> dict[str, str]:
    """Connect to the listener of each node; return {node: error} of those that did not answer."""

    def connect(listener: tuple[str | None, int]) -> str | None:
        try:
            read_clock(listener)
        except OSError as error:
            return error.strerror or str(error)
        return None

    with ThreadPoolExecutor(min(32, len(listeners))) as pool:
        errors = dict(zip(listeners, pool.map(connect, listeners.values()), strict=True))
    return {node: error for node, error in errors.items() if error is not None}


def read_clock(listener: tuple[str | None, int], rounds: int = 1) -> list[tuple[float, float, float]]:
    """Return (our clock before, the listener's clock, our clock after) for each of a few round trips, in seconds."""
    address, port = listener
    if address is None:
        raise OSError("it has no route to rank 0")
    readings = []
    with socket.create_connection((address, port), timeout=CONNECT_SECONDS) as connection:
        for _ in range(rounds):
            before = time.time()
            connection.sendall(b"?")
            received = connection.recv(8, socket.MSG_WAITALL)
            after = time.time()
            if len(received) < 8:
                raise OSError("the connection was closed without an answer")
            readings.append((before, *struct.unpack("d", received), after))
    return readings


def measure_clock_offset(listener: tuple[str | None, int]) -> tuple[float, float]:
    """Return (offset, uncertainty) in seconds of this node's clock against the listener's (RFC 5905, section 8).

    The listener's reading is taken between our two. When is not known, so half the round trip bounds the error, and
    the shortest of a few round trips counts.
    """
    before, theirs, after = min(read_clock(listener, CLOCK_ROUNDS), key=lambda reading: reading[2] - reading[0])
    return (before + after) / 2 - theirs, (after - before) / 2


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return kind, name, what tells the device from others on the node, and the variables that choose it."""
    built_for = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    found: dict[str, Any] = {
        "kind": device.type,
        "name": "cpu",
        "identity": None,
        "visible": select_variables(VISIBLE_DEVICES),
        "assigned": assigned_devices(),
        "built_for": built_for if torch.version.hip or torch.version.cuda else "built for CPU",
    }
    if device.type == "cuda":
        found["name"] = f"cuda:{device.index} {torch.cuda.get_device_name(device)}"
        # where torch cannot tell devices apart, the variables that chose the device do
        found["identity"] = device_identity(device) or repr((sorted(found["visible"].items()), device.index))
    return found


def usable_processors() -> list[int]:
    """Return the numbers of the processors that this process may run on."""
    if not hasattr(os, "sched_getaffinity"):  # macOS binds nothing
        return list(range(os.cpu_count() or 1))
    return sorted(os.sched_getaffinity(0))


def describe_software(config: Config, device: torch.device) -> dict[str, Mapping[str, str | None]]:
    """Return versions, as people read them, and the facts that must be the same on all ranks for training."""
    program = program_facts(config)
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in PACKAGES}
    versions["torch"] = str(torch.__version__)  # with what it was built for, which its metadata may leave out
    versions["topoflow"] = f"{topoflow.__version__} (sources {program['sources of topoflow'][:8]})"
    versions["CUDA"], versions["ROCm"] = torch.version.cuda, torch.version.hip
    nccl = torch.cuda.nccl.version() if device.type == "cuda" else None
    versions["NCCL"] = ".".join(map(str, nccl)) if nccl else None
    return {"versions": versions, "program": program}


def describe_limits(device: torch.device) -> dict[str, int]:
    """Return the limits on open files, and free shared memory in bytes."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (2**31 if limit == resource.RLIM_INFINITY else limit for limit in limits)
    status = os.statvfs(SHARED_MEMORY)
    return {
        "open_files": soft,
        "hard_open_files": hard,
        "shared_memory_bytes": status.f_bavail * status.f_frsize,
        "on_gpu": device.type == "cuda",
    }


def forget_missing_interfaces() -> dict[str, str]:
    """Take the variables that name no interface here from this process, so that it can meet the others; return them."""
    existing = list(local_addresses())
    forgotten = {
        name: value
        for name, value in select_variables(INTERFACES).items()
        if missing_interfaces(name, value, existing)[1]
    }
    for name in forgotten:
        forget_interface(name)
    return forgotten


def find_route(launch: Launch) -> tuple[socket.AddressFamily, str, str]:
    """Return the family and address of rank 0 as seen here, and this node's own address on the way there."""
    try:
        family, _, _, _, target = socket.getaddrinfo(launch.address, launch.port or 1, type=socket.SOCK_DGRAM)[0]
    except OSError as error:
        raise OSError(f"{launch.address}, rank 0's address, cannot be resolved here: {error.strerror}") from None
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing; chooses a route
        return family, str(target[0]), probe.getsockname()[0]


def describe_address(launch: Launch, forgotten: Mapping[str, str]) -> dict[str, Any]:
    """Return rank 0's address as seen here, the interface that leads to it, its speed, and the interface variables.

    `interface` is None on the node of rank 0; `missing` is {NAME=VALUE: (interfaces that do not exist, is fatal)}.
    """
    _, address, mine = find_route(launch)
    addresses = local_addresses()
    interface = next((name for name, known in addresses.items() if known == mine), f"an interface with {mine}")
    if ipaddress.ip_address(address) == ipaddress.ip_address(mine):
        interface = None
    variables = {**select_variables(INTERFACES), **forgotten}
    missing = {f"{name}={value}": missing_interfaces(name, value, list(addresses)) for name, value in variables.items()}
    return {
        "address": address,
        "interface": interface,
        "link_mbit_s": link_speed(interface) if interface else None,
        "interfaces": list(addresses),
        "missing": {name: found for name, found in missing.items() if found[0]},
    }


def local_addresses() -> dict[str, str | None]:
    """Return {network interface of this node: its IPv4 address, or None}."""
    found: dict[str, str | None] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(answer[20:24])
            except OSError:  # it has no address
                found[name] = None
    return found


def link_speed(interface: str) -> int | None:
    """Return Mbit/s of a network interface, where the system knows."""
    try:
        speed = int((Path("/sys/class/net") / interface / "speed").read_text())
    except (OSError, ValueError):
        return None
    return speed if speed > 0 else None


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
        word
        for word in words
        if not any(interface == word if whole else interface.startswith(word) for interface in existing)
    ]
    return missing, bool(missing) and (name.startswith("GLOO") or len(missing) == len(words))


def cache_folders() -> dict[str, Path]:
    """Return {variable: folder}, as set or by default; MIOpen's defaults only where torch uses it."""
    folders = {"HOME": Path.home(), "TMPDIR": Path(tempfile.gettempdir())}
    if torch.version.hip:
        folders |= {name: Path.home() / default for name, default in _MIOPEN_DEFAULTS.items()}
    return folders | {name: Path(value) for name, value in select_variables(CACHES).items()}


def find_shared_caches(others: list[Greeting]) -> list[str]:
    """Return the variables of MIOpen in whose folder this node sees the mark of another node."""
    marks = [(name, mark) for greeting in others for name, (mark, _) in (greeting.marks.value or {}).items()]
    return sorted({name for name, mark in marks if name in _MIOPEN_DEFAULTS and Path(mark).exists()})


def read_samples(config: Config) -> dict[str, Any]:
    """Open the data set as training does, except for holding it in memory, and read random training samples.

    Returns shape (rows, columns of the grid), fingerprint, open_seconds, samples_per_second, bytes_per_second.
    """
    start = time.monotonic()
    on_disk = dataclasses.replace(config.data, in_memory=False)
    model = config.model
    data = open_forecast_data(on_disk, model.wind != "none", model.terrain != "none", only=("train",))
    names = (*data.input_names, *data.target_names)
    dataset = data.dataset("train", Normalization.from_dict(dict.fromkeys(names, (0.0, 1.0))))
    opened = time.monotonic()
    draws, read = np.random.default_rng(), 0
    while read < MOST_SAMPLES and (read == 0 or time.monotonic() - opened < READ_SECONDS):
        dataset[int(draws.integers(len(dataset)))]
        read += 1
    rate = read / (time.monotonic() - opened)
    data.source.close()
    # fields that change in time, once for the inputs and once for the targets, as float32
    fields = len(set(data.input_names) & set(data.source.dynamic)) + len(data.target_names) + 2 * data.with_wind
    return {
        "shape": tuple(data.grid.shape),
        "fingerprint": data.source.fingerprint,
        "open_seconds": opened - start,
        "samples_per_second": rate,
        "bytes_per_second": rate * 4 * fields * data.grid.shape[0] * data.grid.shape[1],
    }


def nearest_folder(path: Path) -> Path:
    """Return `path`, or the nearest path above it that exists (a file in place of a folder fails where it is used)."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def try_lock(descriptor: int) -> str:
    """Lock a file that another node holds locked: `held` as expected, `taken` if both have it now, or the error."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    except OSError as error:
        return error.strerror or str(error)
    return "taken"


def measure_write(path: Path, most_bytes: int) -> float:
    """Return bytes per second that reach the disk or the server: written in blocks, then fsync."""
    block = secrets.token_bytes(min(BLOCK_BYTES, most_bytes))  # nothing that could be compressed
    written, start = 0, time.monotonic()
    with path.open("xb") as file:
        while written < most_bytes and time.monotonic() - start < WRITE_SECONDS:
            written += file.write(block[: most_bytes - written])
        file.flush()
        os.fsync(file.fileno())
    return written / (time.monotonic() - start)


def wait_until(condition: Callable[[], bool]) -> bool:
    """Return whether the condition becomes true within `VISIBLE_SECONDS`."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
