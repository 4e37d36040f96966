"""The command: meet the other processes, measure, judge on rank 0, print, and end all with the same status."""

import dataclasses
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from topoflow.config import Config, DataConfig, ModelConfig, TrainConfig
from topoflow.config_io import load_config
from topoflow.errors import ConfigError, RanksDisagree, Refusal
from topoflow.launch import Launch, choose_device, read_launch
from topoflow.logs import close_logging, setup_logging
from topoflow.ranks import Context
from topoflow.rendezvous import distributed_context
from topoflow.reproducibility import set_deterministic
from topoflow.tools.doctor import judge
from topoflow.tools.doctor.network import describe_address, drop_missing_interfaces, measure_pairs, time_all_reduce
from topoflow.tools.doctor.probe import Process, ask, greet, is_stuck, measure
from topoflow.tools.doctor.report import Report
from topoflow.tools.doctor.trial import build_trial_model, run_passes

MEET_SECONDS, SILENT_SECONDS = 60.0, 120.0
"""How long processes wait for each other to start (Python may be on a slow file system), and for one that hangs."""
BUILD_SECONDS, PASS_SECONDS = 20.0, 20.0
SMALL = Config(
    data=DataConfig(path="none", train=(2000,), threads=2),
    train=TrainConfig(max_steps=1),
    model=ModelConfig(embed_dim=64, depth=2, num_heads=4),
)
"""What is examined without a config."""


def doctor(path: Path | None, overrides: Sequence[str] = (), as_json: bool = False) -> int:
    """Examine the machines of this launch; return the exit status, the same on all processes."""
    names = ("config", "run_directory", "data", "launcher", "launcher_reason", "processes")
    head: dict[str, Any] = {**dict.fromkeys(names), "config": str(path) if path else None}
    try:
        launch = read_launch()
    except Refusal as refusal:
        report = Report(head, SMALL, is_shown=True, as_json=as_json)
        report.begin({socket.gethostname(): []})
        report.fail("environment", "cannot be used", {socket.gethostname(): str(refusal)})
        return report.end(refusal.exit_status)
    # refusals are reported with those of the others: a process that ended here would leave them waiting
    config, device, refusals = SMALL, torch.device("cpu"), {"config": "", "device": ""}
    try:
        config = load_config(path, overrides) if path else config
    except Refusal as refusal:
        refusals["config"] = str(refusal)
    try:
        device = choose_device(config.run.device, launch)
        if device.type == "cpu" and config.distributed.backend == "nccl":
            raise ConfigError("distributed.backend: 'nccl' is not usable on CPU: expected gloo or auto")
    except Refusal as refusal:
        refusals["device"] = str(refusal)
    run_dir = Path(config.run.dir if path else ".").absolute()
    process = Process(launch, config, device, run_dir, path is not None, refusals)
    if not refusals["config"]:
        head |= {"run_directory": str(run_dir), "data": config.data.path if path else None}
    head |= {"launcher": launch.launcher, "launcher_reason": launch.reason, "processes": launch.world_size}
    set_deterministic(config.run)
    setup_logging(None, is_main=False)  # only errors
    handler = signal.signal(signal.SIGTERM, _interrupt)  # so that the files in the run directory are removed
    try:
        status = _meet(process, Report(head, config, launch.is_main, as_json))
    finally:
        signal.signal(signal.SIGTERM, handler)
        close_logging()
    if is_stuck():
        sys.stdout.flush()
        os._exit(status)  # a thread that hangs in a file system or in a pass is not waited for
    return status


def _meet(process: Process, report: Report) -> int:
    """Connect to the other processes and examine all, or report that they did not connect or were lost."""
    launch, settings, missing = process.launch, process.config.distributed, drop_missing_interfaces()
    settings = dataclasses.replace(
        settings,
        backend="auto" if process.device.type == "cpu" else settings.backend,
        reduction="ddp",
        setup_timeout_seconds=min(MEET_SECONDS, settings.setup_timeout_seconds),
        timeout_seconds=SILENT_SECONDS,
    )

    def on_forced_exit(_: int, message: str) -> None:
        ask(process.left.close)
        if report.nodes:
            report.end_as_lost(message)

    try:
        with distributed_context(launch, settings, process.device, on_forced_exit) as context:
            try:
                context.watch.mark("preparing the checks")
                greeting = greet(process, ask(describe_address, launch, missing))
                return _examine(context, process, report, context.ask_main(greeting, list))
            finally:
                ask(process.left.close)
    except (Refusal, RuntimeError) as error:  # torch.distributed raises RuntimeError when a process has ended
        text = (str(error).splitlines() or [type(error).__name__])[0]
        is_shared = getattr(error, "shared", False)
        if process.refusals["device"] and not report.nodes:  # may be why the processes do not connect
            text, is_shared = f"{process.refusals['device']}; {text}", False
        if not (launch.is_main or is_shared):
            print(f"topoflow: rank {launch.rank}: {text}", file=sys.stderr, flush=True)
        if report.nodes:
            return report.end_as_lost(text)
        node, late = socket.gethostname(), find_missing(launch, text)
        report.begin({node: [launch.rank], **late})
        summary = "the processes did not connect: nothing else was examined"
        report.fail("ranks", summary, {**dict.fromkeys(late, "never connected"), node: text})
        return report.end(error.exit_status if isinstance(error, Refusal) else RanksDisagree.exit_status)


