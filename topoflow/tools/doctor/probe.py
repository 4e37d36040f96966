"""A process that examines its machine, and its first checks: ranks, devices, CPUs, software, limits."""

import copy
import importlib.metadata
import os
import platform
import resource
import secrets
import shutil
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.cuda.nccl

import topoflow
from topoflow.build import program_facts
from topoflow.config import Config, DataConfig, ModelConfig, RunConfig, TrainConfig
from topoflow.data.sampling import BatchPlan
from topoflow.environment import VISIBLE_DEVICES, select_variables
from topoflow.errors import ConfigError, Refusal
from topoflow.launch import Launch, assigned_devices
from topoflow.model.topoflow import TopoFlow
from topoflow.reduction import require_whole_subtrees
from topoflow.text import number_ranges, shorten
from topoflow.tools.doctor.report import FAIL, OK, WARNING, Finding, Found, format_value

THREAD = "doctor's measurement"
PACKAGES = ("torch", "numpy", "xarray", "zarr")
OPEN_FILES = 128
"""What a process has open at a time."""
NCCL_BYTES = 64 * 2**20
"""Shared memory that NCCL takes for a process on a GPU, at its defaults."""
SMALL = Config(
    run=RunConfig(dir="."),
    data=DataConfig(path="none", train=(2000,), threads=2),
    train=TrainConfig(max_steps=1),
    model=ModelConfig(embed_dim=64, depth=2, num_heads=4),
)
"""What is examined without a config."""
Question = Callable[["Process", Found], None]
"""Measures for a check, and adds to what was found for it."""


@dataclass
class Process:
    """A process of the job, and what it knows. The first one of a node also measures for the node."""

    launch: Launch
    config: Config
    device: torch.device
    host: str = field(default_factory=socket.gethostname)
    config_refusal: str = ""
    device_refusal: str = ""
    """Why it cannot use the config, and the device; empty if it can."""
    mark: str = field(default_factory=lambda: f".topoflow-doctor-{secrets.token_hex(8)}")
    """Name of the files that it leaves for others to see."""
    left: ExitStack = field(default_factory=ExitStack)
    """Removes these files, and sockets, at the end."""
    found: dict[str, Found] = field(default_factory=dict)
    """By check."""
    ranks_of: dict[str, list[int]] = field(default_factory=dict)
    """The ranks of each node, by host."""
    others: list[dict[str, Any]] = field(default_factory=list)
    """The introductions of all ranks, this one too."""
    grid_shape: tuple[int, int] = (0, 0)
    """Rows and columns."""
    model: TopoFlow | None = None

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run.dir).absolute()

    @property
    def leaders(self) -> list[int]:
        """Return the first rank of each node."""
        return [ranks[0] for ranks in self.ranks_of.values()]

    @property
    def is_leader(self) -> bool:
        return self.launch.rank in self.leaders

    def introduction(self) -> dict[str, Any]:
        """Return what all processes need to know of this one."""
        numbers = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)  # macOS
        listener = self.found["addresses"].facts.get("listener")
        ranks = {"local_rank": self.launch.local_rank, "processors": [*numbers]}
        return {**ranks, "mark": self.mark, "listener": listener}

    def measure(self, name: str, question: Question, seconds: float = 10.0, late: Finding | None = None) -> None:
        """Ask a question for a check, unless an earlier one for it has failed. seconds, late: see `attempt`."""
        known = self.found.get(name, Found())
        if not known.has_failed:
            found = copy.deepcopy(known)
            problems = attempt(lambda: question(self, found), seconds, late)
            failed = replace(known, findings=known.findings + problems, has_failed=True)
            self.found[name] = failed if problems else found


def attempt(action: Callable[[], object], seconds: float = 10.0, late: Finding | None = None) -> list[Finding]:
    """Return why an action failed, or `late` if it takes longer (by default a failure); nothing if it succeeds.

    It must call no collective operation. A file system that does not respond blocks a system call forever: only the
    thread that made it waits.
    """
    ends: list[list[Finding]] = []

    def run() -> None:
        try:
            action()
            ends.append([])
        except Refusal as refusal:
            ends.append([(FAIL, str(refusal))])
        except Exception as error:  # noqa: BLE001 (a measurement that breaks is a finding, and must be reported)
            ends.append([(FAIL, f"{type(error).__name__}: {error}".partition("\n")[0])])

    thread = threading.Thread(target=run, name=THREAD, daemon=True)
    thread.start()
    thread.join(seconds)
    late = late or (FAIL, f"no answer within {seconds:g} s: does a file system or a device hang?")
    return ends[0] if ends else [late]


def is_stuck() -> bool:
    """Return whether an attempt has not ended yet: its thread may hang forever."""
    return any(thread.name == THREAD for thread in threading.enumerate())


