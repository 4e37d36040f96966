"""A run directory whose first checkpoint is another program's: made from a .ckpt file, a config and its data."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import torch

from topoflow.build import build_plan, build_state, build_train_data, capture_with, resolve
from topoflow.certificate import Certifier
from topoflow.checkpoint.directory import CheckpointDirectory
from topoflow.checkpoint.fingerprint import seal
from topoflow.checkpoint.saver import HostBuffer
from topoflow.checkpoint.state import restore_state
from topoflow.config import Config
from topoflow.config_io import config_to_dict
from topoflow.data.assembly import ForecastData, open_forecast_data
from topoflow.errors import RunDirectoryError
from topoflow.ranks import Context
from topoflow.run_dir import RunDirectory
from topoflow.tools.lightning.conversion import Conversion, Destination, convert
from topoflow.tools.lightning.reading import read_lightning
from topoflow.tools.lightning.statements import schedule_length
from topoflow.train_state import TrainProgress, TrainState

log = logging.getLogger(__name__)

MASK = "china_mask.npy"


def import_run(source: Path, config: Config, context: Context) -> list[str]:
    """Make config.run.dir a run that goes on from a Lightning checkpoint; returns the report, line by line.

    Its checkpoint is committed as one of ours, certificate included; nothing is written before all has been checked.

    Raises:
        RunDirectoryError: the run directory holds checkpoints, is in use or cannot be written.
        ResumeRefused: the file cannot be read, is of no known program, or does not fit the config.
        ConfigError, DataError, MissingPath: the config or its data cannot be used.
    """
    directory = RunDirectory(config.run.dir, context.launch.job, context.launch.restart)
    _require_empty(directory)
    content = read_lightning(source)
    data = open_forecast_data(config.data, config.model.wind != "none", config.model.terrain != "none")
    plan = build_plan(config, data, context)
    config = resolve(_adopt_length(config, schedule_length(content)), data, plan)
    state = build_state(config, data, plan, context)
    conversion = convert(content, _destination(state, config, data, plan.steps_per_epoch), str(source))
    allow_new = config.checkpoint.allow_new
    restored = restore_state(
        conversion.state, state.model, state.optimizer, state.scheduler, allow_new, conversion.rates_from_config
    )
    state.progress = TrainProgress(**conversion.state["progress"])
    _give_moments_to_new(state)
    train_data = build_train_data(config, data, data.build_normalization(), plan, context.device)
    capture = capture_with(Certifier(state, train_data, config.train), config, data, context)
    saved = HostBuffer(pinned=False).copy(capture())
    seal(saved)
    folder = _commit(saved, directory, config, conversion)
    loss, samples = saved["certificate"]["probe"]["loss"], saved["certificate"]["probe"]["samples"]
    return [
        f"{source} -> {folder}",
        *conversion.lines,
        *restored.lines(),
        f"probe loss {loss:.6f} on {', '.join(samples)}",
        *(f"warning: {warning}" for warning in conversion.warnings),
    ]


def _require_empty(directory: RunDirectory) -> None:
    traces = CheckpointDirectory(directory.checkpoints).traces()
    if traces:
        raise RunDirectoryError(
            f"run.dir {directory.path}: holds checkpoints ({', '.join(sorted(traces)[:3])}): "
            "expected a new folder for an imported run"
        )


def _adopt_length(config: Config, length: int | None) -> Config:
    """The config with the file's length of the schedule, where it leaves that open."""
    if config.optim.schedule_length is not None or length is None:
        return config
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, schedule_length=length))


def _destination(state: TrainState, config: Config, data: ForecastData, steps_per_epoch: int) -> Destination:
    return Destination(
        model=state.model,
        optimizer=state.optimizer,
        config=config_to_dict(config),
        inputs=data.input_names,
        targets=data.target_names,
        mask=torch.from_numpy(data.mask),
        steps_per_epoch=steps_per_epoch,
    )


def _give_moments_to_new(state: TrainState) -> None:
    """Zero moments at step 0, as AdamW would at its first step, for parameters that the file does not have.

    The checkpoint then holds every name, and a resume from it needs no checkpoint.allow_new.
    """
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in state.optimizer.state:
                zeros = {key: torch.zeros_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
                state.optimizer.state[parameter] = {"step": torch.tensor(0.0), **zeros}


def _commit(saved: dict, directory: RunDirectory, config: Config, conversion: Conversion) -> Path:
    """Write config, report, the file's mask and the checkpoint; the folder is ours only meanwhile."""
    for note in directory.hold():
        log.warning("%s", note)
    try:
        _require_empty(directory)
        directory.write_config(config)
        directory.write_json("import.json", conversion.to_dict())
        if conversion.mask is not None:
            with directory.writing():
                np.save(directory.path / MASK, conversion.mask.numpy())
        return CheckpointDirectory(directory.checkpoints, directory.writing).save(saved, is_best=False)
    except OSError as error:
        raise RunDirectoryError(f"run.dir {directory.path}: cannot be written: {error.strerror or error}") from None
    finally:
        directory.release()
