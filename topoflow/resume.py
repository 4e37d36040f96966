"""From what a run starts: nothing, a checkpoint to go on with, or weights to fine-tune. Read by rank 0, sent to all."""

import dataclasses
import fnmatch
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from topoflow.certificate import Certifier, Proof
from topoflow.checkpoint.directory import CheckpointDirectory, find_checkpoint
from topoflow.checkpoint.file import read_checkpoint
from topoflow.checkpoint.state import RestoreReport, deliver, plan_state, plan_weights, share_outline
from topoflow.config import CheckpointConfig, Config, TrainConfig
from topoflow.config_io import ADDS_NAMES, changed_on_resume, config_to_dict
from topoflow.data.assembly import ForecastData
from topoflow.errors import ConfigError, ResumeRefused, RunDirectoryError
from topoflow.logs import MetricsWriter
from topoflow.ranks import Context
from topoflow.run_dir import RunDirectory
from topoflow.train_state import TrainProgress, TrainState

log = logging.getLogger(__name__)

REPORT = "resume.json"

ALTERS_RATES = (
    "optim.learning_rate", "optim.weight_decay", "optim.betas", "optim.eps", "optim.group_multipliers",
    "optim.schedule*", "optim.eta_min", "optim.warmup_steps", "data.train", "data.fingerprint", "data.lead_times_hours",
    "train.global_batch_size",
)  # fmt: skip
"""Config keys that change what the schedule gives at a step; those of the data and the batch by the epoch's length."""


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run starts from. `state` is whole on rank 0, in outline on the others; of a fine-tune the weights only."""

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
    return Start(kind, path, share_outline(context, start.state) if kind != "new" else None)


def _read_start(config: CheckpointConfig, checkpoints: CheckpointDirectory) -> Start:
    if config.resume == "never" and checkpoints.traces():
        raise RunDirectoryError(
            f"checkpoint.resume: never, but {checkpoints.path} holds {', '.join(checkpoints.traces())}: "
            "expected another run.dir, or resume=auto"
        )
    asked_before = _was_asked_before(config.resume, checkpoints)
    if config.resume == "auto" or asked_before:
        named = asked_before and checkpoints.steps() and checkpoints.folder(checkpoints.steps()[-1])
        newest = checkpoints.newest_whole(strict=named and _is_same(named, config.resume))
        if newest is not None:
            if asked_before and not _is_same(newest[0], config.resume):
                log.warning(
                    "checkpoint.resume: this run started from %s before, and goes on from %s (to go back to it once "
                    "more, remove %s)", config.resume, newest[0].name, checkpoints.path.parent / REPORT,
                )  # fmt: skip
            return Start("resume", *newest)
    if config.resume not in ("auto", "never"):
        return _read_named(Path(config.resume), checkpoints)
    if config.init_from is not None:
        path = find_checkpoint(Path(config.init_from), run_dir=checkpoints.path.parent)
        parts = ("model", "config", "data")
        whole = read_checkpoint(path, parts)
        return Start("fine-tune", path, {part: whole[part] for part in parts})
    return Start("new")


def _read_named(path: Path, checkpoints: CheckpointDirectory) -> Start:
    if os.path.isfile(path):  # False as well where we may not look
        path = find_checkpoint(path, run_dir=checkpoints.path.parent)
    folder = CheckpointDirectory(path / "checkpoints" if os.path.isdir(path / "checkpoints") else path)
    found = folder.folder(folder.steps()[-1]) if folder.steps() else find_checkpoint(path)
    if checkpoints.steps() and found.parent.resolve() != checkpoints.path.resolve():
        raise RunDirectoryError(
            f"checkpoint.resume: {path} is of another run, and {checkpoints.path} holds checkpoints: "
            "expected resume=auto to go on with those, or an empty run.dir"
        )
    if folder.steps():
        return Start("resume", *folder.newest_whole(strict=True))
    return Start("resume", found, read_checkpoint(found))


def _was_asked_before(path: str, checkpoints: CheckpointDirectory) -> bool:
    """Whether this run has started from `path` already and got on: then a requeued job goes on where it stopped."""
    report = checkpoints.path.parent / REPORT
    if path in ("auto", "never") or not report.is_file():
        return False
    try:
        return json.loads(report.read_bytes())["asked"] == path
    except (ValueError, KeyError, TypeError):
        log.warning("%s: cannot be read: %s is taken as if it were asked for the first time", report, path)
        return False


def _is_same(folder: Path, named: str) -> bool:
    return folder.resolve() in (Path(named).resolve(), Path(named).resolve().parent)


def adopt_saved(start: Start, config: Config) -> Config:
    """The config with what the first start of the run resolved and this one leaves open."""
    saved = start.state["config"]
    model, optim = config.model, config.optim
    if optim.schedule_length is None:
        optim = dataclasses.replace(optim, schedule_length=saved["optim"]["schedule_length"])
    if model.img_size is None and saved["model"]["img_size"] is not None:
        model = dataclasses.replace(model, img_size=tuple(saved["model"]["img_size"]))
    return dataclasses.replace(config, model=model, optim=optim)


def require_same_channels(start: Start, config: Config) -> None:
    """Refuse to fine-tune with other inputs or targets than those that the weights know by position.

    Raises:
        ConfigError: naming the first key that differs, unless checkpoint.allow_changed lists it.
    """
    if start.kind != "fine-tune":
        return
    saved, now = start.state["config"]["data"], config_to_dict(config)["data"]
    for key in ("variables", "targets", "availability"):
        listed = any(fnmatch.fnmatchcase(f"data.{key}", pattern) for pattern in config.checkpoint.allow_changed)
        if saved[key] != now[key] and not listed:
            raise ConfigError(
                f"data.{key}: {saved[key]} -> {now[key]}: expected as in {start.path}: its weights know these channels "
                "by their order (checkpoint.allow_changed may list what may differ)"
            )


def require_resumable(start: Start, config: Config, data: ForecastData, steps_per_epoch: int) -> list[str]:
    """Refuse a resume with another config or other data than the checkpoint's, unless checkpoint.allow_changed says so.

    Returns:
        The config keys that differ as checkpoint.allow_changed permits.

    Raises:
        ResumeRefused: naming every key that differs, with both values.
    """
    if start.kind != "resume":
        return []
    allowed = (*config.checkpoint.allow_changed, *(ADDS_NAMES if config.checkpoint.allow_new else ()))
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
        log.warning("changed since the checkpoint, as checkpoint.allow_changed or allow_new says: %s", line)
    _require_place_in_epoch(start.state["progress"]["samples_in_epoch"], config.train, steps_per_epoch)
    keys = [line.partition(":")[0] for line in accepted]
    return [key for key in keys if any(fnmatch.fnmatchcase(key, p) for p in config.checkpoint.allow_changed)]


def _require_place_in_epoch(samples: int, config: TrainConfig, steps_per_epoch: int) -> None:
    """With other data or another batch size, if allowed, the position may be inside a batch or past the end."""
    if samples % config.global_batch_size or samples >= steps_per_epoch * config.global_batch_size:
        raise ResumeRefused(
            f"{samples} samples of the epoch are done, which is no place between two steps of an epoch of "
            f"{steps_per_epoch} batches of train.global_batch_size = {config.global_batch_size}: "
            "expected sizes that fit, or a checkpoint from the end of an epoch"
        )


def keeps_normalization(start: Start, config: Config) -> bool:
    """Whether the checkpoint's constants stay: the weights know them, also where the user lets the data differ."""
    if start.kind != "resume":
        return False
    saved, now = start.state["config"]["data"], config_to_dict(config)["data"]
    return all(saved[key] == now[key] for key in ("normalization", "variables", "targets", "availability"))


