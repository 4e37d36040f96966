"""Rank 0's judgement of what all processes measured: one function per check."""

import ipaddress
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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

CLOCK_WARNING_SECONDS, CLOCK_FAIL_SECONDS = 0.1, 1.0
SLOW_PASS_FACTOR, SLOW_PASS_SECONDS, PASS_SECONDS = 1.5, 0.05, 20.0
"""A process that takes so much longer than the median, and at least so many seconds more, stands out."""
SAME_LOSS = {"fp32": 1e-3, "bf16": 2e-2}
"""Relative difference of the loss, equal on all processes, that rounding explains."""
FULL_MEMORY_SHARE = 0.9
"""Of the device's memory; optimizer and communication need some too."""
OWN_FILES, FILES_PER_LOADER, FILES_PER_WORKER = 128, 2, 4
PAGES_PER_LOADER, PAGES_PER_WORKER, PAGE_BYTES = 7, 2, 4096
"""What a loader and each of its workers keep in /dev/shm: a page per semaphore (batches are in anonymous memory)."""
LOADERS = 2
"""Training and validation."""
NCCL_BYTES = 64 * 2**20
"""Shared memory that NCCL takes for a process on a GPU, at its defaults."""
_LEASE = "only the generation of the lease keeps out a process that lost the run directory"


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

    def open(self, name: str, measurement: str, whole_node: bool = True) -> tuple[Check, dict[int, Any]]:
        """Return a check with a finding for each failed measurement, and {rank: result} of the others."""
        answers = {rank: held[measurement] for rank, held in enumerate(self.answers) if measurement in held}
        check = Check(name)
        for rank, answer in answers.items():
            if answer.error is not None:
                self.report(check, WARNING if answer.is_minor else FAIL, rank, answer.error, whole_node)
        return check, {rank: answer.value for rank, answer in answers.items() if answer.error is None}

    def report(self, check: Check, verdict: str, rank: int, text: str, whole_node: bool = True) -> None:
        """Add a finding on a process's node, or only on the process."""
        node = self.node_of[rank]
        check.findings.append(Finding(verdict, node, tuple(self.ranks_of[node]) if whole_node else (rank,), text))

    def report_all(self, check: Check, verdict: str, text: str) -> None:
        """Add the same finding for every node."""
        check.findings += [Finding(verdict, node, tuple(ranks), text) for node, ranks in self.ranks_of.items()]

    def compare(self, check: Check, facts: Mapping[int, Mapping[str, Any]]) -> None:
        """Report the processes whose facts differ from those of most others."""
        for name in dict.fromkeys(name for held in facts.values() for name in held):
            usual, count = Counter(held.get(name) for held in facts.values()).most_common(1)[0]
            for rank, held in facts.items():
                if held.get(name) != usual:
                    text = f"{name} is {held.get(name)}, on {count} other process(es) {usual}: expected the same on all"
                    self.report(check, FAIL, rank, text, whole_node=False)

    def find_slow(
        self, check: Check, rates: Mapping[int, float], verb: str, form: Callable[[float], str], *shares: float
    ) -> None:
        """Report the nodes that are slower than a share of the median: a warning, or a failure below a second share."""
        median = statistics.median(rates.values()) if rates else 0.0
        for rank, rate in rates.items():
            below = sum(rate < share * median for share in shares)
            if below:
                text = f"{verb} {form(rate)}, the median node {form(median)}: look at its mounts and its network"
                self.report(check, FAIL if below > 1 else WARNING, rank, text)


