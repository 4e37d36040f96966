"""All checks in their order, on all processes together."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from topoflow.config import Config
from topoflow.ranks import Context
from topoflow.tools.doctor.address import check_addresses
from topoflow.tools.doctor.caches import check_caches
from topoflow.tools.doctor.clock import check_clocks
from topoflow.tools.doctor.compute import BUILD_SECONDS, ModelTrial, check_compute
from topoflow.tools.doctor.devices import check_devices
from topoflow.tools.doctor.limits import check_limits
from topoflow.tools.doctor.network import check_network
from topoflow.tools.doctor.processors import check_processors
from topoflow.tools.doctor.ranks import check_ranks
from topoflow.tools.doctor.reading import check_data
from topoflow.tools.doctor.report import Check, Report
from topoflow.tools.doctor.software import check_software
from topoflow.tools.doctor.storage import check_storage
from topoflow.tools.doctor.survey import Survey, values

_CHECKPOINT_COPIES = 3
"""A checkpoint holds the weights and two moments."""


@dataclass(frozen=True)
class Request:
    """What is to be examined, and what this process had to give up in order to take part.

    path: of the config file, None for the doctor's own small model. device_refusal: why this process has not the device
    that it should have. forgotten: interface variables that name no interface here.
    """

    config: Config
    path: Path | None
    device_refusal: str | None
    forgotten: dict[str, str]

    @property
    def run_dir(self) -> Path:
        """The run directory; without a config, the current one."""
        return Path(self.config.run.dir) if self.path else Path.cwd()


def facts(context: Context, request: Request) -> dict[str, str | int | None]:
    """What stands at the head of a report."""
    return {
        "config": str(request.path) if request.path else None,
        "run_directory": str(request.run_dir.absolute()),
        "data": request.config.data.path if request.path else None,
        "launcher": context.launch.launcher,
        "launcher_reason": context.launch.reason,
        "processes": context.world_size,
    }


def examine(survey: Survey, request: Request, report: Report, say: Callable[[Check], None]) -> None:
    """Make all checks, add each to the report and tell `say` of it. All processes make them together, and agree.

    Raises:
        RuntimeError: the processes no longer reach each other.
    """
    for check in _checks(survey, request):
        survey.context.watch.mark(f"after the check of {check.name}")
        report.checks.append(check)
        say(check)


def _checks(survey: Survey, request: Request) -> Iterator[Check]:
    config, is_configured = request.config, request.path is not None
    yield check_ranks(survey, config, is_configured)
    yield check_devices(survey, request.device_refusal)
    yield check_processors(survey, config.data.workers)
    yield check_software(survey)
    yield check_addresses(survey, request.forgotten)
    yield check_clocks(survey)
    yield check_caches(survey, config.train.compile)
    check, grid_shape = check_data(survey, config, is_configured)
    yield check
    yield check_limits(survey, config, grid_shape)
    trial = ModelTrial(config, grid_shape, survey.context.device)
    built = survey.ask_ranks(trial.build, BUILD_SECONDS)
    gradient_bytes = min(values(built).values(), default=0)
    kept = config.checkpoint.keep_last + config.checkpoint.keep_best + 1
    yield check_storage(survey, request.run_dir, _CHECKPOINT_COPIES * gradient_bytes, kept)
    yield check_network(survey, gradient_bytes, config.distributed.backend)
    is_built = len(values(built)) == survey.context.world_size
    check = check_compute(survey, trial, is_built)
    yield dataclasses.replace(check, findings=[*survey.failures(built), *check.findings])
