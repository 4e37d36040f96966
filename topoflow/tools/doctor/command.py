"""The command: meet the other processes, probe, judge on rank 0, print, and end all with the same status."""

import dataclasses
import os
import re
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

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
from topoflow.tools.doctor.probe import Answer, ClockServer, Greeting, Probe, find_route, forget_missing_interfaces
from topoflow.tools.doctor.report import FAIL, Check, Finding, Report
from topoflow.tools.doctor.trial import build_trial_model, measure_pairs, run_passes, time_all_reduce

MEET_SECONDS, SILENT_SECONDS = 60.0, 120.0
"""How long processes wait for each other to start (Python may be on a slow file system), and for one that hangs."""
BUILD_SECONDS = 20.0
CHECKPOINT_COPIES = 3
"""A checkpoint holds the weights and two moments."""


def doctor(path: Path | None, overrides: Sequence[str] = (), as_json: bool = False) -> int:
    """Examine what the processes of this launch run on; return the exit status, the same on all of them."""
    node = socket.gethostname()
    try:
        launch = read_launch()
    except Refusal as refusal:
        report = Report({"config": str(path) if path else None, **dict.fromkeys(FACTS)}, as_json=as_json)
        report.begin({node: []})
        report.add(Check("environment", "cannot be used", [Finding(FAIL, node, (), str(refusal))]))
        return report.end(refusal.exit_status)
    config, config_refusal, device_refusal = default_config(), "", ""
    try:
        config = load_config(path, overrides) if path else config
    except Refusal as refusal:  # reported together with the others: a process that ended here would leave them waiting
        config_refusal = str(refusal)
    device = torch.device("cpu")
    try:
        device = choose_device(config.run.device, launch)
        if device.type == "cpu" and config.distributed.backend == "nccl":
            raise ConfigError("distributed.backend: 'nccl' is not usable on CPU: expected gloo or auto")
    except Refusal as refusal:
        device_refusal = str(refusal)
    run_dir = Path(config.run.dir if path else ".").absolute()
    facts = [None if config_refusal else str(run_dir), config.data.path if path and not config_refusal else None]
    facts += [launch.launcher, launch.reason, launch.world_size]
    report = Report(
        {"config": str(path) if path else None, **dict(zip(FACTS, facts, strict=True))}, launch.is_main, as_json
    )
    set_deterministic(config.run)
    setup_logging(None, is_main=False)  # only errors
    probe = Probe(launch, config, device, run_dir, path is not None, (config_refusal, device_refusal))
    handler = signal.signal(signal.SIGTERM, _interrupt)  # so that the files in the run directory are removed
    try:
        status = _meet_and_examine(launch, config, probe, report)
    finally:
        signal.signal(signal.SIGTERM, handler)
        close_logging()
    if probe.is_stuck:
        sys.stdout.flush()
        os._exit(status)  # a thread that hangs in a file system or in a pass is not waited for
    return status


FACTS = ("run_directory", "data", "launcher", "launcher_reason", "processes")


def default_config() -> Config:
    """Return a small model, for use without a config."""
    return Config(
        data=DataConfig(path="none", train=(2000,), workers=2),
        train=TrainConfig(max_steps=1),
        model=ModelConfig(embed_dim=64, depth=2, num_heads=4),
    )


def _meet_and_examine(launch: Launch, config: Config, probe: Probe, report: Report) -> int:
    """Meet the other processes and examine all, or report that they did not meet or lost each other."""
    forgotten = forget_missing_interfaces()
    distributed = dataclasses.replace(
        config.distributed,
        backend="auto" if probe.device.type == "cpu" else config.distributed.backend,
        reduction="ddp",
        setup_timeout_seconds=min(MEET_SECONDS, config.distributed.setup_timeout_seconds),
        timeout_seconds=SILENT_SECONDS,
    )

    def on_forced_exit(_: int, message: str) -> None:
        probe.ask(probe.remove_files)
        if report.ranks_of:
            report.end_as_lost(message)

    try:
        with distributed_context(launch, distributed, probe.device, on_forced_exit) as context:
            return Examination(context, config, probe, report).run(forgotten)
    except (Refusal, RuntimeError) as error:  # torch.distributed raises RuntimeError when a process is gone
        text = (str(error).splitlines() or [type(error).__name__])[0]
        is_shared, device_refusal = getattr(error, "shared", False), probe.refusals[1]
        if device_refusal and not report.ranks_of:  # may be why the processes do not meet
            text, is_shared = f"{device_refusal}; {text}", False
        if not (launch.is_main or is_shared):
            print(f"topoflow: rank {launch.rank}: {text}", file=sys.stderr, flush=True)
        if report.ranks_of:
            return report.end_as_lost(text)
        node, missing = socket.gethostname(), find_missing(launch, text)
        report.begin({node: [launch.rank], **missing})
        findings = [Finding(FAIL, node, (launch.rank,), text)]
        findings += [Finding(FAIL, host, tuple(ranks), "never arrived") for host, ranks in missing.items()]
        report.add(Check("ranks", "the processes did not meet: nothing else was examined", findings))
        return report.end(error.exit_status if isinstance(error, Refusal) else RanksDisagree.exit_status)


