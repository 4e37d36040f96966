"""Rank 0's judgement of the facts: a function per check, which adds findings and figures and returns a summary."""

import ipaddress
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from topoflow.data.sampling import BatchPlan
from topoflow.errors import ConfigError
from topoflow.reduction import require_whole_subtrees
from topoflow.text import number_ranges, shorten
from topoflow.tools.doctor.probe import ask, find_written
from topoflow.tools.doctor.report import FAIL, OK, WARNING, Report, format_bytes, format_rate, format_seconds

CLOCK_WARNING_SECONDS, CLOCK_FAIL_SECONDS = 0.1, 1.0
SLOW_PASS_FACTOR, SLOW_PASS_SECONDS = 1.5, 0.05
"""A process is slow if it takes this many times the median, and at least this many seconds more."""
SAME_LOSS = {"fp32": 1e-3, "bf16": 2e-2}
"""Relative difference of the loss, equal on all processes, that rounding explains."""
FULL_MEMORY_SHARE = 0.9
"""Of the device's memory; optimizer and communication need some too."""
CHECKPOINT_COPIES = 3
"""A checkpoint holds the weights and two moments."""
OPEN_FILES = 128
"""What a process has open at a time."""
NCCL_BYTES = 64 * 2**20
"""Shared memory that NCCL takes for a process on a GPU, at its defaults."""
Results = Mapping[str, Mapping[str, Any]]
LEASE = "only the generation of the lease stops a process that has lost the run directory"


