"""The command: meet the other processes, probe, judge on rank 0, print, and end all with the same status."""

import dataclasses
import json
import os
import re
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from topoflow.config import Config, DataConfig, ModelConfig, TrainConfig
from topoflow.config_io import load_config
from topoflow.errors import ConfigError, RanksDisagree, Refusal
from topoflow.launch import Launch, choose_device, hosts_of_ranks, read_launch
from topoflow.logs import close_logging, setup_logging
from topoflow.ranks import Context, distributed_context
from topoflow.reproducibility import set_deterministic
from topoflow.tools.doctor import judge
from topoflow.tools.doctor.probe import (
    Answer,
    ClockServer,
    Greeting,
    Probe,
    find_route,
    forget_missing_interfaces,
)
from topoflow.tools.doctor.report import FAIL, Check, Finding, Report
from topoflow.tools.doctor.trial import ModelTrial, measure_pairs, time_all_reduce

MEET_SECONDS, SILENT_SECONDS = 60.0, 120.0
"""How long processes wait for each other to start (Python may be on a slow file system), and for one that hangs."""
BUILD_SECONDS = 20.0
CHECKPOINT_COPIES = 3
"""A checkpoint holds the weights and two moments."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What this process was asked to examine, and why it cannot use the config or the device, if so.

    path: of the config file, None for the small built-in model.
    """

    path: Path | None
    config: Config
    config_refusal: str | None
    device: torch.device
    device_refusal: str | None

    @property
    def run_dir(self) -> Path:
        """The run directory; without a config, the current folder."""
        return Path(self.config.run.dir) if self.path else Path.cwd()


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rank 0's decisions after the first measurements. network_device: None where the network is not measured."""

    grid_shape: tuple[int, int]
    gradient_bytes: int
    leaders: list[int]
    network_device: str | None
    can_build: bool


def doctor(path: Path | None, overrides: Sequence[str] = (), as_json: bool = False) -> int:
    """Examine what the processes of this launch run on; return the exit status, the same on all of them."""
    try:
        launch = read_launch()
    except Refusal as refusal:
        printer = Printer(Request(path, default_config(), str(refusal), torch.device("cpu"), None), None, as_json)
        printer.begin({socket.gethostname(): []})
        printer.add(Check("environment", "cannot be used", [Finding(FAIL, socket.gethostname(), (), str(refusal))]))
        return printer.end(refusal.exit_status)
    request = read_request(path, overrides, launch)
    printer = Printer(request, launch, as_json)
    set_deterministic(request.config.run, compile=False)
    setup_logging(None, is_main=False)  # only errors
    handler = signal.signal(signal.SIGTERM, _interrupt)  # so that the files in the run directory are removed
    try:
        return _examine_all(launch, request, printer)
    finally:
        signal.signal(signal.SIGTERM, handler)
        close_logging()


def read_request(path: Path | None, overrides: Sequence[str], launch: Launch) -> Request:
    """Read the config and choose the device; keep refusals: a process that ended here would leave others waiting."""
    config, config_refusal, device_refusal = default_config(), None, None
    try:
        config = load_config(path, overrides) if path else config
    except Refusal as refusal:
        config_refusal = str(refusal)
    device = torch.device("cpu")
    try:
        device = choose_device(config.run.device, launch)
        if device.type == "cpu" and config.distributed.backend == "nccl":
            raise ConfigError("distributed.backend: 'nccl' is not usable on CPU: expected gloo or auto")
    except Refusal as refusal:
        device_refusal = str(refusal)
    return Request(path, config, config_refusal, device, device_refusal)


def find_missing(launch: Launch, message: str) -> dict[str, list[int]]:
    """Return {host: ranks} of the ranks that a message names as `rank(s) 0-3, 7 of 8`, if SLURM tells the hosts."""
    named, missing = re.search(r"rank\(s\) ([0-9, -]+?) of", message), {}
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", named[1]) if named else ():
        for rank in range(int(first), int(last or first) + 1):
            for host in hosts_of_ranks(launch)[rank : rank + 1]:
                missing.setdefault(host, []).append(rank)
    return missing


def default_config() -> Config:
    """Return a small model, for use without a config."""
    return Config(
        data=DataConfig(path="none", train=(2000,), workers=2),
        train=TrainConfig(max_steps=1),
        model=ModelConfig(embed_dim=64, depth=2, num_heads=4),
    )