def judge_ranks(group: Group, config: Config, is_configured: bool) -> Check:
    """Check that all processes have the same launcher, complete numbers, and a batch that they can share."""
    check, launches = group.open("ranks", "launch", whole_node=False)
    for ranks in group.ranks_of.values():
        here = [launches[rank] for rank in ranks if rank in launches]
        local_ranks, claimed = (
            [launch["local_rank"] for launch in here],
            {launch["local_world_size"] for launch in here},
        )
        if len(set(local_ranks)) < len(local_ranks):
            text = f"local ranks {shorten(sorted(local_ranks))}: expected each once; is LOCAL_RANK exported by hand?"
            group.report(check, FAIL, ranks[0], text)
        if claimed != {len(ranks)}:
            text = f"the launcher reports {shorten(sorted(claimed))} process(es) on this node, found {len(ranks)}"
            group.report(check, FAIL, ranks[0], text)
    group.compare(check, {r: {n: item[n] for n in ("launcher", "world_size", "job")} for r, item in launches.items()})
    main, world_size = next(iter(launches.values())), len(group.node_of)
    if main["idle_tasks"] > 0:
        text = f"one process, but SLURM job {main['job']} has {main['idle_tasks'] + 1} tasks: start it with srun"
        group.report_all(check, WARNING, text)
    size, micro = config.train.global_batch_size, config.train.micro_batch_size
    try:
        if is_configured:
            BatchPlan(size, config.run.seed, size, micro, rank=0, world_size=world_size)
            if config.distributed.reduction == "canonical":
                require_whole_subtrees(size // micro, world_size)
    except ConfigError as error:
        group.report_all(check, FAIL, str(error))
    counts = sorted({len(ranks) for ranks in group.ranks_of.values()})
    check.summary = f"{world_size} process(es) on {len(group.ranks_of)} node(s), {_span(counts)} on each; "
    check.summary += f"launcher: {main['launcher']} ({main['reason']})"
    return check


def judge_devices(group: Group, refusals: Mapping[int, str]) -> Check:
    """Check that each process has a device of its own, and the intended one. refusals: {rank: why it has none}."""
    check, devices = group.open("devices", "device", whole_node=False)
    for rank, found in devices.items():
        if rank in refusals:
            group.report(check, FAIL, rank, refusals[rank], whole_node=False)
        elif found["kind"] == "cpu" and found["assigned"]:
            text = f"{found['assigned']}, but torch ({found['built_for']}) sees no GPU: it computes on the CPU"
            group.report(check, WARNING, rank, text, whole_node=False)
    for node, ranks in group.ranks_of.items():
        here = {rank: devices[rank] for rank in ranks if rank in devices}
        names, visible = [found["name"] for found in here.values()], [found["visible"] for found in here.values()]
        check.note(node, devices=names, visible=visible)
        users: dict[str, list[int]] = {}
        for rank, found in here.items():
            users.setdefault(found["identity"] or f"rank {rank}", []).append(rank)
        for sharing in users.values():
            if len(sharing) > 1:
                text = (
                    f"ranks {number_ranges(sharing)} have one device, {here[sharing[0]]['name']}: expected one process "
                    "per device; look at --gpus-per-task and the visible-devices variables"
                )
                check.findings.append(Finding(FAIL, node, tuple(sharing), text))
    counts = Counter(found["name"].partition(" ")[2] or "cpu" for found in devices.values())
    chosen_by = sorted({name for found in devices.values() for name in found["visible"]})
    check.summary = ", ".join(f"{count} x {name}" for name, count in counts.items())
    check.summary += f"; set for the processes: {', '.join(chosen_by) or 'no visible-devices variable'}"
    return check


def judge_processors(group: Group, launcher: str, workers: int) -> Check:
    """Check that the processes of a node do not share CPUs, and have enough for their loader processes."""
    check, usable = group.open("CPUs", "processors", whole_node=False)
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
        for users, processors in shared.items():
            if len(users) > 1 and (launcher == "srun" or not unbound):
                cpus = number_ranges(processors)
                text = f"ranks {number_ranges(users)} share CPU(s) {cpus}: bind each to its own (--cpu-bind=cores)"
                check.findings.append(Finding(WARNING, node, users, text))
        if each < 1 + workers:
            text = (
                f"{round(each, 1):g} CPU(s) per process for the training and data.workers={workers}: "
                f"give {1 + workers} (--cpus-per-task), or lower data.workers"
            )
            check.findings.append(Finding(WARNING, node, tuple(bound), text))
    counts = sorted({round(figures["processors_per_process"], 1) for figures in check.figures.values()})
    free = any(not figures["bound"] for figures in check.figures.values())
    how = "shared by all processes of a node (none is bound)" if free else "usable by each"
    check.summary = f"{_span(counts or [0])} per process, {how}"
    return check


def judge_software(group: Group) -> Check:
    """Check that versions, drivers, sources, threads and config are equal on all ranks, as training demands."""
    check, software = group.open("software", "software", whole_node=False)
    group.compare(check, {rank: {**found["program"], **found["versions"]} for rank, found in software.items()})
    for ranks in group.ranks_of.values():
        if ranks[0] in software:
            versions = software[ranks[0]]["versions"]
            check.note(group.node_of[ranks[0]], software=versions)
            check.summary = check.summary or ", ".join(f"{name} {found}" for name, found in versions.items() if found)
    return check


def judge_addresses(group: Group, address: str, port: int) -> Check:
    """Check that each node resolves rank 0's address to one that others can reach, and the named interfaces exist."""
    check, found_by = group.open("addresses", "address")
    usual = Counter(found["address"] for rank, found in found_by.items() if rank > 0).most_common(1)
    reached_by = []
    for rank, found in found_by.items():
        interface, speed = found["interface"] or "the node itself", found["link_mbit_s"]
        check.note(group.node_of[rank], address=found["address"], interface=interface, link_mbit_s=speed)
        if found["interface"]:
            reached_by.append(interface + (f" ({speed / 1000:g} Gbit/s)" if speed else ""))
        for variable, (missing, is_fatal) in found["missing"].items():
            text = f"{variable}: no interface {', '.join(missing)}: expected one of {', '.join(found['interfaces'])}"
            group.report(check, FAIL if is_fatal else WARNING, rank, text)
        if len(group.ranks_of) > 1 and ipaddress.ip_address(found["address"]).is_loopback:
            text = (
                f"{address} is {found['address']} on this node, which reaches only itself: expected an address "
                "that all nodes reach; look at /etc/hosts"
            )
            # on rank 0's own node that is usual (Debian), and harmless if the others resolve it to another address
            group.report(check, FAIL if rank > 0 else WARNING, rank, text)
        if rank > 0 and found["address"] != usual[0][0]:
            group.report(check, WARNING, rank, f"rank 0's address is {found['address']} here, elsewhere {usual[0][0]}")
    interfaces = ", ".join(sorted(set(reached_by))) or "the node itself"
    check.summary = f"rank 0 is at {address}:{port}, reached through {interfaces}"
    if len(group.node_of) == 1:
        check.summary = "one process: no others to reach"
    return check


def judge_clocks(group: Group) -> Check:
    """Check that each node's clock agrees with rank 0's, or with most others where there are more than two."""
    check, found = group.open("clocks", "clock")
    found = {0: (0.0, 0.0), **found}
    # of two clocks nobody knows which one is wrong
    by_most = len(found) > 2
    usual = statistics.median(offset for offset, _ in found.values()) if by_most else 0.0
    for rank, (offset, uncertainty) in found.items():
        apart = abs(offset - usual)
        check.note(group.node_of[rank], clock_offset_seconds=offset - usual, clock_uncertainty_seconds=uncertainty)
        if apart - uncertainty > CLOCK_WARNING_SECONDS:
            way, whom = "ahead of" if offset > usual else "behind", "most others" if by_most else "that of rank 0"
            text = f"the clock is {apart:.3f} s {way} {whom}: synchronize it (chronyc tracking, timedatectl)"
            group.report(check, FAIL if apart - uncertainty > CLOCK_FAIL_SECONDS else WARNING, rank, text)
    offsets, worst_ms = [offset for offset, _ in found.values()], 1e3 * max(error for _, error in found.values())
    check.summary = f"at most {(max(offsets) - min(offsets)) * 1e3:.1f} ms apart (measured to within {worst_ms:.1f} ms)"
    if len(group.ranks_of) == 1:
        check.summary = "one node, one clock"
    return check


def judge_caches(group: Group, greetings: list[Greeting], compiles: bool) -> Check:
    """Check that cache folders can be written, and that no other node writes to MIOpen's (it would get corrupted)."""
    check, shared = group.open("caches", "shared caches")
    for rank in (ranks[0] for ranks in group.ranks_of.values()):
        marks = greetings[rank].marks
        if marks.error is not None:
            group.report(check, FAIL, rank, marks.error)
            continue
        folders = {name: str(Path(mark).parent) for name, (mark, _) in marks.value.items()}
        check.note(group.node_of[rank], caches=folders)
        check.summary = check.summary or ", ".join(f"{name} {folder}" for name, folder in folders.items())
        for name, (_, error) in marks.value.items():
            if error is not None:
                is_needed = name == "TMPDIR" or (compiles and name.startswith(("TORCHINDUCTOR", "TRITON")))
                text = f"{name}, {folders[name]}: cannot be written ({error}): set {name} to a writable folder"
                group.report(check, FAIL if is_needed else WARNING, rank, text)
        for name in shared.get(rank, []):
            text = (
                f"{name}, {folders.get(name)}: other nodes write there too, and a shared cache of MIOpen gets "
                "corrupted: set it to a folder of the node's own, in /tmp"
            )
            group.report(check, WARNING, rank, text)
    return check


def judge_data(group: Group, config: Config, is_configured: bool) -> tuple[Check, tuple[int, int]]:
    """Check that all nodes read the same data set. Returns the grid's shape too (a default without data)."""
    check, looks = group.open("data", "data")
    patch = config.model.patch_size
    rows, columns = config.model.img_size or (12 * patch, 16 * patch)
    shape = (rows, columns)
    if not looks:
        check.summary = f"no CONFIG: not examined; a grid of {shape[0]} x {shape[1]} cells for what follows"
        if is_configured:
            check.summary = f"{config.data.path}: not readable anywhere"
        return check, shape
    usual = Counter(look["fingerprint"] for look in looks.values()).most_common(1)[0][0]
    for rank, look in looks.items():
        figures = ("samples_per_second", "bytes_per_second", "open_seconds")
        check.note(group.node_of[rank], **{f"data_{name}": look[name] for name in figures})
        if look["fingerprint"] != usual:
            text = f"{config.data.path} has other contents than on most nodes: expected the same data set on all"
            group.report(check, FAIL, rank, text)
    rates = {rank: look["samples_per_second"] for rank, look in looks.items()}
    group.find_slow(check, rates, "reads", "{:.3g} samples/s".format, 0.25)
    rows, columns = next(iter(looks.values()))["shape"]
    if config.model.img_size is not None and shape != (rows, columns):
        group.report_all(check, FAIL, f"model.img_size: {list(shape)}: expected the data's {[rows, columns]}")
    slowest = min(looks.values(), key=lambda look: look["samples_per_second"])
    check.summary = (
        f"{config.data.path}: {rows} x {columns} cells; random samples, one process per node: "
        f"{slowest['samples_per_second']:.3g} samples/s ({format_rate(slowest['bytes_per_second'])}) or more; caches "
        "may flatter"
    )
    return check, (rows, columns)


def judge_limits(group: Group, workers: int) -> Check:
    """Check that open files and shared memory suffice for data.workers and the number of processes."""
    check, limits = group.open("limits", "limits", whole_node=False)
    files = OWN_FILES + LOADERS * (FILES_PER_LOADER + workers * FILES_PER_WORKER)
    pages = LOADERS * (PAGES_PER_LOADER + workers * PAGES_PER_WORKER) if workers else 0
    for rank, found in limits.items():
        # rank 0 has two sockets for each process, and raises its soft limit for them
        world_size = len(group.node_of)
        kind, needed = ("hard_open_files", files + 2 * world_size) if rank == 0 else ("open_files", files)
        if found[kind] < 2 * needed:
            text = (
                f"at most {found[kind]} open files per process, about {needed} are needed for {world_size} process(es) "
                f"and data.workers={workers}: raise it (ulimit -n {max(4096, 4 * needed)})"
            )
            group.report(check, FAIL if found[kind] < needed else WARNING, rank, text, whole_node=False)
    for node, ranks in group.ranks_of.items():
        here = [limits[rank] for rank in ranks if rank in limits]
        if not here:
            continue
        needed = len(ranks) * pages * PAGE_BYTES + sum(found["on_gpu"] for found in here) * NCCL_BYTES
        free = here[0]["shared_memory_bytes"]
        check.note(node, open_files=min(found["open_files"] for found in here))
        check.note(node, shared_memory_bytes=free, shared_memory_needed_bytes=needed)
        if free < needed:
            text = (
                f"{SHARED_MEMORY} has {format_bytes(free)} free, {format_bytes(needed)} are needed for the semaphores "
                f"of data.workers={workers} (and for NCCL on a GPU) in {len(ranks)} process(es): enlarge it"
            )
            group.report(check, FAIL, ranks[0], text)
        check.summary = (
            f"about {files} open files per process and {format_bytes(needed)} of {SHARED_MEMORY} needed; "
            f"{node} has {check.figures[node]['open_files']} and {format_bytes(free)}"
        )
    return check


def judge_storage(group: Group, token: Answer, run_dir: Path, checkpoint_bytes: int, kept: int) -> Check:
    """Check that the run directory has room and speed, all nodes see the same one, and locks reach from node to node.

    token: of rank 0's greeting; checkpoint_bytes: size of one checkpoint; kept: how many there are at most at a time.
    """
    check, looks = group.open("run directory", "storage")
    if token.error is not None:
        group.report(check, FAIL, 0, token.error)
        check.summary = f"{run_dir}: rank 0 cannot make a file there; not examined on other nodes"
        return check
    left: Token = token.value
    here = left.folder.parent
    if left.lock_error is not None:
        group.report(check, WARNING, 0, f"no flock here ({left.lock_error}): {_LEASE}")
    for rank, look in looks.items():
        check.note(group.node_of[rank], free_bytes=look["free_bytes"], sees_run_directory=look["sees"])
        free, lock = look["free_bytes"], look.get("lock", "held")
        if not look["sees"]:
            text = f"{here} is not that of rank 0, whose file is not in it: expected one file system for all nodes"
            if Path(look["folder"]) != here:
                text = f"there is no {here} (nearest: {look['folder']}): mount the same file system on all nodes"
            group.report(check, FAIL, rank, text)
        elif not wait_until((left.folder / f"node-{rank}").is_file):
            text = f"what is written to {here} never appears on rank 0's node: expected one file system"
            group.report(check, FAIL, rank, text)
        if lock != "held" and left.lock_error is None:
            reason = "rank 0's flock is not seen" if lock == "taken" else f"no flock ({lock})"
            text = f"{reason} here: {_LEASE}; mount with cluster-wide locks (Lustre: -o flock)"
            group.report(check, WARNING, rank, text)
        if free < checkpoint_bytes * kept:
            each = format_bytes(checkpoint_bytes)
            text = f"{format_bytes(free)} free: a checkpoint takes {each}, and up to {kept} exist at a time: make room"
            group.report(check, FAIL if free < checkpoint_bytes else WARNING, rank, text)
    rates = {rank: look["write_bytes_per_second"] for rank, look in looks.items() if look["sees"]}
    for rank, rate in rates.items():
        check.note(group.node_of[rank], write_bytes_per_second=rate)
    group.find_slow(check, rates, "writes", format_rate, 0.25)
    check.summary = f"{here}" if here == run_dir.absolute() else f"{run_dir.absolute()} does not exist: examined {here}"
    if looks:
        free = format_bytes(min(look["free_bytes"] for look in looks.values()))
        check.summary += f"; {free} free, a checkpoint takes {format_bytes(checkpoint_bytes)}"
    if rates:
        check.summary += f"; written with fsync, all nodes at once: {format_rate(min(rates.values()))} or more"
    return check


def judge_connections(group: Group) -> Check:
    """Report the pairs of nodes of which one cannot connect to the other. Without a finding, the network is usable."""
    check, unreachable = group.open("network", "unreachable", whole_node=False)
    pairs: dict[tuple[str, str, str], list[int]] = {}
    for rank, errors in unreachable.items():
        for node, error in errors.items():
            pairs.setdefault((group.node_of[rank], node, error), []).append(rank)
    for (node, other, error), ranks in pairs.items():
        text = f"no TCP connection from {node} to {other}: {error}: look at routes, firewalls and cables"
        check.findings.append(Finding(FAIL, node, tuple(ranks), text))
    check.summary = "some nodes cannot connect to each other: nothing was sent"
    return check


def judge_network(group: Group, gradient_bytes: int) -> Check:
    """Check that no node is much slower than the others, and report the time of an all-reduce of the gradient."""
    check, sums = group.open("network", "all-reduce")
    if not sums:
        check.summary = "one process: nothing is sent"
        return check
    (seconds, size), world_size = sums[0], len(group.node_of)
    part = "" if size == gradient_bytes else f" ({format_bytes(size)} of them)"
    check.summary = (
        f"all-reduce of the gradient, {format_bytes(gradient_bytes)}{part}: {format_seconds(seconds)}, "
        f"{format_rate(2 * (world_size - 1) / world_size * size / seconds)} per process"
    )
    for node in group.ranks_of:
        check.note(node, all_reduce_seconds=seconds, all_reduce_bytes=size)
    rates = {rank: rate for rank, rate in group.open("", "pairs")[1].items() if rate is not None}
    for rank, rate in rates.items():
        check.note(group.node_of[rank], network_bytes_per_second=rate)
    group.find_slow(check, rates, "sends and receives", format_rate, 0.5, 0.2)
    if rates:
        slowest = group.node_of[min(rates, key=lambda rank: rates[rank])]
        median, least = format_rate(statistics.median(rates.values())), format_rate(min(rates.values()))
        check.summary += f"; in pairs of nodes: median {median}, slowest {slowest} with {least}"
    return check


def judge_model(group: Group, built: Answer, config: Config, grid_shape: tuple[int, int]) -> Check:
    """Check that all compute the same loss in about the same time. built: rank 0's attempt to build the model."""
    if built.error is not None:
        check = Check("model", "cannot be built: no pass was made")
        group.report_all(check, FAIL, built.error)
        return check
    train, (check, passes) = config.train, group.open("model", "pass", whole_node=False)
    if not passes:
        check.summary = "no pass was measured"
        return check
    median = statistics.median(found["seconds"] for found in passes.values())
    loss = statistics.median_low(found["loss"] for found in passes.values())
    for rank, found in passes.items():
        seconds, used, total = found["seconds"], found["memory_bytes"], found["total_bytes"]
        if not abs(found["loss"] - loss) <= SAME_LOSS[train.precision] * abs(loss):
            text = f"rank {rank} computes a loss of {found['loss']:.6g}, others {loss:.6g}: is its device broken?"
            group.report(check, FAIL, rank, text, whole_node=False)
        if seconds > max(SLOW_PASS_FACTOR * median, median + SLOW_PASS_SECONDS):
            text = (
                f"rank {rank} takes {format_seconds(seconds)}, the median process {format_seconds(median)}: all wait "
                "for it; look at its device's clock rate and at what else runs there"
            )
            group.report(check, WARNING, rank, text, whole_node=False)
        if total is not None and used > FULL_MEMORY_SHARE * total:
            text = f"{format_bytes(used)} of {format_bytes(total)}: lower train.micro_batch_size"
            group.report(check, WARNING, rank, text, whole_node=False)
    for node, ranks in group.ranks_of.items():
        here = [passes[rank] for rank in ranks if rank in passes]
        if here:
            seconds, memory = [found["seconds"] for found in here], [found["memory_bytes"] for found in here]
            check.note(node, pass_seconds=seconds, memory_bytes=memory)
    slowest = max(found["seconds"] for found in passes.values())
    memory = max(found["memory_bytes"] for found in passes.values())
    check.summary = (
        f"forward and backward of {train.micro_batch_size} sample(s) of {grid_shape[0]} x {grid_shape[1]} cells in "
        f"{train.precision}{', not compiled' if train.compile else ''}: median {format_seconds(median)}, slowest "
        f"{format_seconds(slowest)}; up to {format_bytes(memory)} of memory per process, without the optimizer"
    )
    return check


def _span(numbers: Sequence[float]) -> str:
    return f"{numbers[0]:g}" if numbers[0] == numbers[-1] else f"{numbers[0]:g} to {numbers[-1]:g}"
