"""The command: meet the other processes, measure, judge on rank 0, print, and end all with the same status."""

import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from topoflow.config_io import load_config
from topoflow.errors import ConfigError, RanksDisagree, Refusal
from topoflow.launch import Launch, choose_device, read_launch
from topoflow.logs import close_logging, setup_logging
from topoflow.ranks import Context
from topoflow.rendezvous import choose_backend, distributed_context
from topoflow.reproducibility import set_deterministic
from topoflow.terminal import print_error
from topoflow.tools.doctor import network, probe, storage, trial
from topoflow.tools.doctor.probe import SMALL, Process, Question, attempt, is_stuck
from topoflow.tools.doctor.report import FAIL, WARNING, Compare, Found, Report

MEET_SECONDS = 60.0
"""How long processes wait for each other: to start (Python may be on a slow file system), and for one that hangs."""
BUILD_SECONDS, PASS_SECONDS = 20.0, 20.0
HEAD = ("config", "run_directory", "data", "launcher", "launcher_reason", "processes")
"""The first keys of the JSON object."""


class Check(NamedTuple):
    """What measures for a check (None: see `_examine`), and how rank 0 judges it (see `Report.judge`)."""

    measure: Question | None
    compare: Compare | None = None
    on_node: bool = False
    """Only the first process of each node measures."""
    seconds: float = 10.0
    """Limit of the measurement."""


CHECKS = {
    "ranks": Check(probe.check_ranks),
    "devices": Check(probe.check_device),
    "CPUs": Check(probe.check_processors),
    "software": Check(probe.check_software),
    "addresses": Check(None, on_node=True),
    "clocks": Check(None, network.compare_clocks, on_node=True),
    "caches": Check(storage.check_caches, on_node=True),
    "data": Check(storage.check_data, on_node=True, seconds=20.0),
    "limits": Check(probe.check_limits, on_node=True),
    "run directory": Check(storage.check_run_directory, storage.compare_run_directories, on_node=True),
    "network": Check(network.check_connections, seconds=30.0),
    "model": Check(None, trial.compare_passes),
}
LAST = ("run directory", "network", "model")
"""All checks in the order of the report, and those that need the model or all processes together."""


def doctor(path: Path | None, overrides: Sequence[str] = (), as_json: bool = False) -> int:
    """Examine the machines of this launch; return the exit status, the same on all processes."""
    head: dict[str, Any] = dict.fromkeys(HEAD) | {"config": str(path) if path else None}
    try:
        launch = read_launch()
    except Refusal as refusal:
        report, here = Report(head, SMALL, is_shown=True, as_json=as_json), socket.gethostname()
        report.begin({here: []})
        return report.end_early(refusal.exit_status, "environment", "cannot be used", {here: str(refusal)})
    head |= {"launcher": launch.launcher, "launcher_reason": launch.reason, "processes": launch.world_size}
    process = Process(launch, SMALL, torch.device("cpu"))
    process.found["addresses"] = network.drop_missing_interfaces()
    # refusals are reported with those of the others: a process that ended here would leave them waiting
    try:
        process.config = load_config(path, overrides) if path else SMALL
        head |= {"run_directory": str(process.run_dir), "data": process.config.data.path if path else None}
    except Refusal as refusal:
        process.config_refusal = str(refusal)
    try:
        process.device = choose_device(process.config.run.device, launch)
        choose_backend(process.config.distributed, process.device)
    except Refusal as refusal:
        process.device_refusal = str(refusal)
    set_deterministic(process.config.run, process.config.train.compile)
    setup_logging(None, is_main=False)  # only errors
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the marks are removed
    try:
        status = _meet(process, Report(head, process.config, launch.is_main, as_json))
    finally:
        signal.signal(signal.SIGTERM, handler)
        close_logging()
    if is_stuck():
        sys.stdout.flush()
        os._exit(status)  # a thread that hangs in a file system or in a pass is not waited for
    return status