def keep_or_forget_best(
    progress: TrainProgress, checkpoints: CheckpointDirectory, config: CheckpointConfig, context: Context
) -> None:
    """Point `best` to the checkpoint that the restored progress calls the best, or judge anew where it is not here."""
    here = None
    with context.together("the best checkpoint"):
        if context.is_main:
            if config.keep_best and progress.best_step in checkpoints.steps():
                here = checkpoints.folder(progress.best_step)
                if not (checkpoints.path / "best").exists():
                    log.warning("checkpoint pointer %s: is missing: made anew", checkpoints.path / "best")
            checkpoints.point("best", here)
    if context.broadcast_object(here) is None and config.keep_best and progress.best_step is not None:
        log.warning("the best checkpoint, of step %d, is not in this run: the next validation is", progress.best_step)
        progress.best_validation_loss, progress.best_step, progress.validations_since_best = None, None, 0


def restore_start(
    start: Start, state: TrainState, config: Config, changed: Sequence[str], context: Context
) -> RestoreReport:
    """Put what the run starts from into `state`, by name, on every rank.

    Args:
        changed: config keys that differ from the checkpoint's with the user's permission.

    Raises:
        ResumeRefused: something could not be restored; the message names it.
    """
    if start.kind == "new":
        return RestoreReport()
    with context.together("restoring the checkpoint"):
        if start.kind == "fine-tune":
            restore = plan_weights(state.model, start.state["model"], config.checkpoint.allow_new)
        else:
            from_config = any(fnmatch.fnmatchcase(key, pattern) for key in changed for pattern in ALTERS_RATES)
            parts = (state.model, state.optimizer, state.scheduler)
            restore = plan_state(start.state, *parts, config.checkpoint.allow_new, from_config)
    deliver(context, restore.pairs)
    restore.settle()
    what, how = "fine-tune from", "weights only, step 0"
    if start.kind == "resume":
        state.progress = TrainProgress(**start.state["progress"])
        what, how = "resume from", "everything"
    log.info("%s %s (%s)", what, start.path, how)
    for line in restore.report.lines():
        log.info("  %s", line)
    return restore.report


