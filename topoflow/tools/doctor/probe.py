"""What one process measures on its own machine: dicts of plain values, for rank 0 to judge."""

import dataclasses
import fcntl
import importlib.metadata
import os
import platform
import resource
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
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
from topoflow.data.channels import input_channels
from topoflow.data.normalization import Normalization
from topoflow.environment import CACHES, VISIBLE_DEVICES, select_variables
from topoflow.errors import Refusal
from topoflow.launch import Launch, assigned_devices
from topoflow.tools.doctor.network import find_unreachable, measure_clock_offset, serve_clock

PREFIX = ".topoflow-doctor-"
THREAD = "doctor's measurement"
SHARED_MEMORY = Path("/dev/shm")
PACKAGES = ("torch", "numpy", "xarray", "zarr")
DATA_SECONDS, READ_SECONDS, MOST_SAMPLES = 20.0, 2.0, 64
BLOCK_BYTES, MOST_BYTES, WRITE_SECONDS = 4 * 2**20, 32 * 2**20, 3.0
VISIBLE_SECONDS = 3.0
"""How long a node may take to see a file that another has written (network file systems cache folders)."""
MIOPEN_DEFAULTS = {"MIOPEN_USER_DB_PATH": ".config/miopen", "MIOPEN_CUSTOM_CACHE_DIR": ".cache/miopen"}
"""Where MIOpen writes without its variables, below the home folder."""


@dataclass(frozen=True)
class Process:
    """What a process of the job examines.

    refusals: why it cannot use the config, and the device; "" if it can. left: its files and sockets for the others,
    which are removed at the end.
    """

    launch: Launch
    config: Config
    device: torch.device
    run_dir: Path
    is_configured: bool
    refusals: dict[str, str]
    left: ExitStack = field(default_factory=ExitStack)


def ask(question: Callable[..., Any], *arguments: Any, seconds: float = 10.0) -> dict[str, Any]:
    """Return what `question(*arguments)` returns, or {"error": text} if it raises or takes too long (then "is_late").

    It must call no collective operation. A file system that does not respond blocks a system call forever: only the
    thread that made it waits.
    """
    answers: list[dict[str, Any]] = []

    def run() -> None:
        try:
            answers.append(question(*arguments))
        except Refusal as refusal:
            answers.append({"error": str(refusal)})
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            answers.append({"error": f"{where}{error.strerror or error}"})
        except Exception as error:  # noqa: BLE001 (a measurement that breaks is a finding, and must be reported)
            first_line = (str(error).splitlines() or [""])[0]
            answers.append({"error": f"{type(error).__name__}: {first_line}"})

    thread = threading.Thread(target=run, name=THREAD, daemon=True)
    thread.start()
    thread.join(seconds)
    late = {"error": f"no answer within {seconds:g} s: does a file system or a device hang?", "is_late": True}
    return answers[0] if answers else late


def is_stuck() -> bool:
    """Return whether a measurement has not returned yet: its thread may hang forever."""
    return any(thread.name == THREAD for thread in threading.enumerate())


def greet(process: Process, address: dict[str, Any]) -> dict[str, Any]:
    """Listen for the other processes and leave files for them; return where. address: of `describe_address`."""
    launch, left = process.launch, process.left
    listener = socket.create_server(("", 0), family=address.get("family", socket.AF_INET), backlog=1024)
    left.callback(listener.shutdown, socket.SHUT_RDWR)
    threading.Thread(target=serve_clock, args=(listener,), daemon=True).start()
    # rank 0 is reached by the name that all know; its own route to itself may be loopback
    host = launch.address if launch.is_main else address.get("own", "")
    return {
        "node": socket.gethostname(),
        "kind": process.device.type,
        "refusals": process.refusals,
        "address": address,
        "listener": (host, listener.getsockname()[1]),
        "token": ask(leave_token, process.run_dir, left) if launch.is_main else {},
        "caches": ask(mark_caches, left),
    }