def _meet(process: Process, report: Report) -> int:
    """Connect to the other processes and examine all, or report that they did not connect or were lost."""
    launch, settings = process.launch, process.config.distributed
    backend = "auto" if process.device.type == "cpu" else settings.backend
    seconds = min(MEET_SECONDS, settings.setup_timeout_seconds)
    settings = replace(
        settings, backend=backend, reduction="ddp", setup_timeout_seconds=seconds, timeout_seconds=seconds
    )

    def end_as_lost(text: str) -> int:
        summary = f"a process was lost after {len(report.checks)} check(s): no further ones were made"
        return report.end_early(RanksDisagree.exit_status, "connection", summary, {next(iter(report.nodes)): text})

    def on_forced_exit(_: int, message: str) -> None:
        attempt(process.left.close)
        if report.nodes:
            end_as_lost(message)

    try:
        with distributed_context(launch, settings, process.device, on_forced_exit) as context:
            try:
                return _examine(context, process, report)
            finally:
                attempt(process.left.close)
    except (Refusal, RuntimeError) as error:  # torch.distributed raises RuntimeError when a process has ended
        text = (str(error).splitlines() or [type(error).__name__])[0]
        is_shared = getattr(error, "shared", False)
        if process.device_refusal and not report.nodes:  # may be why the processes do not connect
            text, is_shared = f"{process.device_refusal}; {text}", False
        if not (launch.is_main or is_shared):
            print_error(f"rank {launch.rank}: {text}")
        if report.nodes:
            return end_as_lost(text)
        late = find_missing(launch, text)
        report.begin({process.host: [launch.rank], **late})
        status = error.exit_status if isinstance(error, Refusal) else RanksDisagree.exit_status
        problems = {**dict.fromkeys(late, "never connected"), process.host: text}
        return report.end_early(status, "ranks", "the processes did not connect: nothing else was examined", problems)


def find_missing(launch: Launch, message: str) -> dict[str, list[int]]:
    """Return {host: ranks} of the ranks that a message names as `rank(s) 0-3, 7 of 8`, if SLURM tells the hosts."""
    hosts, named = launch.hosts, re.search(r"rank\(s\) ([0-9, -]+?) of", message)
    missing: dict[str, list[int]] = {}
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", named[1]) if named and hosts else ():
        for rank in range(int(first), int(last or first) + 1):
            missing.setdefault(hosts[rank], []).append(rank)
    return missing


def _examine(context: Context, process: Process, report: Report) -> int:
    """Measure and judge, on processes that have met; return the status."""
    context.watch.mark("preparing the checks")
    known = context.ask_main((process.host, process.config_refusal), list)
    for rank, (host, _) in enumerate(known):
        process.ranks_of.setdefault(host, []).append(rank)
    report.begin(process.ranks_of)
    if refused := {rank: refusal for rank, (_, refusal) in enumerate(known) if refusal}:
        summary = "cannot be used: nothing else was examined"
        return report.end_early(ConfigError.exit_status, "config", summary, refused)

    def gather(names: Iterable[str], answer: Callable[[Report], Any]) -> Any:
        """Send what was found to rank 0, which judges some checks; return its answer on all ranks."""

        def on_main(gathered: list[dict[str, Found]]) -> Any:
            report.found = gathered
            for name in names:
                nodes = {node: item["ranks"][0] for node, item in report.nodes.items()}
                places = nodes if CHECKS[name].on_node else {rank: rank for rank in report.node_of}
                found = {place: gathered[rank][name] for place, rank in places.items()}
                report.judge(name, found, CHECKS[name].compare)
            return answer(report)

        return context.ask_main(process.found, on_main)

    if process.is_leader:
        process.measure("addresses", network.check_address)
        process.measure("caches", storage.mark_caches)
        process.measure("run directory", storage.mark_run_directory)
    process.others = context.ask_main(process.introduction(), list)
    if context.is_main:
        storage.remove_marks_at_end(process)
    for name, check in CHECKS.items():
        if check.measure and (process.is_leader or not check.on_node):
            context.watch.mark(f"check of {name}")
            process.measure(name, check.measure, check.seconds)
    process.found["clocks"] = network.measure_clock(context)
    process.grid_shape, is_connected = gather([name for name in CHECKS if name not in LAST], _plan_trial)
    context.watch.mark("building the model")
    process.measure("model", trial.build_trial_model, BUILD_SECONDS)
    if is_connected:
        context.watch.mark("check of network")
        gradient_bytes = context.broadcast_object(process.found["model"].facts.get("gradient_bytes", 0))
        network.measure_speed(context, process, process.found["network"], gradient_bytes)
    context.watch.mark("check of model")
    late = f"no forward and backward pass ended within {PASS_SECONDS:g} s, on {process.device.type}"
    # a model designed for GPUs takes minutes on a CPU
    verdict = WARNING if process.device.type == "cpu" else FAIL
    process.measure("model", trial.run_passes, PASS_SECONDS, (verdict, late))
    return gather(LAST, Report.end)


def _plan_trial(report: Report) -> tuple[tuple[int, int], bool]:
    """Return rows and columns of the grid, and whether all processes can send to each other.

    The grid is that of the data or, if they cannot be read anywhere, of the config or a default.
    """
    read = [found["data"].facts["shape"] for found in report.found if "data" in found and found["data"].facts]
    model, size = report.config.model, len(report.found)
    grid_shape = (*read, model.img_size or (12 * model.patch_size, 16 * model.patch_size))[0]
    return grid_shape, size > 1 and not any(found["network"].findings for found in report.found)
