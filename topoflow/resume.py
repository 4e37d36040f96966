"""From what a run starts: nothing, a checkpoint to go on with, or weights to fine-tune. Read by rank 0, sent to all."""

import dataclasses
import fnmatch
import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch

from topoflow.checkpoint import (
    CheckpointDirectory,
    broadcast_state,
    find_checkpoint,
    read_checkpoint,
    restore_state,
    restore_weights,
)
from topoflow.config import CheckpointConfig, Config, TrainConfig, changed_on_resume, config_to_dict
from topoflow.data import ForecastData
from topoflow.distributed import Context
from topoflow.errors import ConfigError, ResumeRefused, RunDirectoryError
from topoflow.reproducibility import describe_software
from topoflow.run_directory import RunDirectory
from topoflow.tracking import MetricsWriter
from topoflow.trainer import TrainProgress, TrainState

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run starts from. `state` is on every rank; of a fine-tune it holds the weights only."""

    kind: Literal["new", "resume", "fine-tune"]
    path: Path | None = None
    state: dict[str, Any] | None = None


def read_start(config: CheckpointConfig, checkpoints: CheckpointDirectory, context: Context) -> Start:
    """Find and read what checkpoint.resume and checkpoint.init_from ask for; rank 0 alone touches files.

    Raises:
        RunDirectoryError: resume=never, or another run's checkpoint, in a directory that holds checkpoints.
        ResumeRefused: a checkpoint is damaged.
        MissingPath: a path is not there.
    """
    start = Start("new")
    with context.together("reading the checkpoint"):
        if context.is_main:
            checkpoints.clean_up()
            start = _read_start(config, checkpoints)
    kind, path = context.broadcast_object((start.kind, start.path))
    return Start(kind, path, broadcast_state(context, start.state) if kind != "new" else None)


def _read_start(config: CheckpointConfig, checkpoints: CheckpointDirectory) -> Start:
    if config.resume == "never" and checkpoints.steps():
        raise RunDirectoryError(
            f"checkpoint.resume: never, but {checkpoints.path} holds {len(checkpoints.steps())} checkpoint(s): "
            "expected another run.dir, or resume=auto"
        )
    if config.resume == "auto" or _was_asked_before(config.resume, checkpoints):
        newest = checkpoints.newest_whole()
        if newest is not None:
            return Start("resume", *newest)
    if config.resume not in ("auto", "never"):
        return _read_named(Path(config.resume), checkpoints)
    if config.init_from is not None:
        path = find_checkpoint(Path(config.init_from))
        return Start("fine-tune", path, {"model": read_checkpoint(path)["model"]})
    return Start("new")


def _read_named(path: Path, checkpoints: CheckpointDirectory) -> Start:
    if path.is_file() and path.name != "state.pt":
        raise ConfigError(f"checkpoint.resume: {path} is a file: expected a checkpoint folder or a run directory")
    folder = CheckpointDirectory(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    found = folder.folder(folder.steps()[-1]) if folder.steps() else find_checkpoint(path)
    if checkpoints.steps() and found.parent.resolve() != checkpoints.path.resolve():
        raise RunDirectoryError(
            f"checkpoint.resume: {path} is of another run, and {checkpoints.path} holds checkpoints: "
            "expected resume=auto to go on with those, or an empty run.dir"
        )
    return Start("resume", *folder.newest_whole()) if folder.steps() else Start("resume", found, read_checkpoint(found))


def _was_asked_before(path: str, checkpoints: CheckpointDirectory) -> bool:
    """Whether this run has started from `path` already and got on: then a requeued job goes on where it stopped."""
    report = checkpoints.path.parent / "resume.json"
    return path != "never" and report.is_file() and json.loads(report.read_text()).get("asked") == path


def adopt_saved(start: Start, config: Config) -> Config:
    """The config with what the first start of the run resolved and this one leaves open."""
    saved = start.state["config"]
    model, optim = config.model, config.optim
    if optim.schedule_length is None:
        optim = dataclasses.replace(optim, schedule_length=saved["optim"]["schedule_length"])
    if model.img_size is None and saved["model"]["img_size"] is not None:
        model = dataclasses.replace(model, img_size=tuple(saved["model"]["img_size"]))
    return dataclasses.replace(config, model=model, optim=optim)


def require_resumable(start: Start, config: Config, data: ForecastData, steps_per_epoch: int) -> None:
    """Refuse a resume with another config or other data than the checkpoint's, unless checkpoint.allow_changed says so.

    Raises:
        ResumeRefused: naming every key that differs, with both values.
    """
    if start.kind != "resume":
        return
    allowed = config.checkpoint.allow_changed
    refused, accepted = changed_on_resume(start.state["config"], config, allowed)
    now = {"fingerprint": data.source.fingerprint, "mask_fingerprint": data.mask_fingerprint}
    for name, value in now.items():
        if start.state["data"][name] != value:
            listed = any(fnmatch.fnmatchcase(f"data.{name}", pattern) for pattern in allowed)
            line = f"data.{name}: {start.state['data'][name][:12]} -> {value[:12]}"
            (accepted if listed else refused).append(line)
    if refused:
        raise ResumeRefused(
            f"checkpoint {start.path}: its config or data differ from this run's: {'; '.join(refused)}: "
            "expected the same, or checkpoint.allow_changed to list what may differ"
        )
    for line in accepted:
        log.warning("changed since the checkpoint, as checkpoint.allow_changed says: %s", line)
    _require_place_in_epoch(start.state["progress"]["samples_in_epoch"], config.train, steps_per_epoch)


def _require_place_in_epoch(samples: int, config: TrainConfig, steps_per_epoch: int) -> None:
    """With other data or another batch size, if allowed, the position may be inside a batch or past the end."""
    if samples % config.global_batch_size or samples >= steps_per_epoch * config.global_batch_size:
        raise ResumeRefused(
            f"{samples} samples of the epoch are done, which is no place between two steps of an epoch of "
            f"{steps_per_epoch} batches of train.global_batch_size = {config.global_batch_size}: "
            "expected sizes that fit, or a checkpoint from the end of an epoch"
        )


def is_normalized_alike(start: Start, config: Config, data: ForecastData) -> bool:
    """Whether the checkpoint's normalization is what this run's config and data would give."""
    saved, now = start.state["config"]["data"], config_to_dict(config)["data"]
    same = all(saved[key] == now[key] for key in ("normalization", "train", "variables", "targets", "availability"))
    return same and start.state["data"]["fingerprint"] == data.source.fingerprint


def keep_or_forget_best(
    progress: TrainProgress, checkpoints: CheckpointDirectory, config: CheckpointConfig, context: Context
) -> None:
    """Point `best` to the checkpoint that the restored progress calls the best, or judge anew where it is not here."""
    here = None
    if context.is_main and config.keep_best and progress.best_step in checkpoints.steps():
        here = checkpoints.folder(progress.best_step)
    if context.is_main:
        checkpoints.point("best", here)
    if context.broadcast_object(here) is None and config.keep_best and progress.best_step is not None:
        log.warning("the best checkpoint, of step %d, is not in this run: the next validation is", progress.best_step)
        progress.best_validation_loss, progress.best_step, progress.validations_since_best = None, None, 0


def restore_start(start: Start, state: TrainState, config: Config, context: Context) -> dict[str, Any]:
    """Put what the run starts from into `state`, by name, on every rank; returns the report that resume.json holds.

    Raises:
        ResumeRefused: something could not be restored; the message names it.
    """
    if start.kind == "new":
        return {}
    allow_new = config.checkpoint.allow_new
    with context.together("restoring the checkpoint"):
        if start.kind == "fine-tune":
            report = restore_weights(state.model, start.state["model"], allow_new)
        else:
            refused, accepted = changed_on_resume(start.state["config"], config, config.checkpoint.allow_changed)
            assert not refused, refused
            report = restore_state(
                start.state,
                state.model,
                state.optimizer,
                state.scheduler,
                allow_new,
                rates_from_config=any(line.startswith("optim.") for line in accepted),
            )
            state.progress = TrainProgress(**start.state["progress"])
            _warn_of_software(start.state["software"], context.device)
    what = "fine-tune from" if start.kind == "fine-tune" else "resume from"
    log.info("%s %s (%s)", what, start.path, "weights only, step 0" if start.kind == "fine-tune" else "everything")
    for line in report.lines():
        log.info("  %s", line)
    asked = config.checkpoint.resume
    return {"from": str(start.path), "asked": asked, **dataclasses.asdict(state.progress), **report.to_dict()}


def say_restored(
    start: Start,
    report: dict[str, Any],
    directory: RunDirectory,
    checkpoints: CheckpointDirectory,
    writer: MetricsWriter,
) -> None:
    """On rank 0, once all is in place: resume.json, the event, and no later checkpoint left to be taken by mistake."""
    if start.kind != "resume":
        return
    directory.write_json("resume.json", report)
    writer.resume(report["step"], start.path)
    for folder in checkpoints.set_aside_after(report["step"]):
        log.warning("set aside as %s: this run goes on from step %d", folder.name, report["step"])


def _warn_of_software(saved: dict[str, Any], device: torch.device) -> None:
    now = describe_software(device)
    changed = [f"{name} {saved.get(name)} -> {value}" for name, value in now.items() if saved.get(name) != value]
    if changed:
        log.warning("the bits may differ from those of a run that never stopped: %s", ", ".join(changed))