class Printer:
    """Keeps the report, and prints it on rank 0 only: as text check by check, or as one JSON object at the end."""

    def __init__(self, request: Request, launch: Launch | None, as_json: bool):
        self.report: Report | None = None
        self._is_silent, self._as_json = launch is not None and not launch.is_main, as_json
        is_usable = request.path is not None and request.config_refusal is None
        self._facts: dict[str, Any] = {
            "config": str(request.path) if request.path else None,
            "run_directory": None if request.config_refusal else str(request.run_dir.absolute()),
            "data": request.config.data.path if is_usable else None,
            "launcher": launch.launcher if launch else None,
            "launcher_reason": launch.reason if launch else None,
            "processes": launch.world_size if launch else None,
        }

    def begin(self, ranks_of: dict[str, list[int]]) -> None:
        """Start the report. ranks_of: {node: its ranks}."""
        self.report = Report(self._facts, ranks_of)
        self._print(self.report.head_lines())

    def add(self, check: Check) -> None:
        """Add a check to the report."""
        self.report.checks.append(check)
        self._print(self.report.check_lines(check))

    def end(self, status: int | None = None) -> int:
        """Print what comes last; return `status`, by default 1 if a check failed, else 0."""
        if self._as_json and not self._is_silent:
            sys.stdout.write(json.dumps(self.report.to_dict(), indent=1) + "\n")
            sys.stdout.flush()
        self._print(self.report.node_lines())
        return int(self.report.verdict == FAIL) if status is None else status

    def add_lost(self, text: str) -> int:
        """End the report of processes that no longer reach each other: what was found until then is worth knowing."""
        node = next(iter(self.report.ranks_of))
        made = len(self.report.checks)
        finding = Finding(FAIL, node, tuple(self.report.ranks_of[node]), text)
        self.add(Check("connection", f"lost after {made} check(s): no further ones were made", [finding]))
        return self.end(RanksDisagree.exit_status)

    def _print(self, lines: list[str]) -> None:
        if not (self._is_silent or self._as_json):
            print("\n".join(lines), flush=True)


def _examine_all(launch: Launch, request: Request, printer: Printer) -> int:
    """Meet the other processes and examine all, or report that they did not meet or lost each other."""
    forgotten = forget_missing_interfaces()
    config = request.config.distributed
    config = dataclasses.replace(
        config,
        backend="auto" if request.device.type == "cpu" else config.backend,
        reduction="ddp",
        setup_timeout_seconds=min(MEET_SECONDS, config.setup_timeout_seconds),
        timeout_seconds=SILENT_SECONDS,
    )
    probe = Probe(launch, request.config, request.device, request.run_dir)

    def on_forced_exit(_: int, message: str) -> None:
        probe.ask(probe.remove_files)
        if printer.report is not None:
            printer.add_lost(message)

    try:
        with distributed_context(launch, config, request.device, on_forced_exit) as context:
            status = Examination(context, request, probe, printer, forgotten).run()
    except (Refusal, RuntimeError) as error:  # torch.distributed raises RuntimeError when a process is gone
        text = (str(error).splitlines() or [type(error).__name__])[0]
        is_shared = getattr(error, "shared", False)
        if printer.report is None and request.device_refusal:  # may be why the processes do not meet
            text, is_shared = f"{request.device_refusal}; {text}", False
        if not (launch.is_main or is_shared):
            print(f"topoflow: rank {launch.rank}: {text}", file=sys.stderr, flush=True)
        if printer.report is not None:
            status = printer.add_lost(text)
        else:
            node, summary = socket.gethostname(), "the processes did not meet: nothing else was examined"
            missing = find_missing(launch, text)
            printer.begin({node: [launch.rank]} | missing)
            findings = [Finding(FAIL, node, (launch.rank,), text)]
            findings += [Finding(FAIL, host, tuple(ranks), "never arrived") for host, ranks in missing.items()]
            printer.add(Check("ranks", summary, findings))
            status = printer.end(error.exit_status if isinstance(error, Refusal) else RanksDisagree.exit_status)
    if probe.is_stuck:
        sys.stdout.flush()
        os._exit(status)  # a thread that hangs in a file system or in a pass is not waited for
    return status


