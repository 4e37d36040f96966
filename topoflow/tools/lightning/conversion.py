"""Import a Lightning checkpoint: turn its contents into a state of ours, compare it with the config, commit it."""

import dataclasses
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from topoflow.build import build_plan, build_state, build_train_data, capture_with, resolve
from topoflow.certificate import Certifier
from topoflow.checkpoint.directory import CheckpointDirectory
from topoflow.checkpoint.fingerprint import seal
from topoflow.checkpoint.saver import HostBuffer
from topoflow.checkpoint.state import capture_state, restore_state
from topoflow.config import Config, OptimConfig
from topoflow.config_io import config_to_dict
from topoflow.data.assembly import ForecastData, open_forecast_data
from topoflow.data.sampling import BatchPlan
from topoflow.errors import ConfigError, ResumeRefused, RunDirectoryError
from topoflow.files import require_writable
from topoflow.ranks import Context
from topoflow.run_dir import RunDirectory
from topoflow.text import matches, shorten
from topoflow.tools.lightning.contents import BATCH_KEYS, Contents, read_contents, read_schedule
from topoflow.tools.lightning.reading import PARTS, is_kind, read_lightning, show
from topoflow.tools.lightning.weights import MASK
from topoflow.train_state import TrainProgress, TrainState

log = logging.getLogger(__name__)

SAME_KEYS = ("data.variables", "model.patch_size", "model.num_heads", "model.drop_rate", "model.drop_path")
"""Keys that our config and the programs' own have in common."""

SCANNED_GRID = (128, 256, 2)
"""Rows, columns and patch size that the predecessor's wind scan is defined on."""


@dataclass(frozen=True)
class Conversion:
    """What a file holds, in our terms.

    state, rates_from_config: as `restore_state` takes them. mask: the file's own, bool [H, W], if it has one. names:
    {name in the file: name here}. lines, warnings: for the user.
    """

    state: dict[str, Any]
    rates_from_config: bool
    mask: Tensor | None
    names: dict[str, str]
    lines: list[str]
    warnings: list[str]


def import_run(source: Path, config: Config, context: Context, choice: str | None = None) -> list[str]:
    """Create a run in config.run.dir that resumes from a Lightning checkpoint; return the lines of the report.

    Its checkpoint is committed as one of ours, certificate included; nothing is written before all has been checked.

    Args: choice, "trained" or "averaged" weights, where the file holds both.

    Raises:
        RunDirectoryError: the run directory holds checkpoints, is in use or cannot be written.
        ResumeRefused: the file cannot be read, is of unknown origin, contradicts itself, or does not fit the config.
        ConfigError, DataError, MissingPath: the config or its data cannot be used, or the folder cannot be written.
    """
    directory = RunDirectory(config.run.dir, context.launch.job, context.launch.restart)
    _require_empty(directory)
    existing = next(folder for folder in (directory.path, *directory.path.absolute().parents) if os.path.exists(folder))
    require_writable(existing)  # before the work; a refusal leaves no folder
    if config.model.base != "none":
        raise ConfigError(
            f"model.base: {config.model.base}: expected none: imported weights forecast the values themselves"
        )
    content = read_lightning(source)
    data = open_forecast_data(config.data, config.model.wind != "none", config.model.terrain != "none")
    plan = build_plan(config, data, context)
    try:
        schedule = read_schedule(content)
        if schedule is not None and config.optim.schedule_length is None:
            optim = dataclasses.replace(config.optim, schedule_length=schedule["T_max"])
            config = dataclasses.replace(config, optim=optim)
        config = resolve(config, data, plan)
        state = build_state(config, data, None, plan, context)
        conversion = convert(content, state, config, data, plan, choice)
        parts = (state.model, state.optimizer, state.scheduler)
        restored = restore_state(conversion.state, *parts, config.checkpoint.allow_new, conversion.rates_from_config)
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
    report = {key: getattr(conversion, key) for key in ("lines", "warnings", "names")}
    try:
        _require_empty(directory)
        directory.write_config(config)
        directory.write_json("import.json", {**report, "progress": conversion.state["progress"]})
        if conversion.mask is not None:
            with directory.writing():
                np.save(directory.path / f"{MASK}.npy", conversion.mask.numpy())
        return CheckpointDirectory(directory.checkpoints, directory.writing).save(saved, is_best=False)
    except OSError as error:
        raise RunDirectoryError(f"run.dir {directory.path}: cannot be written: {error.strerror or error}") from None
    finally:
        directory.release()


