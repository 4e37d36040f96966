"""A run directory whose first checkpoint comes from a Lightning .ckpt file, a config and its data."""

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
from topoflow.data.assembly import open_forecast_data
from topoflow.errors import ResumeRefused, RunDirectoryError
from topoflow.ranks import Context
from topoflow.run_dir import RunDirectory
from topoflow.text import shorten
from topoflow.tools.lightning.comparison import read_schedule
from topoflow.tools.lightning.conversion import Conversion, Destination, convert
from topoflow.tools.lightning.reading import read_lightning
from topoflow.train_state import TrainProgress

log = logging.getLogger(__name__)


def import_run(source: Path, config: Config, context: Context, choice: str | None = None) -> list[str]:
    """Make config.run.dir a run that resumes from a Lightning checkpoint; return the report, line by line.

    Its checkpoint is committed as one of ours, certificate included; nothing is written before all has been checked.

    Args: choice, "trained" or "averaged" weights, where the file holds both.

    Raises:
        RunDirectoryError: the run directory holds checkpoints, is in use or cannot be written.
        ResumeRefused: the file cannot be read, is of no known program, contradicts itself, or does not fit the config.
        ConfigError, DataError, MissingPath: the config or its data cannot be used.
    """
    directory = RunDirectory(config.run.dir, context.launch.job, context.launch.restart)
    _require_empty(directory)
    content = read_lightning(source)
    data = open_forecast_data(config.data, config.model.wind != "none", config.model.terrain != "none")
    plan = build_plan(config, data, context)
    try:
        schedule = read_schedule(content)
        if schedule is not None and config.optim.schedule_length is None:
            optim = dataclasses.replace(config.optim, schedule_length=schedule["T_max"])
            config = dataclasses.replace(config, optim=optim)
        config = resolve(config, data, plan)
        state = build_state(config, data, plan, context)
        parts, mask = (state.model, state.optimizer, state.scheduler), torch.from_numpy(data.mask)
        names = data.input_names, data.target_names
        destination = Destination(*parts[:2], config_to_dict(config), *names, mask, plan.steps_per_epoch)
        conversion = convert(content, destination, choice)
        allow_new = config.checkpoint.allow_new
        restored = restore_state(conversion.state, *parts, allow_new, conversion.rates_from_config)
    except ResumeRefused as refusal:
        raise ResumeRefused(f"{source}: {refusal}") from None
    state.progress = TrainProgress(**conversion.state["progress"])
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
            f"run.dir {directory.path}: holds checkpoints ({shorten(sorted(traces), 3)}): "
            "expected a new folder for an imported run"
        )


def _commit(saved: dict, directory: RunDirectory, config: Config, conversion: Conversion) -> Path:
    """Write config, report, the file's mask and the checkpoint, and hold the folder for as long as that takes."""
    for note in directory.hold():
        log.warning("%s", note)
    try:
        _require_empty(directory)
        directory.write_config(config)
        directory.write_json("import.json", conversion.to_dict())
        if conversion.mask is not None:
            with directory.writing():
                np.save(directory.path / "china_mask.npy", conversion.mask.numpy())
        return CheckpointDirectory(directory.checkpoints, directory.writing).save(saved, is_best=False)
    except OSError as error:
        raise RunDirectoryError(f"run.dir {directory.path}: cannot be written: {error.strerror or error}") from None
    finally:
        directory.release()
