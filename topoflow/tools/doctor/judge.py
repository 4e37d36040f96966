"""Rank 0's judgement of what all processes measured: one function per check."""

import ipaddress
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topoflow.config import Config
from topoflow.data.sampling import BatchPlan
from topoflow.errors import ConfigError
from topoflow.reduction import require_whole_subtrees
from topoflow.text import number_ranges, shorten
from topoflow.tools.doctor.probe import SHARED_MEMORY, Answer, Greeting, Token, wait_until
from topoflow.tools.doctor.report import FAIL, WARNING, Check, Finding, format_bytes, format_rate, format_seconds
from topoflow.tools.doctor.trial import ModelTrial

SLOW_DISK_SHARE = SLOW_DATA_SHARE = 0.25
"""A node that writes or reads at less than this share of the median stands out."""
SLOW_NETWORK_SHARE, FAILED_NETWORK_SHARE = 0.5, 0.2
CLOCK_WARNING_SECONDS, CLOCK_FAIL_SECONDS = 0.1, 1.0
SLOW_PASS_FACTOR, SLOW_PASS_SECONDS, PASS_SECONDS = 1.5, 0.05, 20.0
"""A process that takes so much longer than the median, and at least so many seconds more, stands out."""
SAME_LOSS = {"fp32": 1e-3, "bf16": 2e-2}
"""Relative difference of the loss, equal on all processes, that rounding explains."""
FULL_MEMORY_SHARE = 0.9
"""Of the device's memory; optimizer and communication need some too."""
_OWN_FILES, _FILES_PER_LOADER, _FILES_PER_WORKER = 128, 2, 4
_PAGES_PER_LOADER, _PAGES_PER_WORKER, _PAGE_BYTES = 7, 2, 4096
"""What a loader and each of its workers keep in /dev/shm: a page per semaphore (batches are in anonymous memory)."""
_LOADERS = 2
"""Training and validation."""
_NCCL_BYTES = 64 * 2**20
"""Shared memory that NCCL takes for a process on a GPU, at its defaults."""


@dataclass(frozen=True)
class Group:
    """All processes, by node, and what each answered: {name of the measurement: answer} per rank."""

    node_of: list[str]
    answers: list[dict[str, Answer]]

    @property
    def ranks_of(self) -> dict[str, list[int]]:
        """{node: its ranks}, in the order of ranks."""
        ranks_of: dict[str, list[int]] = {}
        for rank, node in enumerate(self.node_of):
            ranks_of.setdefault(node, []).append(rank)
        return ranks_of

    def values(self, name: str) -> dict[int, Any]:
        """Return {rank: result} of a measurement, where there is one."""
        return {r: held[name].value for r, held in enumerate(self.answers) if name in held and held[name].error is None}

    def failures(self, name: str, whole_node: bool = False) -> list[Finding]:
        """Return a finding for each process on which a measurement failed."""
        errors = {rank: answers[name].error for rank, answers in enumerate(self.answers) if name in answers}
        return [self.find(FAIL, rank, error, whole_node) for rank, error in errors.items() if error is not None]

    def find(self, verdict: str, rank: int, text: str, whole_node: bool = True) -> Finding:
        """Return a finding on a process's node, or only on the process."""
        node = self.node_of[rank]
        return Finding(verdict, node, tuple(self.ranks_of[node]) if whole_node else (rank,), text)

    def find_all(self, verdict: str, text: str) -> list[Finding]:
        """Return the same finding for every node."""
        return [Finding(verdict, node, tuple(ranks), text) for node, ranks in self.ranks_of.items()]


def judge_config(group: Group, refusals: Mapping[int, str]) -> Check:
    """Report the processes that cannot use the config. refusals: {rank: why}."""
    findings = [group.find(FAIL, rank, text, whole_node=False) for rank, text in refusals.items()]
    return Check("config", "cannot be used: nothing else was examined", findings)