def prove(
    start: Start,
    certifier: Certifier,
    report: RestoreReport,
    config: CheckpointConfig,
    changed: Sequence[str],
    context: Context,
) -> Proof | None:
    """Hold the restored state of every rank against the checkpoint's certificate.

    Raises:
        ResumeRefused: on every rank alike, if a tensor, a rate, a coming sample or the probe loss of any rank is not
            the certified one.
    """
    if start.kind != "resume":
        return None
    with context.together("proof of the resume"):
        if "certificate" not in start.state:
            raise ResumeRefused(
                f"checkpoint {start.path}: of format {start.state['format']}, without a certificate: no proof that a "
                "resume is right: expected one of this version, or checkpoint.init_from to take its weights only"
            )
        proof = certifier.check(start.state["certificate"], report, changed, config.probe_tolerance)
    for line in proof.lines(context.world_size):
        log.info("  %s", line)
    return proof


def set_later_aside(start: Start, state: TrainState, checkpoints: CheckpointDirectory) -> None:
    """On rank 0, once all is proved, before anything else is written: no later checkpoint can be taken by mistake."""
    if start.kind == "resume":
        for folder in checkpoints.set_aside_after(state.progress.step):
            log.warning("set aside as %s: this run goes on from step %d", folder.name, state.progress.step)


def say_restored(
    start: Start,
    state: TrainState,
    report: RestoreReport,
    proof: Proof | None,
    config: CheckpointConfig,
    directory: RunDirectory,
    writer: MetricsWriter,
) -> None:
    """On rank 0, last: resume.json, and the event."""
    if start.kind != "resume":
        return
    directory.write_json(
        REPORT,
        {
            "from": str(start.path),
            "asked": config.resume,
            **dataclasses.asdict(state.progress),
            **report.to_dict(),
            "proof": proof.to_dict(),
        },
    )
    writer.resume(state.progress.step, start.path)
