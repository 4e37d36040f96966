"""What `topoflow doctor` does: meet, examine, print, and end all processes with one status."""

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from topoflow.config import Config, DataConfig, DistributedConfig, ModelConfig, TrainConfig
from topoflow.config_io import load_config
from topoflow.errors import Refusal
from topoflow.launch import Launch, choose_device, read_launch
from topoflow.logs import close_logging, setup_logging
from topoflow.ranks import Context, distributed_context
from topoflow.reproducibility import set_deterministic
from topoflow.run_dir import report_refusal
from topoflow.tools.doctor.address import forget_missing_interfaces
from topoflow.tools.doctor.examination import Request, examine, facts
from topoflow.tools.doctor.report import FAIL, Check, Finding, Report
from topoflow.tools.doctor.survey import Survey
from topoflow.tools.doctor.text import check_lines, head_lines, last_line, node_lines

PATIENCE_SECONDS = 60.0
"""How long processes wait for each other: to start, Python may read its packages from a slow file system."""


def doctor(path: Path | None, overrides: Sequence[str] = (), as_json: bool = False) -> int:
    """Examine what the processes of this launch run on. Returns 0, or 1 if anything failed, on all of them alike.

    Rank 0 prints; `as_json`: one object when all is done, else line by line.
    """
    launch = None
    try:
        launch = read_launch()
        config = load_config(path, overrides) if path else default_config()
    except Refusal as refusal:
        refusal.shared = True  # all processes read the same file and the same words
        report_refusal(refusal, launch)
        return refusal.exit_status
    device, device_refusal = _choose_device(config, launch)
    request = Request(config, path, device_refusal, forget_missing_interfaces())
    set_deterministic(config.run, compile=False)
    setup_logging(None, is_main=False)  # only errors: the report says what there is to say
    handler = signal.signal(signal.SIGTERM, _interrupt)  # so that what lies in the run directory is removed
    try:
        return _examine_together(launch, request, _Printer(launch.is_main, as_json), device)
    finally:
        signal.signal(signal.SIGTERM, handler)
        close_logging()


def _examine_together(launch: Launch, request: Request, printer: "_Printer", device: torch.device) -> int:
    report = survey = None

    def say_lost(_: int, message: str) -> None:
        """Rank 0 hangs in a collective operation and is about to be ended."""
        if report is not None:
            _add_lost(report, message, printer)

    try:
        with distributed_context(launch, _patience(request.config, device), device, say_lost) as context:
            survey = Survey(context)
            report = Report(facts(context, request), survey.ranks_of)
            printer.begin(report)
            examine(survey, request, report, printer.say)
            printer.end(report)
    except (Refusal, RuntimeError) as error:  # RuntimeError is what torch.distributed raises when a process is gone
        text = (str(error).splitlines() or [type(error).__name__])[0]
        is_shared = getattr(error, "shared", False)
        if report is None and request.device_refusal:  # of which the refusal to meet may be the consequence
            text, is_shared = f"{request.device_refusal}; {text}", False
        if not (launch.is_main or is_shared):
            print(f"topoflow: rank {launch.rank}: {text}", file=sys.stderr, flush=True)
        if report is None:
            _say_not_met(launch, request, printer, text)
        else:
            _add_lost(report, text, printer)
    status = int(report is None or report.verdict == FAIL)
    if survey is not None and survey.left_behind:
        sys.stderr.flush()
        os._exit(status)  # a thread that hangs in a dead file system, or in a pass, is not waited for
    return status


def default_config() -> Config:
    """A small model, where no config is given."""
    return Config(
        data=DataConfig(path="none", train=(2000,), workers=2),
        train=TrainConfig(max_steps=1),
        model=ModelConfig(embed_dim=64, depth=2, num_heads=4),
    )


class _Printer:
    """Prints on rank 0 alone."""

    def __init__(self, is_main: bool, as_json: bool):
        self._is_silent, self._as_json = not is_main, as_json
        self._ranks_of: dict[str, list[int]] = {}

    def begin(self, report: Report) -> None:
        self._ranks_of = dict(report.ranks_of)
        self._print(head_lines(report))

    def say(self, check: Check) -> None:
        self._print(check_lines(check, self._ranks_of))

    def end(self, report: Report) -> None:
        if self._as_json and not self._is_silent:
            print(json.dumps(report.as_dict(), indent=1), flush=True)
        self._print(["", *node_lines(report), "", last_line(report)])

    def _print(self, lines: list[str]) -> None:
        if not (self._is_silent or self._as_json):
            print("\n".join(lines), flush=True)


def _choose_device(config: Config, launch: Launch) -> tuple[torch.device, str | None]:
    """The device, or the CPU and why it is not the right one: a process that ended here would leave others waiting."""
    try:
        device = choose_device(config.run.device, launch)
    except Refusal as refusal:
        return torch.device("cpu"), str(refusal)
    if device.type == "cpu" and config.distributed.backend == "nccl":
        return device, "distributed.backend: 'nccl' is not usable on CPU: expected gloo or auto"
    return device, None


def _patience(config: Config, device: torch.device) -> DistributedConfig:
    """The config's own way to communicate, with less patience."""
    backend = "auto" if device.type == "cpu" else config.distributed.backend
    return dataclasses.replace(
        config.distributed,
        backend=backend,
        reduction="ddp",
        setup_timeout_seconds=PATIENCE_SECONDS,
        timeout_seconds=PATIENCE_SECONDS,
    )


def _say_not_met(launch: Launch, request: Request, printer: _Printer, text: str) -> None:
    """The report where not all processes met: there is rank 0 to tell of."""
    alone = dataclasses.replace(launch, world_size=1)
    survey = Survey(Context(alone, torch.device("cpu")))
    report = Report({**facts(survey.context, request), "processes": launch.world_size}, survey.ranks_of)
    check = Check("ranks", "the processes did not come together: nothing else was examined")
    check.findings += survey.about_all(FAIL, text)
    report.checks.append(check)
    printer.begin(report)
    printer.say(check)
    printer.end(report)


def _add_lost(report: Report, text: str, printer: _Printer) -> None:
    """The processes no longer reach each other: what was found until then is still worth saying."""
    check = Check("connection", f"lost after {len(report.checks)} check(s): no further ones were made")
    node = next(iter(report.ranks_of))
    check.findings = [Finding(FAIL, node, tuple(report.ranks_of[node]), text)]
    report.checks.append(check)
    printer.say(check)
    printer.end(report)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