def judge_ranks(report: Report) -> str:
    """Check that all processes have the same launcher, complete numbers, and a batch that they can share."""
    launches, config = report.per_rank("launch"), report.config
    main, everyone = launches[0], [*launches]
    for node, here in report.by_node(launches):
        local_ranks = sorted(launch["local_rank"] for launch in here.values())
        claimed = {launch["local_world_size"] for launch in here.values()}
        text = f"local ranks {shorten(local_ranks)}: expected each once; is LOCAL_RANK exported by hand?"
        report.find(FAIL if len(set(local_ranks)) < len(here) else OK, node, text)
        text = f"the launcher reports {shorten(sorted(claimed))} process(es) on this node, found {len(here)}"
        report.find(FAIL if claimed != {len(here)} else OK, node, text)
    _compare(report, {r: {n: found[n] for n in ("launcher", "world_size", "job")} for r, found in launches.items()})
    text = f"one process, but SLURM job {main['job']} has {main['idle_tasks'] + 1} tasks: start it with srun"
    report.find(WARNING if main["idle_tasks"] > 0 else OK, everyone, text)
    size, micro = config.train.global_batch_size, config.train.micro_batch_size
    try:
        if report.head["config"]:
            BatchPlan(size, config.run.seed, size, micro, rank=0, world_size=len(everyone))
            if config.distributed.reduction == "canonical":
                require_whole_subtrees(size // micro, len(everyone))
    except ConfigError as error:
        report.find(FAIL, everyone, str(error))
    each = _span([len(item["ranks"]) for item in report.nodes.values()])
    where = f"{len(everyone)} process(es) on {len(report.nodes)} node(s), {each} on each"
    return f"{where}; launcher: {main['launcher']} ({main['reason']})"


def judge_devices(report: Report) -> str:
    """Check that each process has the intended device. That no two share one is checked when they meet."""
    devices = report.per_rank("device")
    for rank, found in devices.items():
        refusal = report.facts[rank]["refusals"]["device"]
        on_cpu = f"{found['assigned']}, but torch ({found['built_for']}) sees no GPU: it computes on the CPU"
        is_idle = found["kind"] == "cpu" and found["assigned"]
        report.find(FAIL if refusal else WARNING if is_idle else OK, rank, refusal or on_cpu)
    report.note_lists(devices, devices="name", visible="visible")
    counts = Counter(found["name"].partition(" ")[2] or "cpu" for found in devices.values())
    chosen_by = sorted({name for found in devices.values() for name in found["visible"]})
    shown = ", ".join(f"{count} x {name}" for name, count in counts.items())
    return f"{shown}; set for the processes: {', '.join(chosen_by) or 'no visible-devices variable'}"


def judge_processors(report: Report) -> str:
    """Check that the processes of a node do not share CPUs, and have enough for their loader threads."""
    threads, how, counts = report.config.data.threads, "usable by each", []
    for node, here in report.by_node(report.per_rank("processors")):
        bound = {rank: frozenset(found["numbers"]) for rank, found in here.items()}
        union = frozenset().union(*bound.values())
        unbound = len(bound) > 1 and len(set(bound.values())) == 1
        each = len(union) / len(bound) if unbound else min(map(len, bound.values()))
        counts.append(round(each, 1))
        how = "shared by all processes of a node (none is bound)" if unbound else how
        report.note(node, processors=len(union), processors_per_process=each, bound=not unbound)
        shared: dict[tuple[int, ...], list[int]] = {}
        for processor in union:
            shared.setdefault(tuple(rank for rank in bound if processor in bound[rank]), []).append(processor)
        for users, cpus in shared.items():
            text = f"ranks {number_ranges(users)} share CPU(s) {number_ranges(cpus)}: bind each (--cpu-bind=cores)"
            is_wrong = len(users) > 1 and (report.head["launcher"] == "srun" or not unbound)
            report.find(WARNING if is_wrong else OK, users, text)
        needed = (
            f"for the training and data.threads={threads}: give {1 + threads} (--cpus-per-task), or use fewer threads"
        )
        text = f"{counts[-1]:g} CPU(s) per process {needed}"
        report.find(WARNING if each < 1 + threads else OK, node, text)
    return f"{_span(counts)} per process, {how}"


def judge_software(report: Report) -> str:
    """Check that versions, drivers, sources, threads and config are equal on all ranks, as training demands."""
    software, versions = report.per_rank("software"), report.facts[0]["software"].get("versions", {})
    _compare(report, {rank: {**found["program"], **found["versions"]} for rank, found in software.items()})
    for node, here in report.by_node(software):
        report.note(node, software=next(iter(here.values()))["versions"])
    return ", ".join(f"{name} {found}" for name, found in versions.items() if found)


def judge_addresses(report: Report) -> str:
    """Check that each node resolves rank 0's address to one that others can reach, and the named interfaces exist."""
    (main, *others), ways, launch = report.nodes, set(), report.facts[0]["launch"]
    found_on = report.per_node("address")
    usual = Counter(found["address"] for node, found in found_on.items() if node != main).most_common(1)
    for node, found in found_on.items():
        address, speed, is_main = found["address"], found["link_mbit_s"], node == main
        way = found["interface"] or "the node itself"
        report.note(node, address=address, interface=way, link_mbit_s=speed)
        ways.add(way + (f" ({speed / 1000:g} Gbit/s)" if speed else ""))
        for variable, (missing, is_fatal) in found["missing"].items():
            text = f"{variable}: no interface {', '.join(missing)}: expected one of {', '.join(found['interfaces'])}"
            report.find(FAIL if is_fatal else WARNING, node, text)
        text = f"{launch['address']} is {address} on this node, which reaches only itself: look at /etc/hosts"
        is_wrong = others and ipaddress.ip_address(address).is_loopback
        # on rank 0's own node that is usual (Debian), and harmless if the others resolve it to another address
        report.find(OK if not is_wrong else WARNING if is_main else FAIL, node, text)
        if not is_main and address != usual[0][0]:
            report.find(WARNING, node, f"rank 0's address is {address} here, elsewhere {usual[0][0]}")
    if len(report.facts) == 1:
        return "one process: no others to reach"
    reached = ", ".join(sorted(ways - {"the node itself"})) or "the node itself"
    return f"rank 0 is at {launch['address']}:{launch['port']}, reached through {reached}"


def judge_clocks(report: Report) -> str:
    """Check that each node's clock agrees with rank 0's, or with most others where there are more than two."""
    found_on = report.per_node("clock")
    offsets = [found["offset"] for found in found_on.values()]
    by_most = len(offsets) > 2  # with two clocks it is unknown which one is wrong
    usual, whom = (statistics.median(offsets), "most others") if by_most else (0.0, "that of rank 0")
    for node, found in found_on.items():
        offset, uncertainty = found["offset"] - usual, found["uncertainty"]
        report.note(node, clock_offset_seconds=offset, clock_uncertainty_seconds=uncertainty)
        least, way = abs(offset) - uncertainty, "ahead of" if offset > 0 else "behind"
        text = f"the clock is {abs(offset):.3f} s {way} {whom}: synchronize it (chronyc tracking, timedatectl)"
        verdict = FAIL if least > CLOCK_FAIL_SECONDS else WARNING if least > CLOCK_WARNING_SECONDS else OK
        report.find(verdict, node, text)
    if len(report.nodes) == 1:
        return "one node, one clock"
    worst_ms = 1e3 * max(found["uncertainty"] for found in found_on.values())
    return f"at most {(max(offsets) - min(offsets)) * 1e3:.1f} ms apart (measured to within {worst_ms:.1f} ms)"


def judge_caches(report: Report) -> str:
    """Check that cache folders can be written, and that no other node writes to MIOpen's (it would get corrupted)."""
    shared_on, summary = report.per_node("shared caches"), ""
    needed = ("TMPDIR", *(("TORCHINDUCTOR", "TRITON") if report.config.train.compile else ()))
    for node, marks in report.per_node("caches").items():
        folders = {name: str(Path(mark).parent) for name, (mark, _) in marks.items()}
        report.note(node, caches=folders)
        summary = summary or ", ".join(f"{name} {folder}" for name, folder in folders.items())
        for name, (_, error) in marks.items():
            text = f"{name}, {folders[name]}: cannot be written ({error}): set {name} to a writable folder"
            report.find(OK if error is None else FAIL if name.startswith(needed) else WARNING, node, text)
        for name in shared_on.get(node, {"names": []})["names"]:
            why = "other nodes write there too, which corrupts a cache of MIOpen: set it to a folder in the node's /tmp"
            report.find(WARNING, node, f"{name}, {folders.get(name)}: {why}")
    return summary


def find_grid_shape(report: Report) -> tuple[int, int]:
    """Return rows and columns of the grid: the data's, or else the config's or a default."""
    read = [facts["data"]["shape"] for facts in report.facts if "shape" in facts.get("data", {})]
    model = report.config.model
    return (*read, model.img_size or (12 * model.patch_size, 16 * model.patch_size))[0]


def judge_data(report: Report) -> str:
    """Check that all nodes read the same data set, of the configured grid, at about the same speed."""
    looks, size, path = report.per_node("data"), report.config.model.img_size, report.config.data.path
    rows, columns = find_grid_shape(report)
    if not looks and report.head["config"]:
        return f"{path}: not readable anywhere"
    if not looks:
        return f"no CONFIG: not examined; a grid of {rows} x {columns} cells for what follows"
    usual = Counter(look["fingerprint"] for look in looks.values()).most_common(1)[0][0]
    for node, look in looks.items():
        figures = ("samples_per_second", "bytes_per_second", "open_seconds")
        report.note(node, **{f"data_{figure}": look[figure] for figure in figures})
        text = f"{path} has other contents than on most nodes: expected the same data set on all"
        report.find(FAIL if look["fingerprint"] != usual else OK, node, text)
    slowest = _find_slow(report, looks, "samples_per_second", "reads", "{:.3g} samples/s".format, 0.25)
    if size is not None and tuple(size) != (rows, columns):
        text = f"model.img_size: {list(size)}: expected the data's {[rows, columns]}"
        report.find(FAIL, range(len(report.facts)), text)
    rate = format_rate(looks[slowest]["bytes_per_second"])
    speed = f"{looks[slowest]['samples_per_second']:.3g} samples/s ({rate}) or more; caches may flatter"
    return f"{path}: {rows} x {columns} cells; random samples, one process per node: {speed}"


def judge_limits(report: Report) -> str:
    """Check that open files and shared memory suffice for the number of processes."""
    limits, world_size, summary = report.per_rank("limits"), len(report.facts), ""
    for rank, found in limits.items():
        # rank 0 has two sockets for each process, and raises its soft limit for them
        limit, needed = (found["hard"], OPEN_FILES + 2 * world_size) if rank == 0 else (found["soft"], OPEN_FILES)
        why = f"about {needed} are needed for {world_size} process(es)"
        text = f"at most {limit} open files per process, {why}: raise it (ulimit -n {max(4096, 4 * needed)})"
        report.find(FAIL if limit < needed else WARNING if limit < 2 * needed else OK, rank, text)
    for node, here in report.by_node(limits):
        needed = sum(found["on_gpu"] for found in here.values()) * NCCL_BYTES
        free = next(iter(here.values()))["shared_memory_bytes"]
        soft = min(found["soft"] for found in here.values())
        report.note(node, open_files=soft, shared_memory_bytes=free, shared_memory_needed_bytes=needed)
        why = f"are needed for NCCL in {len(here)} process(es)"
        text = f"/dev/shm has {format_bytes(free)} free, {format_bytes(needed)} {why}: enlarge it"
        report.find(FAIL if free < needed else OK, node, text)
        summary = f"about {OPEN_FILES} open files per process and {format_bytes(needed)} of /dev/shm needed"
        summary += f"; {node} has {soft} and {format_bytes(free)}"
    return summary


def judge_storage(report: Report) -> str:
    """Check that the run directory has room and speed, and that all nodes see the same one, with rank 0's lock."""
    (main, *_), token, run_dir = report.nodes, report.facts[0]["token"], Path(report.head["run_directory"])
    if "error" in token:
        report.find(FAIL, main, token["error"])
        return f"{run_dir}: rank 0 cannot create a file there; not examined on other nodes"
    looks, here, has_lock = report.per_node("storage"), Path(token["folder"]).parent, token["lock"] == "taken"
    size = CHECKPOINT_COPIES * report.facts[0]["model"].get("gradient_bytes", 0)
    kept = report.config.checkpoint.keep_last + report.config.checkpoint.keep_best + 1
    seeing = [node for node, look in looks.items() if look["sees"]]
    written = ask(find_written, token["folder"], [report.nodes[node]["ranks"][0] for node in seeing]).get("ranks", [])
    report.find(OK if has_lock else WARNING, main, f"no flock here ({token['lock']}): {LEASE}")
    for node, look in looks.items():
        free, folder, lock = look["free_bytes"], Path(look["folder"]), look["lock"]
        report.note(node, free_bytes=free, sees_run_directory=look["sees"])
        absent = f"there is no {here} (nearest: {folder}): mount the same file system on all nodes"
        other = f"{here} is not that of rank 0, whose file is not in it: expected one file system for all nodes"
        report.find(OK if look["sees"] else FAIL, node, other if folder == here else absent)
        text = f"what is written to {here} never appears on rank 0's node: expected one file system"
        is_lost = look["sees"] and report.nodes[node]["ranks"][0] not in written
        report.find(FAIL if is_lost else OK, node, text)
        reason = "rank 0's flock is not seen here" if lock == "taken" else f"no flock here ({lock})"
        text = f"{reason}: {LEASE}; mount with cluster-wide locks (Lustre: -o flock)"
        report.find(WARNING if look["sees"] and has_lock and lock != "held" else OK, node, text)
        each = f"a checkpoint takes {format_bytes(size)}, and up to {kept} exist at a time"
        verdict = FAIL if free < size else WARNING if free < size * kept else OK
        report.find(verdict, node, f"{format_bytes(free)} free: {each}: make room")
    summary = f"{here}" if here == run_dir else f"{run_dir} does not exist: examined {here}"
    if looks:
        free = format_bytes(min(look["free_bytes"] for look in looks.values()))
        summary += f"; {free} free, a checkpoint takes {format_bytes(size)}"
    for node in seeing:
        report.note(node, write_bytes_per_second=looks[node]["rate"])
    if seeing:
        slowest = _find_slow(report, {node: looks[node] for node in seeing}, "rate", "writes", format_rate, 0.25)
        summary += f"; written with fsync, all nodes at once: {format_rate(looks[slowest]['rate'])} or more"
    return summary


def judge_network(report: Report) -> str:
    """Check that each rank can connect to each node, and that no node is much slower than the others."""
    for rank, found in report.per_rank("unreachable").items():
        for other, error in found["nodes"].items():
            text = f"no TCP connection from {report.node_of(rank)} to {other}: {error}"
            report.find(FAIL, rank, f"{text}: check routes, firewalls and cables")
    sums, world_size = report.per_rank("all-reduce"), len(report.facts)
    if not sums:
        return "one process: nothing is sent" if world_size == 1 else "some nodes cannot connect: nothing was sent"
    (seconds, size), whole = sums[0].values(), report.facts[0]["model"].get("gradient_bytes", 0)
    part = "" if size == whole else f" ({format_bytes(size)} of them)"
    rate = format_rate(2 * (world_size - 1) / world_size * size / seconds)
    summary = f"all-reduce of the gradient, {format_bytes(whole)}{part}: {format_seconds(seconds)}, {rate} per process"
    for node in report.nodes:
        report.note(node, all_reduce_seconds=seconds, all_reduce_bytes=size)
    if pairs := {node: found for node, found in report.per_node("pairs").items() if found["rate"]}:
        for node, found in pairs.items():
            report.note(node, network_bytes_per_second=found["rate"])
        slowest = _find_slow(report, pairs, "rate", "sends and receives", format_rate, 0.5, 0.2)
        summary += f"; in pairs of nodes: slowest {slowest} with {format_rate(pairs[slowest]['rate'])}"
    return summary


def judge_model(report: Report) -> str:
    """Check that all processes can build the model, and compute the same loss in about the same time."""
    train, (rows, columns) = report.config.train, find_grid_shape(report)
    report.per_rank("model")
    if not (passes := report.per_rank("pass")):
        return "no pass was measured"
    median = statistics.median(found["seconds"] for found in passes.values())
    loss = statistics.median_low(found["loss"] for found in passes.values())
    for rank, found in passes.items():
        seconds, used, total = found["seconds"], found["memory_bytes"], found["total_bytes"]
        text = f"rank {rank} computes a loss of {found['loss']:.6g}, others {loss:.6g}: is its device broken?"
        report.find(OK if abs(found["loss"] - loss) <= SAME_LOSS[train.precision] * abs(loss) else FAIL, rank, text)
        text = f"rank {rank} takes {format_seconds(seconds)}, the median process {format_seconds(median)}"
        text += ": all wait for it; check its device's clock rate and other load there"
        is_slow = seconds > max(SLOW_PASS_FACTOR * median, median + SLOW_PASS_SECONDS)
        report.find(WARNING if is_slow else OK, rank, text)
        if total is not None and used > FULL_MEMORY_SHARE * total:
            text = f"{format_bytes(used)} of {format_bytes(total)}: lower train.micro_batch_size"
            report.find(WARNING, rank, text)
    report.note_lists(passes, pass_seconds="seconds", memory_bytes="memory_bytes")
    slowest = format_seconds(max(found["seconds"] for found in passes.values()))
    memory = format_bytes(max(found["memory_bytes"] for found in passes.values()))
    what = f"{train.micro_batch_size} sample(s) of {rows} x {columns} cells in {train.precision}"
    times = f"median {format_seconds(median)}, slowest {slowest}; up to {memory} of memory per process"
    compiled = ", not compiled" if train.compile else ""
    return f"forward and backward of {what}{compiled}: {times}, without the optimizer"


def _compare(report: Report, facts: Mapping[int, Mapping[str, Any]]) -> None:
    """Report the processes whose facts differ from those of most others."""
    for name in dict.fromkeys(name for held in facts.values() for name in held):
        usual, count = Counter(held.get(name) for held in facts.values()).most_common(1)[0]
        for rank, held in facts.items():
            text = f"{name} is {held.get(name)}, but {usual} on {count} other(s): expected the same on all"
            report.find(FAIL if held.get(name) != usual else OK, rank, text)


def _find_slow(report: Report, found_on: Results, key: str, verb: str, form: Callable, *shares: float) -> str:
    """Report nodes whose rate `key` is below a share of the median, or a second one: a failure. Return the slowest."""
    median = statistics.median(found[key] for found in found_on.values())
    for node, found in found_on.items():
        text = f"{verb} {form(found[key])}, the median node {form(median)}: check its mounts and its network"
        report.find((OK, WARNING, FAIL)[sum(found[key] < share * median for share in shares)], node, text)
    return min(found_on, key=lambda node: found_on[node][key])


def _span(numbers: Sequence[float]) -> str:
    least, most = min(numbers, default=0), max(numbers, default=0)
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"


Checks = dict[str, Callable[[Report], str]]
LOCAL_CHECKS: Checks = {
    "ranks": judge_ranks,
    "devices": judge_devices,
    "CPUs": judge_processors,
    "software": judge_software,
    "addresses": judge_addresses,
    "clocks": judge_clocks,
    "caches": judge_caches,
    "data": judge_data,
    "limits": judge_limits,
}
STORAGE_CHECKS: Checks = {"run directory": judge_storage}
COMMON_CHECKS: Checks = {"network": judge_network, "model": judge_model}
"""The checks of what each process measured by itself, of what needs the size of a checkpoint, and of common trials."""