def judge_ranks(group: Group, config: Config, is_configured: bool) -> Check:
    """All processes report the same launcher, are numbered without a gap, and can share the configured batch."""
    launches = group.values("launch")
    check = Check("ranks", findings=group.failures("launch"))
    for node, ranks in group.ranks_of.items():
        here = [launches[rank] for rank in ranks if rank in launches]
        local_ranks, claimed = (
            [launch["local_rank"] for launch in here],
            {launch["local_world_size"] for launch in here},
        )
        if len(set(local_ranks)) < len(local_ranks):
            text = f"local ranks {shorten(sorted(local_ranks))}: expected each once; is LOCAL_RANK exported by hand?"
            check.findings.append(Finding(FAIL, node, tuple(ranks), text))
        if claimed != {len(ranks)}:
            text = f"the launcher reports {shorten(sorted(claimed))} process(es) on this node, found {len(ranks)}"
            check.findings.append(Finding(FAIL, node, tuple(ranks), text))
    main = launches.get(0) or next(iter(launches.values()))
    for rank, launch in launches.items():
        for name in ("launcher", "world_size", "job"):
            if launch[name] != main[name]:
                text = f"{name} is {launch[name]!r}, on rank 0 {main[name]!r}: start all with one launcher"
                check.findings.append(group.find(FAIL, rank, text, whole_node=False))
    if main["idle_tasks"] > 0:
        text = f"one process, but SLURM job {main['job']} has {main['idle_tasks'] + 1} tasks: start it with srun"
        check.findings += group.find_all(WARNING, text)
    if is_configured:
        size, micro = config.train.global_batch_size, config.train.micro_batch_size
        try:
            BatchPlan(size, config.run.seed, size, micro, rank=0, world_size=main["world_size"])
            if config.distributed.reduction == "canonical":
                require_whole_subtrees(size // micro, main["world_size"])
        except ConfigError as error:
            check.findings += group.find_all(FAIL, str(error))
    per_node = sorted({len(ranks) for ranks in group.ranks_of.values()})
    each = " to ".join(map(str, [per_node[0], per_node[-1]][: len(per_node)]))
    count = f"{main['world_size']} process(es) on {len(group.ranks_of)} node(s), {each} on each"
    check.summary = f"{count}; launcher: {main['launcher']} ({main['reason']})"
    return check


def judge_devices(group: Group, refusals: Mapping[int, str]) -> Check:
    """Each process has a device of its own, and the intended one. refusals: {rank: why it has none}."""
    devices = group.values("device")
    check = Check("devices", findings=group.failures("device"))
    for rank, found in devices.items():
        if rank in refusals:
            check.findings.append(group.find(FAIL, rank, refusals[rank], whole_node=False))
        elif found["kind"] == "cpu" and found["assigned"]:
            text = f"{found['assigned']}, but torch ({found['built_for']}) sees no GPU: it computes on the CPU"
            check.findings.append(group.find(WARNING, rank, text, whole_node=False))
    for node, ranks in group.ranks_of.items():
        here = {rank: devices[rank] for rank in ranks if rank in devices}
        names, visible = [found["name"] for found in here.values()], [found["visible"] for found in here.values()]
        check.note(node, devices=names, visible=visible)
        users: dict[str, list[int]] = {}
        for rank, found in here.items():
            users.setdefault(found["identity"] or f"rank {rank}", []).append(rank)
        for sharing in (sharing for sharing in users.values() if len(sharing) > 1):
            text = (
                f"ranks {number_ranges(sharing)} have one device, {here[sharing[0]]['name']}: expected one process per "
                "device; look at --gpus-per-task and the visible-devices variables"
            )
            check.findings.append(Finding(FAIL, node, tuple(sharing), text))
    counts = Counter(found["name"].partition(" ")[2] or "cpu" for found in devices.values())
    chosen_by = sorted({name for found in devices.values() for name in found["visible"]})
    check.summary = ", ".join(f"{count} x {name}" for name, count in counts.items())
    check.summary += f"; set for the processes: {', '.join(chosen_by) or 'no visible-devices variable'}"
    return check


def judge_processors(group: Group, workers: int) -> Check:
    """The processes of a node do not share CPUs, and have enough for their loader processes."""
    usable = group.values("processors")
    check = Check("CPUs", findings=group.failures("processors"))
    for node, ranks in group.ranks_of.items():
        bound = {rank: frozenset(usable[rank]) for rank in ranks if rank in usable}
        if not bound:
            continue
        union = frozenset().union(*bound.values())
        unbound = len(bound) > 1 and len(set(bound.values())) == 1
        each = len(union) / len(bound) if unbound else min(map(len, bound.values()))
        check.note(node, processors=len(union), processors_per_process=each, bound=not unbound)
        shared: dict[tuple[int, ...], list[int]] = {}
        for processor in union:
            shared.setdefault(tuple(rank for rank in bound if processor in bound[rank]), []).append(processor)
        if unbound and group.values("launch").get(ranks[0], {}).get("launcher") == "srun":
            text = (
                f"all {len(bound)} processes may run on the same {len(union)} CPU(s): bind them with "
                "srun --cpus-per-task=N --cpu-bind=cores"
            )
            check.findings.append(Finding(WARNING, node, tuple(bound), text))
        for users, processors in shared.items() if not unbound else ():
            if len(users) > 1:
                text = f"ranks {number_ranges(users)} share CPU(s) {number_ranges(processors)}: bind each to its own"
                check.findings.append(Finding(WARNING, node, users, text))
        if each < 1 + workers:
            text = (
                f"{round(each, 1):g} CPU(s) per process for the training and data.workers={workers}: "
                f"give {1 + workers} (--cpus-per-task), or lower data.workers"
            )
            check.findings.append(Finding(WARNING, node, tuple(bound), text))
    counts = sorted({round(figures["processors_per_process"], 1) for figures in check.figures.values()})
    free = any(not figures["bound"] for figures in check.figures.values())
    how = (
        "shared by all processes of a node (none is bound)" if free else "none shared" if len(usable) > 1 else "usable"
    )
    check.summary = (
        f"{' to '.join(f'{count:g}' for count in dict.fromkeys([counts[0], counts[-1]]))} per process, {how}"
    )
    return check


def judge_software(group: Group) -> Check:
    """Versions, drivers, sources, threads and config are equal on all ranks, as training demands."""
    software = group.values("software")
    check = Check("software", findings=group.failures("software"))
    held = {rank: {**found["program"], **found["versions"]} for rank, found in software.items()}
    for name in dict.fromkeys(name for facts in held.values() for name in facts):
        usual, count = Counter(facts.get(name) for facts in held.values()).most_common(1)[0]
        for rank, facts in held.items():
            if facts.get(name) != usual:
                text = f"{name} is {facts.get(name)}, on {count} other process(es) {usual}: expected the same on all"
                check.findings.append(group.find(FAIL, rank, text, whole_node=False))
    for node, ranks in group.ranks_of.items():
        if ranks[0] in software:
            check.note(node, software=software[ranks[0]]["versions"])
    first = next(iter(software.values()))["versions"] if software else {}
    check.summary = ", ".join(f"{name} {version}" for name, version in first.items() if version)
    return check


def judge_addresses(group: Group, address: str, port: int) -> Check:
    """Each node resolves rank 0's address to one that others can reach, and the named interfaces exist."""
    found_by = group.values("address")
    check = Check("addresses", findings=group.failures("address", whole_node=True))
    home, others = group.node_of[0], {r: item["address"] for r, item in found_by.items() if r > 0}
    usual = max(set(others.values()), key=list(others.values()).count, default=None)
    for rank, found in found_by.items():
        interface = found["interface"] or "the node itself"
        check.note(group.node_of[rank], address=found["address"], interface=interface, link_mbit_s=found["link_mbit_s"])
        for variable, (missing, is_fatal) in found["missing"].items():
            text = f"{variable}: no interface {', '.join(missing)}: expected one of {', '.join(found['interfaces'])}"
            check.findings.append(group.find(FAIL if is_fatal else WARNING, rank, text))
        if len(group.ranks_of) > 1 and ipaddress.ip_address(found["address"]).is_loopback:
            text = (
                f"{address} is {found['address']} on this node, which reaches only itself: expected an address "
                "that all nodes reach; look at /etc/hosts"
            )
            # on rank 0's own node that is usual (Debian), and harmless if the others resolve it to another address
            check.findings.append(group.find(WARNING if group.node_of[rank] == home else FAIL, rank, text))
        if rank > 0 and found["address"] != usual:
            text = f"rank 0's address is {found['address']} here, elsewhere {usual}"
            check.findings.append(group.find(WARNING, rank, text))
    interfaces = {(item["interface"], item["link_mbit_s"]) for item in found_by.values() if item["interface"]}
    shown = [name + (f" ({speed / 1000:g} Gbit/s)" if speed else "") for name, speed in sorted(interfaces, key=str)]
    check.summary = f"rank 0 is at {address}:{port}, reached through {', '.join(shown) or 'the node itself'}"
    if len(group.node_of) == 1:
        check.summary = "one process: no others to reach"
    return check


def judge_clocks(group: Group) -> Check:
    """Each node's clock agrees with rank 0's, or with most others where there are more than two."""
    found = {0: (0.0, 0.0), **group.values("clock")}
    # of two clocks nobody knows which one is wrong
    by_most = len(found) > 2
    usual = statistics.median(offset for offset, _ in found.values()) if by_most else 0.0
    check = Check("clocks", findings=group.failures("clock", whole_node=True))
    for rank, (offset, uncertainty) in found.items():
        check.note(group.node_of[rank], clock_offset_seconds=offset - usual, clock_uncertainty_seconds=uncertainty)
        least = abs(offset - usual) - uncertainty
        if least > CLOCK_WARNING_SECONDS:
            way = "ahead of" if offset > usual else "behind"
            apart = f"{abs(offset - usual):.3f} s {way} {'most others' if by_most else 'that of rank 0'}"
            text = f"the clock is {apart}: synchronize it (chronyc tracking, timedatectl)"
            check.findings.append(group.find(FAIL if least > CLOCK_FAIL_SECONDS else WARNING, rank, text))
    offsets, worst_ms = [offset for offset, _ in found.values()], 1e3 * max(error for _, error in found.values())
    check.summary = f"at most {(max(offsets) - min(offsets)) * 1e3:.1f} ms apart (measured to within {worst_ms:.1f} ms)"
    if len(group.ranks_of) == 1:
        check.summary = "one node, one clock"
    return check


def judge_caches(group: Group, greetings: list[Greeting], compiles: bool) -> Check:
    """Home, temporary and cache folders can be written, and no other node writes to MIOpen's (it gets corrupted)."""
    check = Check("caches", findings=group.failures("shared caches", whole_node=True))
    for ranks in group.ranks_of.values():
        rank = ranks[0]
        marks, shared = greetings[rank].marks, group.values("shared caches").get(rank, [])
        if marks.error is not None:
            check.findings.append(group.find(FAIL, rank, marks.error))
            continue
        folders = {name: str(Path(mark).parent) for name, (mark, _) in marks.value.items()}
        check.note(group.node_of[rank], caches=folders)
        check.summary = check.summary or ", ".join(f"{name} {folder}" for name, folder in folders.items())
        for name, (_, error) in marks.value.items():
            if error is not None:
                is_needed = name == "TMPDIR" or (compiles and name.startswith(("TORCHINDUCTOR", "TRITON")))
                text = f"{name}, {folders[name]}: cannot be written ({error}): set {name} to a writable folder"
                check.findings.append(group.find(FAIL if is_needed else WARNING, rank, text))
        for name in shared:
            text = (
                f"{name}, {folders.get(name)}: other nodes write there too, and a shared cache of MIOpen gets "
                "corrupted: set it to a folder of the node's own, in /tmp"
            )
            check.findings.append(group.find(WARNING, rank, text))
    return check


def judge_data(group: Group, config: Config, is_configured: bool) -> tuple[Check, tuple[int, int]]:
    """The data set is readable and the same on all nodes. Returns the grid's shape too (a default without data)."""
    check, patch = Check("data", findings=group.failures("data", whole_node=True)), config.model.patch_size
    shape = tuple(config.model.img_size or (12 * patch, 16 * patch))
    looks = group.values("data")
    if not is_configured:
        check.summary = f"no CONFIG: not examined; a grid of {shape[0]} x {shape[1]} cells for what follows"
    elif not looks:
        check.summary = f"{config.data.path}: not readable anywhere"
    if not looks:
        return check, shape
    usual = Counter(look["fingerprint"] for look in looks.values()).most_common(1)[0][0]
    median = statistics.median(look["samples_per_second"] for look in looks.values())
    for rank, look in looks.items():
        figures = ("samples_per_second", "bytes_per_second", "open_seconds")
        check.note(group.node_of[rank], **{f"data_{name}": look[name] for name in figures})
        if look["fingerprint"] != usual:
            text = f"{config.data.path} has other contents than on most nodes: expected the same data set on all"
            check.findings.append(group.find(FAIL, rank, text))
        if look["samples_per_second"] < SLOW_DATA_SHARE * median:
            rate = f"{look['samples_per_second']:.3g} samples/s, the median node {median:.3g}"
            check.findings.append(group.find(WARNING, rank, f"reads {rate}: look at its mount and its network"))
    rows, columns = next(iter(looks.values()))["shape"]
    if config.model.img_size is not None and shape != (rows, columns):
        text = f"model.img_size: {list(shape)}: expected the data's {[rows, columns]}"
        check.findings += group.find_all(FAIL, text)
    slowest = min(looks.values(), key=lambda look: look["samples_per_second"])
    check.summary = (
        f"{config.data.path}: {rows} x {columns} cells; random samples, one process per node: "
        f"{slowest['samples_per_second']:.3g} samples/s ({format_rate(slowest['bytes_per_second'])}) or more; caches "
        "may flatter"
    )
    return check, (rows, columns)


def judge_limits(group: Group, workers: int) -> Check:
    """Open files and shared memory suffice for data.workers and the number of processes."""
    limits, devices = group.values("limits"), group.values("device")
    files = _OWN_FILES + _LOADERS * (_FILES_PER_LOADER + workers * _FILES_PER_WORKER)
    pages = _LOADERS * (_PAGES_PER_LOADER + workers * _PAGES_PER_WORKER) if workers else 0
    check = Check("limits", findings=group.failures("limits"))
    for rank, found in limits.items():
        # rank 0 has two sockets for each process, and raises its soft limit for them
        world_size = len(group.node_of)
        kind, needed = ("hard_open_files", files + 2 * world_size) if rank == 0 else ("open_files", files)
        if found[kind] < 2 * needed:
            text = (
                f"at most {found[kind]} open files per process, about {needed} are needed for {world_size} process(es) "
                f"and data.workers={workers}: raise it (ulimit -n {max(4096, 4 * needed)})"
            )
            verdict = FAIL if found[kind] < needed else WARNING
            check.findings.append(group.find(verdict, rank, text, whole_node=False))
    for node, ranks in group.ranks_of.items():
        if ranks[0] not in limits:
            continue
        on_gpu = sum(devices.get(rank, {}).get("kind") == "cuda" for rank in ranks)
        free, needed = limits[ranks[0]]["shared_memory_bytes"], len(ranks) * pages * _PAGE_BYTES + on_gpu * _NCCL_BYTES
        check.note(node, open_files=min(limits[rank]["open_files"] for rank in ranks if rank in limits))
        check.note(node, shared_memory_bytes=free, shared_memory_needed_bytes=needed)
        if free < needed:
            text = (
                f"{SHARED_MEMORY} has {format_bytes(free)} free, {format_bytes(needed)} are needed for the semaphores "
                f"of data.workers={workers}{' and for NCCL' if on_gpu else ''} in {len(ranks)} process(es): enlarge it"
            )
            check.findings.append(group.find(FAIL, ranks[0], text))
    least = min((found["open_files"] for found in limits.values()), default=0)
    free = min((found["shared_memory_bytes"] for found in limits.values()), default=0)
    needed = max((figures["shared_memory_needed_bytes"] for figures in check.figures.values()), default=0)
    check.summary = (
        f"{least} open files per process (about {files} needed); {SHARED_MEMORY} {format_bytes(free)} free "
        f"({format_bytes(needed)} needed)"
    )
    return check


def judge_storage(group: Group, token: Answer, run_dir: Path, checkpoint_bytes: int, kept: int) -> Check:
    """The run directory has room and speed, all nodes see the same one, and locks reach from node to node.

    token: of rank 0's greeting; checkpoint_bytes: size of one checkpoint; kept: how many there are at most at a time.
    """
    check = Check("run directory", findings=group.failures("storage", whole_node=True))
    if token.error is not None:
        check.findings.append(group.find(FAIL, 0, token.error))
        check.summary = f"{run_dir}: rank 0 cannot make a file there; not examined on other nodes"
        return check
    left: Token = token.value
    here, looks = left.folder.parent, group.values("storage")
    rates = {rank: look["write_bytes_per_second"] for rank, look in looks.items() if look["sees"]}
    median = statistics.median(rates.values()) if rates else 0.0
    if left.lock_error is not None:
        check.findings.append(group.find(WARNING, 0, f"no flock here ({left.lock_error}): {_GUARDED}"))
    for rank, look in looks.items():
        check.note(group.node_of[rank], free_bytes=look["free_bytes"], sees_run_directory=look["sees"])
        free, lock = look["free_bytes"], look.get("lock", "held")
        if not look["sees"]:
            text = f"{here} is not that of rank 0, whose file is not in it: expected one file system for all nodes"
            if Path(look["folder"]) != here:
                text = f"there is no {here} (nearest: {look['folder']}): mount the same file system on all nodes"
            check.findings.append(group.find(FAIL, rank, text))
        elif not wait_until((left.folder / f"node-{rank}").is_file):
            text = f"what is written to {here} never appears on rank 0's node: expected one file system"
            check.findings.append(group.find(FAIL, rank, text))
        if lock != "held" and left.lock_error is None:
            reason = "rank 0's flock is not seen" if lock == "taken" else f"no flock ({lock})"
            text = f"{reason} here: {_GUARDED}; mount with cluster-wide locks (Lustre: -o flock)"
            check.findings.append(group.find(WARNING, rank, text))
        if free < checkpoint_bytes * kept:
            each = format_bytes(checkpoint_bytes)
            text = f"{format_bytes(free)} free: a checkpoint takes {each}, and up to {kept} exist at a time: make room"
            check.findings.append(group.find(FAIL if free < checkpoint_bytes else WARNING, rank, text))
        if rank in rates:
            check.note(group.node_of[rank], write_bytes_per_second=rates[rank])
            if rates[rank] < SLOW_DISK_SHARE * median:
                rate = f"{format_rate(rates[rank])}, the median node {format_rate(median)}"
                check.findings.append(group.find(WARNING, rank, f"writes {rate}: look at its mount and its network"))
    check.summary = f"{here}" if here == run_dir.absolute() else f"{run_dir.absolute()} does not exist: examined {here}"
    if looks:
        free = format_bytes(min(look["free_bytes"] for look in looks.values()))
        check.summary += f"; {free} free, a checkpoint takes {format_bytes(checkpoint_bytes)}"
    if rates:
        check.summary += f"; written with fsync, all nodes at once: {format_rate(min(rates.values()))} or more"
    return check


_GUARDED = "only the generation of the lease keeps out a process that lost the run directory"


def judge_connections(group: Group) -> Check:
    """Report the pairs of nodes of which one cannot connect to the other. Without a finding, the network is usable."""
    check = Check("network", "some nodes cannot connect to each other: nothing was sent", group.failures("unreachable"))
    ranks_with: dict[tuple[str, str], list[int]] = {}
    errors: dict[tuple[str, str], str] = {}
    for rank, failed in group.values("unreachable").items():
        for node, error in failed.items():
            ranks_with.setdefault((group.node_of[rank], node), []).append(rank)
            errors[group.node_of[rank], node] = error
    for (node, other), ranks in ranks_with.items():
        text = f"no TCP connection from {node} to {other}: {errors[node, other]}: look at routes, firewalls and cables"
        check.findings.append(Finding(FAIL, node, tuple(ranks), text))
    return check


def judge_network(group: Group, gradient_bytes: int) -> Check:
    """No node is much slower than the others; the summary has the time of an all-reduce of the gradient."""
    check, world_size = Check("network"), len(group.node_of)
    if world_size == 1:
        check.summary = "one process: nothing is sent"
        return check
    seconds, size = group.values("all-reduce")[0]
    part = "" if size == gradient_bytes else f" ({format_bytes(size)} of them)"
    check.summary = (
        f"all-reduce of the gradient, {format_bytes(gradient_bytes)}{part}: {format_seconds(seconds)}, "
        f"{format_rate(2 * (world_size - 1) / world_size * size / seconds)} per process"
    )
    for node in group.ranks_of:
        check.note(node, all_reduce_seconds=seconds, all_reduce_bytes=size)
    rates = {rank: rate for rank, rate in group.values("pairs").items() if rate is not None}
    if not rates:
        return check
    median = statistics.median(rates.values())
    for rank, rate in rates.items():
        check.note(group.node_of[rank], network_bytes_per_second=rate)
        if rate < SLOW_NETWORK_SHARE * median:
            text = (
                f"sends and receives {format_rate(rate)}, the median node {format_rate(median)}: look at its link, or "
                "leave it out (--exclude)"
            )
            verdict = FAIL if rate < FAILED_NETWORK_SHARE * median else WARNING
            check.findings.append(group.find(verdict, rank, text))
    slowest = min(rates, key=lambda rank: rates[rank])
    check.summary += f"; in pairs of nodes: median {format_rate(median)}, slowest {group.node_of[slowest]} with "
    check.summary += format_rate(rates[slowest])
    return check


def judge_model(group: Group, built: Answer, trial: ModelTrial) -> Check:
    """Every process computes the same loss, in about the same time. built: rank 0's attempt to build the model."""
    check, train = Check("model"), trial.config.train
    if built.error is not None:
        check.findings += group.find_all(FAIL, built.error)
        check.summary = "cannot be built: no pass was made"
        return check
    passes, devices = group.values("pass"), group.values("device")
    late = [rank for rank, answers in enumerate(group.answers) if answers["pass"].is_late]
    for finding in group.failures("pass"):
        kind = devices.get(finding.ranks[0], {}).get("kind")
        if finding.ranks[0] in late:
            text = f"no forward and backward pass ended within {PASS_SECONDS:g} s, on {kind}"
            # a model that was made for GPUs takes minutes on a CPU
            finding = Finding(WARNING if kind == "cpu" else FAIL, finding.node, finding.ranks, text)
        check.findings.append(finding)
    if not passes:
        check.summary = "no pass was measured"
        return check
    median = statistics.median(found["seconds"] for found in passes.values())
    loss = statistics.median_low(found["loss"] for found in passes.values())
    for rank, found in passes.items():
        seconds, used, total = found["seconds"], found["memory_bytes"], found["total_bytes"]
        if not abs(found["loss"] - loss) <= SAME_LOSS[train.precision] * abs(loss):
            text = f"rank {rank} computes a loss of {found['loss']:.6g}, others {loss:.6g}: is its device broken?"
            check.findings.append(group.find(FAIL, rank, text, whole_node=False))
        if seconds > max(SLOW_PASS_FACTOR * median, median + SLOW_PASS_SECONDS):
            text = (
                f"rank {rank} takes {format_seconds(seconds)}, the median process {format_seconds(median)}: all wait "
                "for it; look at its device's clock rate and at what else runs there"
            )
            check.findings.append(group.find(WARNING, rank, text, whole_node=False))
        if total is not None and used > FULL_MEMORY_SHARE * total:
            text = f"{format_bytes(used)} of {format_bytes(total)}: lower train.micro_batch_size"
            check.findings.append(group.find(WARNING, rank, text, whole_node=False))
    for node, ranks in group.ranks_of.items():
        here = [passes[rank] for rank in ranks if rank in passes]
        if here:
            seconds, memory = [found["seconds"] for found in here], [found["memory_bytes"] for found in here]
            check.note(node, pass_seconds=seconds, memory_bytes=memory)
    slowest = max(found["seconds"] for found in passes.values())
    memory = max(found["memory_bytes"] for found in passes.values())
    check.summary = (
        f"forward and backward of {train.micro_batch_size} sample(s) of {trial.grid_shape[0]} x {trial.grid_shape[1]} "
        f"cells in {train.precision}{', not compiled' if train.compile else ''}: median {format_seconds(median)}, "
        f"slowest {format_seconds(slowest)}; up to {format_bytes(memory)} of memory per process, without the optimizer"
    )
    return check