def find_missing(launch: Launch, message: str) -> dict[str, list[int]]:
    """Return {host: ranks} of the ranks that a message names as `rank(s) 0-3, 7 of 8`, if SLURM tells the hosts."""
    hosts, named = launch.hosts, re.search(r"rank\(s\) ([0-9, -]+?) of", message)
    missing: dict[str, list[int]] = {}
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", named[1]) if named and hosts else ():
        for rank in range(int(first), int(last or first) + 1):
            missing.setdefault(hosts[rank], []).append(rank)
    return missing


def _examine(context: Context, process: Process, report: Report, greetings: list[dict[str, Any]]) -> int:
    """Measure and judge, on processes that have met; return the status. greetings: of each rank, see `greet`."""
    config, device, ranks_of = process.config, process.device, {}
    for rank, greeting in enumerate(greetings):
        ranks_of.setdefault(greeting["node"], []).append(rank)
    report.begin(ranks_of)
    report.add_facts(greetings)
    if refused := {r: item["refusals"]["config"] for r, item in enumerate(greetings) if item["refusals"]["config"]}:
        report.fail("config", "cannot be used: nothing else was examined", refused)
        return report.end(ConfigError.exit_status)

    def judge_all(facts: dict[str, Any], checks: judge.Checks, answer: Callable[[Report], Any]) -> Any:
        """Send facts to rank 0, which makes some checks; return its answer on all ranks."""

        def on_main(gathered: list[dict[str, Any]]) -> Any:
            report.add_facts(gathered)
            for name, check in checks.items():
                report.judge(name, check)
            return answer(report)

        return context.ask_main(facts, on_main)

    context.watch.mark("checks of each process")
    grid_shape = judge_all(measure(process, greetings), judge.LOCAL_CHECKS, judge.find_grid_shape)
    built = ask(build_trial_model, config, grid_shape, seconds=BUILD_SECONDS)
    model = built.pop("model", None)
    facts = {"model": built}
    network = judge_all(facts, judge.STORAGE_CHECKS, _plan_network)
    if network is not None:
        context.watch.mark("check of the network")
        network_device = device if network["on_gpu"] else torch.device("cpu")
        facts["all-reduce"] = time_all_reduce(context, network["gradient_bytes"], network_device)
        if len(leaders := [ranks[0] for ranks in ranks_of.values()]) > 1:
            facts["pairs"] = measure_pairs(context, leaders, network_device)
    context.watch.mark("check of the model")
    if model is not None:
        facts["pass"] = ask(run_passes, model, config, grid_shape, device, seconds=PASS_SECONDS)
        if "is_late" in facts["pass"]:
            text = f"no forward and backward pass ended within {PASS_SECONDS:g} s, on {device.type}"
            # a model designed for GPUs takes minutes on a CPU
            facts["pass"] = {"error": text, "is_minor": device.type == "cpu"}
    return judge_all(facts, judge.COMMON_CHECKS, Report.end)


def _plan_network(report: Report) -> dict[str, Any] | None:
    """Return how many bytes all are to reduce, and whether on their GPUs; None if they can send nothing."""
    if len(report.facts) == 1 or any(facts["unreachable"].get("nodes", True) for facts in report.facts):
        return None
    # gloo has no point-to-point transfers between GPUs, and a process without a GPU cannot send from one
    on_gpu = report.config.distributed.backend != "gloo" and {facts["kind"] for facts in report.facts} == {"cuda"}
    return {"gradient_bytes": report.facts[0]["model"].get("gradient_bytes", 0), "on_gpu": on_gpu}


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