def convert(
    checkpoint: Mapping[str, Any],
    state: TrainState,
    config: Config,
    data: ForecastData,
    plan: BatchPlan,
    choice: str | None = None,
) -> Conversion:
    """Return the state in a Lightning checkpoint, under our names, for a run whose `state` is before its first step.

    Args: choice, "trained" or "averaged" weights, where the file holds both.

    Raises:
        ResumeRefused: it is of no known program, its parts contradict each other, or it contradicts the config.
    """
    initial = capture_state(state.model, state.optimizer, state.scheduler)
    inputs, targets, allow_new = list(data.input_names), list(data.target_names), config.checkpoint.allow_new
    contents = read_contents(checkpoint, initial, inputs, targets, choice, allow_new)
    weights, position, interval = contents.weights, contents.position, config.optim.schedule_interval
    groups = {group["name"]: group for group in initial["optimizer"]["groups"]}
    stated = (*_optimizer_settings(contents, groups, config.optim), *_settings(contents, config, data))
    differing = [setting for setting in stated if not same(setting.theirs, setting.ours)]
    allowed = config.checkpoint.allow_changed
    refused = [str(setting) for setting in differing if not (setting.may_differ or matches(setting.key, allowed))]
    if refused:
        raise ResumeRefused(
            f"contradicts the config: {'; '.join(refused)}: "
            "expected the same, or checkpoint.allow_changed to list the keys that may differ"
        )
    samples = _samples_in_epoch(contents, config.train.global_batch_size, plan.steps_per_epoch)
    _require_consistent_schedule(contents, interval)
    # in epochs, rates change where our order of samples begins anew, whatever the length of Lightning's epochs
    steps = position.epoch * plan.steps_per_epoch + samples // config.train.global_batch_size
    rates = {name: group["lr"] for names, group in contents.groups.items() for name in names}
    updates = max((int(entry["step"]) for entry in contents.moments.values()), default=0)
    taken = {
        "model": weights.model(),
        "optimizer": {
            "groups": [{**group, "lr": rates[name]} for name, group in groups.items() if name in rates],
            "state": contents.moments,
        },
        "scheduler": {"steps": steps if interval == "epoch" else position.step},
        "progress": {"step": position.step, "updates": updates, "epoch": position.epoch, "samples_in_epoch": samples},
    }
    theirs = f", of Lightning {position.epoch_batches} batches on each device" if position.epoch_batches else ""
    lines = [
        *_describe_file(checkpoint, contents),
        f"head: kept {len(weights.kept)} of {weights.outputs} outputs, those of {', '.join(data.target_names)}",
        f"step {position.step}, {position.epoch} epochs complete, {samples} samples of the next one done, schedule at "
        f"step {taken['scheduler']['steps']}",
        f"our epoch has {plan.steps_per_epoch} steps{theirs}; train.max_epochs counts ours from step 0",
        "not in the file: the order of its samples (the rest of the epoch follows ours) and the normalization of its "
        "data (the config's is used)",
    ]
    warnings = [*map(str, differing), *contents.warnings]
    if choice == "averaged":
        warnings.append("the weights are averaged ones; the moments are those of the trained weights")
    rates_from_config = any(setting.key.startswith("optim.") for setting in differing)
    return Conversion(taken, rates_from_config, weights.mask, dict(weights.names), lines, warnings)


@dataclass(frozen=True)
class Setting:
    """A setting that the file states, and the config's value of it.

    note: follows the key in messages. may_differ: a difference is only reported.
    """

    key: str
    theirs: Any
    ours: Any
    note: str = ""
    may_differ: bool = False

    def __str__(self) -> str:
        label = f"{self.key} {self.note}".rstrip()
        return f"{label}: {show(self.theirs)} in the file, {show(self.ours)} in the config"


def _optimizer_settings(contents: Contents, groups: Mapping[str, Any], optim: OptimConfig) -> Iterator[Setting]:
    """Yield what optimizer and scheduler of the file state; groups: ours, {name: settings}."""
    for names, group in contents.groups.items():
        for name in names:
            rate, note = group.get("initial_lr", group["lr"]), f"x optim.group_multipliers.{name}"
            yield Setting("optim.learning_rate", rate, groups[name]["initial_lr"], note)
        for key in ("weight_decay", "betas", "eps"):
            yield Setting(f"optim.{key}", group[key], getattr(optim, key))
    schedule = contents.schedule
    yield Setting("optim.schedule", "constant" if schedule is None else "cosine", optim.schedule)
    if schedule is not None:
        yield Setting("optim.schedule_length", schedule["T_max"], optim.schedule_length, "(T_max)")
        yield Setting("optim.eta_min", schedule["eta_min"], optim.eta_min)