class Examination:
    """All checks, on processes that have met."""

    def __init__(self, context: Context, request: Request, probe: Probe, printer: Printer, forgotten: dict[str, str]):
        self.context, self.request, self.probe, self.printer = context, request, probe, printer
        self._forgotten, self._config = forgotten, request.config
        self._greetings: list[Greeting] = []
        self._built = Answer()

    def run(self) -> int:
        """Probe, gather, judge, twice: each process by itself, then all together; return the status."""
        context, probe, request = self.context, self.probe, self.request
        route = probe.ask(lambda: find_route(context.launch))
        family = socket.AF_INET if route.value is None else route.value[0]
        with ClockServer(family) as server, probe.temporary_files():
            context.watch.mark("preparing the checks")
            mine = probe.greet(route, server.port, request.config_refusal, request.device_refusal)
            self._greetings = context.ask_main(mine, list)
            nodes = [greeting.node for greeting in self._greetings]
            self.printer.begin(judge.Group(nodes, []).ranks_of)
            refusals = {r: item.config_refusal for r, item in enumerate(self._greetings) if item.config_refusal}
            if refusals:
                self.printer.add(judge.judge_config(judge.Group(nodes, []), refusals))
                return self.printer.end(ConfigError.exit_status)
            context.watch.mark("checks of each process")
            plan: Plan = context.ask_main(
                probe.run(self._greetings, request.path is not None, self._forgotten), self._judge_machines
            )
        trial = ModelTrial(self._config, plan.grid_shape, request.device)
        answers = {}
        if plan.network_device is not None:
            context.watch.mark("check of the network")
            device = request.device if plan.network_device == "cuda" else torch.device("cpu")
            answers["all-reduce"] = Answer(time_all_reduce(context, plan.gradient_bytes, device))
            if len(plan.leaders) > 1:
                answers["pairs"] = Answer(measure_pairs(context, plan.leaders, plan.gradient_bytes, device))
        context.watch.mark("check of the model")
        if plan.can_build:
            probe.ask(trial.build, BUILD_SECONDS)
            context.ask_main(None, lambda _: None)  # so that all make their passes at the same time
            answers["pass"] = probe.ask(trial.run, judge.PASS_SECONDS)
            answers["device"] = Answer({"kind": request.device.type})
        return context.ask_main(answers, lambda gathered: self._judge_trials(gathered, plan, trial))

    def _judge_machines(self, gathered: list[dict[str, Answer]]) -> Plan:
        """Judge what each process measured by itself, and plan what all measure together. On rank 0."""
        group = judge.Group([greeting.node for greeting in self._greetings], gathered)
        config, launch, add = self._config, self.context.launch, self.printer.add
        is_configured, leaders = self.request.path is not None, [ranks[0] for ranks in group.ranks_of.values()]
        add(judge.judge_ranks(group, config, is_configured))
        refusals = {r: item.device_refusal for r, item in enumerate(self._greetings) if item.device_refusal}
        add(judge.judge_devices(group, refusals))
        add(judge.judge_processors(group, config.data.workers))
        add(judge.judge_software(group))
        add(judge.judge_addresses(group, launch.address, launch.port))
        add(judge.judge_clocks(group))
        add(judge.judge_caches(group, self._greetings, config.train.compile))
        check, grid_shape = judge.judge_data(group, config, is_configured)
        add(check)
        add(judge.judge_limits(group, config.data.workers))
        self._built = self.probe.ask(ModelTrial(config, grid_shape, self.request.device).build, BUILD_SECONDS)
        gradient_bytes = self._built.value or 0
        kept = config.checkpoint.keep_last + config.checkpoint.keep_best + 1
        run_dir, token = self.request.run_dir, self._greetings[0].token
        add(judge.judge_storage(group, token, run_dir, CHECKPOINT_COPIES * gradient_bytes, kept))
        connections = judge.judge_connections(group)
        if connections.findings:
            add(connections)
        # gloo moves nothing between GPUs one by one, and a process without a GPU can send nothing from one
        on_device = {item.device_kind for item in self._greetings} == {"cuda"} and config.distributed.backend != "gloo"
        device = None if connections.findings or launch.world_size == 1 else "cuda" if on_device else "cpu"
        return Plan(grid_shape, gradient_bytes, leaders, device, self._built.error is None)

    def _judge_trials(self, gathered: list[dict[str, Answer]], plan: Plan, trial: ModelTrial) -> int:
        """Judge what all processes measured together; return the status of all. On rank 0."""
        group = judge.Group([greeting.node for greeting in self._greetings], gathered)
        if plan.network_device is not None or self.context.world_size == 1:
            self.printer.add(judge.judge_network(group, plan.gradient_bytes))
        self.printer.add(judge.judge_model(group, self._built, trial))
        return self.printer.end()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