def find_missing(launch: Launch, message: str) -> dict[str, list[int]]:
    """Return {host: ranks} of the ranks that a message names as `rank(s) 0-3, 7 of 8`, if SLURM tells the hosts."""
    hosts, named = launch.hosts, re.search(r"rank\(s\) ([0-9, -]+?) of", message)
    missing: dict[str, list[int]] = {}
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", named[1]) if named and hosts else ():
        for rank in range(int(first), int(last or first) + 1):
            missing.setdefault(hosts[rank], []).append(rank)
    return missing


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rank 0's decisions after the first measurements. network_device: None where the network is not measured."""

    grid_shape: tuple[int, int]
    gradient_bytes: int
    leaders: list[int]
    network_device: str | None


class Examination:
    """All checks, on processes that have met."""

    def __init__(self, context: Context, config: Config, probe: Probe, report: Report):
        self.context, self.config, self.probe, self.report = context, config, probe, report
        self._greetings: list[Greeting] = []
        self._built = Answer()

    def run(self, forgotten: dict[str, str]) -> int:
        """Probe, gather and judge twice: each process by itself, then all together. Returns the status.

        forgotten: see `forget_missing_interfaces`.
        """
        context, probe = self.context, self.probe
        route = probe.ask(partial(find_route, context.launch))
        family = socket.AF_INET if route.value is None else route.value[0]
        with ClockServer(family) as server, probe.temporary_files():
            context.watch.mark("preparing the checks")
            self._greetings = context.ask_main(probe.greet(route, server.port), list)
            group = self._group([])
            self.report.begin(group.ranks_of)
            check = Check("config", "cannot be used: nothing else was examined")
            for rank, greeting in enumerate(self._greetings):
                if greeting.refusals[0]:
                    group.report(check, FAIL, rank, greeting.refusals[0], whole_node=False)
            if check.findings:
                self.report.add(check)
                return self.report.end(ConfigError.exit_status)
            context.watch.mark("checks of each process")
            plan: Plan = context.ask_main(probe.run(self._greetings, forgotten), self._judge_machines)
        answers = {}
        if plan.network_device is not None:
            context.watch.mark("check of the network")
            device = probe.device if plan.network_device == "cuda" else torch.device("cpu")
            answers["all-reduce"] = Answer(time_all_reduce(context, plan.gradient_bytes, device))
            if len(plan.leaders) > 1:
                answers["pairs"] = Answer(measure_pairs(context, plan.leaders, plan.gradient_bytes, device))
        context.watch.mark("check of the model")
        answers["pass"] = probe.ask(partial(build_trial_model, self.config, plan.grid_shape), BUILD_SECONDS)
        context.ask_main(None, lambda _: None)  # so that all make their passes at the same time
        if (model := answers["pass"].value) is not None:
            passes = partial(run_passes, model, self.config, plan.grid_shape, probe.device)
            answers["pass"], kind = probe.ask(passes, judge.PASS_SECONDS), probe.device.type
            if answers["pass"].is_late:
                text = f"no forward and backward pass ended within {judge.PASS_SECONDS:g} s, on {kind}"
                # a model that was made for GPUs takes minutes on a CPU
                answers["pass"] = Answer(error=text, is_minor=kind == "cpu")
        return context.ask_main(answers, partial(self._judge_trials, plan))

    def _group(self, gathered: list[dict[str, Answer]]) -> judge.Group:
        return judge.Group([greeting.node for greeting in self._greetings], gathered)

    def _judge_machines(self, gathered: list[dict[str, Answer]]) -> Plan:
        """Judge what each process measured by itself, and plan what all measure together. On rank 0."""
        group, config, launch, add = self._group(gathered), self.config, self.context.launch, self.report.add
        add(judge.judge_ranks(group, config, self.probe.is_configured))
        refusals = {r: item.refusals[1] for r, item in enumerate(self._greetings) if item.refusals[1]}
        add(judge.judge_devices(group, refusals))
        add(judge.judge_processors(group, launch.launcher, config.data.workers))
        add(judge.judge_software(group))
        add(judge.judge_addresses(group, launch.address, launch.port))
        add(judge.judge_clocks(group))
        add(judge.judge_caches(group, self._greetings, config.train.compile))
        check, grid_shape = judge.judge_data(group, config, self.probe.is_configured)
        add(check)
        add(judge.judge_limits(group, config.data.workers))
        self._built = self.probe.ask(partial(build_trial_model, config, grid_shape), BUILD_SECONDS)
        parameters = () if self._built.value is None else self._built.value.parameters()
        gradient_bytes = sum(parameter.nbytes for parameter in parameters)
        kept = config.checkpoint.keep_last + config.checkpoint.keep_best + 1
        token, checkpoint_bytes = self._greetings[0].token, CHECKPOINT_COPIES * gradient_bytes
        add(judge.judge_storage(group, token, self.probe.run_dir, checkpoint_bytes, kept))
        connections = judge.judge_connections(group)
        if connections.findings:
            add(connections)
        # gloo moves nothing between GPUs one by one, and a process without a GPU can send nothing from one
        on_device = {item.device_kind for item in self._greetings} == {"cuda"} and config.distributed.backend != "gloo"
        device = None if connections.findings or launch.world_size == 1 else "cuda" if on_device else "cpu"
        return Plan(grid_shape, gradient_bytes, [ranks[0] for ranks in group.ranks_of.values()], device)

    def _judge_trials(self, plan: Plan, gathered: list[dict[str, Answer]]) -> int:
        """Judge what all processes measured together; return the status of all. On rank 0."""
        group = self._group(gathered)
        if plan.network_device is not None or self.context.world_size == 1:
            self.report.add(judge.judge_network(group, plan.gradient_bytes))
        self.report.add(judge.judge_model(group, self._built, self.config, plan.grid_shape))
        return self.report.end()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