def check_ranks(process: Process, found: Found) -> None:
    """Check that ranks have complete numbers and the same launcher, and can share the global batch."""
    launch, config, ranks_of = process.launch, process.config, process.ranks_of
    here = ranks_of[process.host]
    local_ranks, claimed = sorted(process.others[rank]["local_rank"] for rank in here), launch.local_world_size
    if claimed != len(here) or len(set(local_ranks)) < len(here):
        text = f"the launcher reports {claimed} process(es) on this node, found {len(here)}"
        found.find(FAIL, f"{text}, with local ranks {shorten(local_ranks)}: is LOCAL_RANK exported by hand?")
    if launch.idle_tasks > 0:
        found.find(
            WARNING, f"one process, but SLURM job {launch.job} has {launch.idle_tasks + 1} tasks: start it with srun"
        )
    size, micro, world_size = config.train.global_batch_size, config.train.micro_batch_size, launch.world_size
    try:
        if config is not SMALL:
            BatchPlan(size, config.run.seed, size, micro, rank=0, world_size=world_size)
        if config.distributed.reduction == "canonical":
            require_whole_subtrees(size // micro, world_size)
    except ConfigError as error:
        found.find(FAIL, str(error))
    found.same |= {"launcher": launch.launcher, "world_size": launch.world_size, "job": launch.job}
    each = number_ranges({len(ranks) for ranks in ranks_of.values()})
    where = f"{launch.world_size} process(es) on {len(ranks_of)} node(s), {each} on each"
    found.summary = f"{where}; launcher: {launch.launcher} ({launch.reason})"


def check_device(process: Process, found: Found) -> None:
    """Check that this process has the intended device. That no two share one is checked when they meet."""
    device, assigned = process.device, assigned_devices()
    if process.device_refusal:
        found.find(FAIL, process.device_refusal)
    elif device.type == "cpu" and assigned:
        built = f"built for CUDA {torch.version.cuda}, ROCm {torch.version.hip}"
        found.find(WARNING, f"{assigned}, but torch {torch.__version__} ({built}) sees no GPU: it computes on the CPU")
    name = f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "cpu"
    visible = select_variables(VISIBLE_DEVICES)
    found.figures |= {"devices": name, "visible": visible}
    found.summary = f"{name}; set for the process: {', '.join(visible) or 'no visible-devices variable'}"


def check_processors(process: Process, found: Found) -> None:
    """Check that this process shares no CPUs with others, and has enough for its loader threads."""
    rank, needed, here = process.launch.rank, 1 + process.config.data.threads, process.ranks_of[process.host]
    usable = {other: set(process.others[other]["processors"]) for other in here}
    union, own = set().union(*usable.values()), usable.pop(rank)
    is_bound = not usable or any(cpus != own for cpus in usable.values())
    each = min(map(len, [own, *usable.values()])) if is_bound else len(union) / len(here)
    sharing = {other: own & cpus for other, cpus in usable.items() if own & cpus}
    if sharing and (is_bound or process.launch.launcher == "srun"):
        cpus, ranks = number_ranges(set().union(*sharing.values())), number_ranges([rank, *sharing])
        found.find(WARNING, f"ranks {ranks} share CPU(s) {cpus}: bind each (--cpu-bind=cores)")
    if each < needed:
        text = f"{each:.3g} CPU(s) per process for the training and data.threads={needed - 1}: give {needed}"
        found.find(WARNING, f"{text} (--cpus-per-task), or use fewer threads")
    found.figures |= {"processors": len(union), "processors_per_process": each, "bound": is_bound}
    how = "usable by each" if is_bound else "shared by all processes of a node (none is bound)"
    found.summary = f"{each:.3g} per process, {how}"


def check_software(process: Process, found: Found) -> None:
    """Collect what must be equal on all ranks: versions, drivers, and what training compares between ranks."""
    program = program_facts(process.config)
    nccl = torch.cuda.nccl.version() if process.device.type == "cuda" else None
    versions = {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "torch": str(torch.__version__),  # with what it was built for, which its metadata may leave out
        "topoflow": f"{topoflow.__version__} (sources {program['sources of topoflow'][:8]})",
        "CUDA": torch.version.cuda,
        "ROCm": torch.version.hip,
        "NCCL": ".".join(map(str, nccl)) if nccl else None,
    }
    found.same |= {**program, **versions}
    found.figures["software"] = versions
    found.summary = ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def check_limits(process: Process, found: Found) -> None:
    """Check that open files and shared memory suffice for the number of processes."""
    size, count = process.launch.world_size, len(process.ranks_of[process.host])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (2**31 if limit == resource.RLIM_INFINITY else limit for limit in limits)
    # rank 0 has two sockets for each process, and raises its soft limit for them
    limit, files = (hard, OPEN_FILES + 2 * size) if process.launch.is_main else (soft, OPEN_FILES)
    why = f"about {files} are needed for {size} process(es)"
    text = f"at most {limit} open files per process, {why}: raise it (ulimit -n {max(4096, 4 * files)})"
    found.find(FAIL if limit < files else WARNING if limit < 2 * files else OK, text)
    needed = count * NCCL_BYTES if process.device.type == "cuda" else 0
    free = shutil.disk_usage("/dev/shm").free
    room = f"{format_value(free, 'B')} free, {format_value(needed, 'B')} are needed for NCCL in {count} process(es)"
    found.find(FAIL if free < needed else OK, f"/dev/shm has {room}: enlarge it")
    found.figures |= {"open_files": soft, "shared_memory_bytes": free, "shared_memory_needed_bytes": needed}
    found.summary = f"{limit} open files, {why}; /dev/shm: {room}"