def measure(process: Process, greetings: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Make all measurements of this process; those of the node are made by its first process only."""
    launch, config, nodes = process.launch, process.config, [greeting["node"] for greeting in greetings]
    listeners = {node: greetings[nodes.index(node)]["listener"] for node in nodes}
    found = {
        "launch": dataclasses.asdict(launch),
        "device": ask(describe_device, process.device),
        "processors": ask(usable_processors),
        "software": ask(describe_software, config, process.device),
        "unreachable": ask(find_unreachable, listeners, seconds=60.0),
        "limits": ask(describe_limits, process.device),
    }
    if launch.rank == nodes.index(nodes[launch.rank]):
        others = [greeting for greeting in greetings if greeting["node"] != nodes[launch.rank]]
        here = {"offset": 0.0, "uncertainty": 0.0}
        found["clock"] = here if launch.is_main else ask(measure_clock_offset, listeners[nodes[0]])
        found["shared caches"] = ask(find_shared_caches, others)
        if process.is_configured:
            # different samples on each node and in each call, so that caches help little
            found["data"] = ask(read_samples, config, seconds=DATA_SECONDS)
        if "text" in (token := greetings[0]["token"]):
            found["storage"] = ask(examine_folder, process, token, len(listeners))
    return found


# ---- devices, software and limits


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return kind, name, and the variables that choose the device."""
    versions = {"ROCm": torch.version.hip, "CUDA": torch.version.cuda}
    name = f"cuda:{device.index} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "cpu"
    return {
        "kind": device.type,
        "name": name,
        "visible": select_variables(VISIBLE_DEVICES),
        "assigned": assigned_devices(),
        "built_for": next((f"{name} {version}" for name, version in versions.items() if version), "built for CPU"),
    }


def usable_processors() -> dict[str, list[int]]:
    """Return the `numbers` of the processors that this process may run on."""
    if not hasattr(os, "sched_getaffinity"):  # not supported on macOS
        return {"numbers": list(range(os.cpu_count() or 1))}
    return {"numbers": sorted(os.sched_getaffinity(0))}


def describe_software(config: Config, device: torch.device) -> dict[str, Mapping[str, str | None]]:
    """Return `versions`, as people read them, and the facts of `program` that training compares between ranks."""
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
    free = status.f_bavail * status.f_frsize
    return {"soft": soft, "hard": hard, "shared_memory_bytes": free, "on_gpu": device.type == "cuda"}


# ---- file systems: caches, data set, run directory


def mark_caches(left: ExitStack) -> dict[str, tuple[str, str | None]]:
    """Write a small file into each cache folder (or the nearest folder above it); return {variable: (file, error)}."""
    folders = {"HOME": Path.home(), "TMPDIR": Path(tempfile.gettempdir())}
    if torch.version.hip:
        folders |= {name: Path.home() / default for name, default in MIOPEN_DEFAULTS.items()}
    folders |= {name: Path(value) for name, value in select_variables(CACHES).items()}
    found: dict[str, tuple[str, str | None]] = {}
    for name, folder in folders.items():
        mark, error = nearest_folder(folder) / f"{PREFIX}{secrets.token_hex(8)}", None
        try:
            mark.write_bytes(b"x")
            left.callback(mark.unlink, missing_ok=True)
        except OSError as refused:
            error = refused.strerror
        found[name] = (str(mark), error)
    return found


def find_shared_caches(others: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the `names` of MIOpen's variables in whose folder this node sees the mark of another node."""
    marks = [
        (name, greeting["caches"][name][0])
        for greeting in others
        for name in MIOPEN_DEFAULTS.keys() & greeting["caches"].keys()
    ]
    return {"names": sorted({name for name, mark in marks if Path(mark).exists()})}


def read_samples(config: Config) -> dict[str, Any]:
    """Open the data set as training does, and read random training samples.

    Returns shape (rows, columns of the grid), fingerprint, open_seconds, samples_per_second, bytes_per_second.
    """
    start = time.monotonic()
    model = config.model
    data = open_forecast_data(config.data, model.wind != "none", model.terrain != "none", only=("train",))
    names = (*(channel.variable for channel in input_channels(config.data)), *data.target_names)
    dataset = data.dataset("train", Normalization.from_dict(dict.fromkeys(names, (0.0, 1.0))))
    opened = time.monotonic()
    draws, read = np.random.default_rng(), 0
    while read < MOST_SAMPLES and (read == 0 or time.monotonic() - opened < READ_SECONDS):
        dataset[int(draws.integers(len(dataset)))]
        read += 1
    rate = read / (time.monotonic() - opened)
    # fields that change in time, once for the inputs and once for the targets, as float32
    dynamic = [channel for channel in input_channels(config.data) if channel.variable in data.source.dynamic]
    fields = len(dynamic) + len(data.target_names) + 2 * data.with_wind
    return {
        "shape": tuple(data.grid.shape),
        "fingerprint": data.contents.fingerprint,
        "open_seconds": opened - start,
        "samples_per_second": rate,
        "bytes_per_second": rate * 4 * fields * data.grid.shape[0] * data.grid.shape[1],
    }


def leave_token(run_dir: Path, left: ExitStack) -> dict[str, str]:
    """Make a folder in the run directory (or the nearest folder above it), with a locked file `token`.

    Returns the folder, the text of the file, and its lock (see `try_lock`).
    """
    folder, text = nearest_folder(run_dir) / f"{PREFIX}{secrets.token_hex(8)}", secrets.token_hex(16)
    folder.mkdir()
    left.callback(shutil.rmtree, folder, ignore_errors=True)
    file = left.enter_context((folder / "token").open("x"))
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
    return {"folder": str(folder), "text": text, "lock": try_lock(file.fileno())}


def examine_folder(process: Process, token: Mapping[str, str], nodes: int) -> dict[str, Any]:
    """Return whether this node sees rank 0's token and its lock, the free space, and the speed of writing."""
    folder = nearest_folder(process.run_dir)
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    found = {"sees": False, "folder": str(folder), "free_bytes": free, "lock": ""}
    path = folder / Path(token["folder"]).name / "token"
    if not wait_until(path.is_file) or path.read_text() != token["text"]:
        return found
    with path.open("rb") as file:
        lock = try_lock(file.fileno())
    own = path.with_name(f"node-{process.launch.rank}")
    process.left.callback(own.unlink, missing_ok=True)
    return {**found, "sees": True, "lock": lock, "rate": measure_write(own, min(MOST_BYTES, free // (2 * nodes)))}


def find_written(folder: str, ranks: Sequence[int]) -> dict[str, list[int]]:
    """Return the `ranks` whose file appears in rank 0's folder within `VISIBLE_SECONDS`."""

    def seen() -> list[int]:
        return [rank for rank in ranks if Path(folder, f"node-{rank}").is_file()]

    wait_until(lambda: len(seen()) == len(ranks))
    return {"ranks": seen()}


def nearest_folder(path: Path) -> Path:
    """Return `path`, or the nearest path above it that exists (a file in place of a folder fails where it is used)."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def try_lock(descriptor: int) -> str:
    """Lock a file: `taken`, `held` if another has it locked, or the error."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    except OSError as error:
        return error.strerror or str(error)
    return "taken"


def measure_write(path: Path, most_bytes: int) -> float:
    """Return bytes per second that reach the disk or the server: written in blocks, then fsync."""
    block = secrets.token_bytes(min(BLOCK_BYTES, most_bytes))  # not compressible
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