def _settings(contents: Contents, config: Config, data: ForecastData) -> Iterator[Setting]:
    """Yield what the weights and the program's own config state."""
    weights, stated, wind = contents.weights, contents.stated, config.model.wind
    ours = {f"{name}.{key}": value for name, keys in config_to_dict(config).items() for key, value in keys.items()}
    for key in [key for key in SAME_KEYS if key in stated]:
        yield Setting(key, stated[key], ours[key], may_differ=key.startswith("model.drop_"))
    if "data.target_variables" in stated:
        yield Setting("data.targets", stated["data.target_variables"], ours["data.targets"])
    if "train.gradient_clip_val" in stated:
        clip = stated["train.gradient_clip_val"]
        yield Setting("optim.grad_clip_norm", None if same(clip, 0) else clip, config.optim.grad_clip_norm)
    if weights.target_indices is not None:
        inputs = list(data.input_names)
        chosen = [inputs.index(target) if target in inputs else None for target in data.target_names]
        yield Setting("data.targets", weights.target_indices, chosen, "(as positions in data.variables)")
    if weights.mask is not None and not np.array_equal(weights.mask.numpy(), data.source.mask):
        cells = [f"{int(mask.sum())} of {list(mask.shape)} cells" for mask in (weights.mask, data.source.mask)]
        note = f"({MASK}.npy in the run directory is the file's)"
        yield Setting("mask of the data", f"{MASK} with {cells[0]}", cells[1], note, may_differ=True)
    if weights.program == "predecessor" and wind != "legacy_regional":
        exists = (*data.source.mask.shape, config.model.patch_size) == SCANNED_GRID
        note = "(the predecessor's)" if exists else "(the predecessor's does not exist on this grid)"
        yield Setting("model.wind", "legacy_regional", wind, note, may_differ=not exists)
    elif stated.get("model.parallel_patch_embed") is True:
        yield Setting("model.wind", "tokens sorted by parallel_patch_embed, which no option does,", wind)
    size = config.train.global_batch_size
    if contents.batch_samples is None and contents.position.batches:
        found = ", ".join(f"{key}: {show(stated[key]) if key in stated else 'missing'}" for key in BATCH_KEYS)
        yield Setting("train.global_batch_size", "unknown", size, f"(which counts the samples of the epoch; {found})")
    elif contents.batch_samples is not None and contents.accumulation is not None:
        yield Setting("train.global_batch_size", contents.batch_samples * contents.accumulation, size)


def same(one: Any, other: Any) -> bool:
    """Return whether two values are equal, numbers to nine digits: products of rates are rounded in any order."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if is_kind(one, float) and is_kind(other, float):
        return math.isclose(one, other, rel_tol=1e-9)
    return type(one) is type(other) and isinstance(one, str | bool | None) and one == other


def _samples_in_epoch(contents: Contents, global_batch_size: int, steps_per_epoch: int) -> int:
    """Return how many samples of the epoch are done; refuse a position that is not between two steps of ours.

    They are counted in optimizer steps of the config's size where the file does not state the size of its batches.
    """
    counted, size, position = "batches", contents.batch_samples, contents.position
    if size is None:
        counted, size = "steps", global_batch_size
    samples = getattr(position, counted) * size
    if samples % global_batch_size or (samples and samples >= steps_per_epoch * global_batch_size):
        raise ResumeRefused(
            f"position: {getattr(position, counted)} {counted} of {size} samples of epoch {position.epoch} are done, "
            f"which is not between two steps of an epoch of {steps_per_epoch} batches of train.global_batch_size = "
            f"{global_batch_size}: expected sizes that fit, or a checkpoint from the end of an epoch"
        )
    return samples


def _require_consistent_schedule(contents: Contents, interval: str) -> None:
    """Refuse a schedule that contradicts the optimizer's rates or the position."""
    groups, position = contents.groups.values(), contents.position
    done = f"after {position.step} steps and {position.epoch} whole epochs, for optim.schedule_interval={interval}"
    for key, expected, reason in (
        ("base_lrs", [group.get("initial_lr") for group in groups], "the groups' initial_lr"),
        ("_last_lr", [group["lr"] for group in groups], "the groups' lr"),
        ("last_epoch", position.epoch if interval == "epoch" else position.step, done),
    ):
        found = expected if contents.schedule is None else contents.schedule[key]
        if not same(found, expected):
            raise ResumeRefused(f"lr_schedulers: {key} {show(found)}: expected {show(expected)}, {reason}")


def _describe_file(checkpoint: Mapping[str, Any], contents: Contents) -> list[str]:
    """Return what the file holds and what was left in it, in lines for the user."""
    weights, groups = contents.weights, contents.groups.values()
    sizes = [f"{show(group.get('name'))} {len(group['params'])}" for group in groups]
    left = [show(name) for name in checkpoint if name not in (*PARTS, "pytorch-lightning_version", "hparams_name")]
    mask = [] if weights.mask is None else [f"china_mask: {weights.mask.sum()} of {weights.mask.numel()} cells used"]
    return [
        f"{weights.program} program, Lightning {show(checkpoint.get('pytorch-lightning_version'))}",
        f"in the file: weights {len(weights.names)}, moments {len(contents.moments)}/"
        f"{sum(len(group['params']) for group in groups)} in {len(groups)} group(s): {', '.join(sizes)}",
        *mask,
        f"not carried over: {', '.join([*left, 'best validation loss'])}",
    ]
