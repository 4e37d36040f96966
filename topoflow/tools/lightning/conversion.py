"""Import a Lightning checkpoint: turn its contents into a state of ours, compare it with the config, commit it."""

import dataclasses
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from topoflow import build
from topoflow.certificate import Certifier
from topoflow.checkpoint.directory import CheckpointDirectory
from topoflow.checkpoint.fingerprint import seal
from topoflow.checkpoint.saver import HostBuffer
from topoflow.checkpoint.state import capture_state, groups_by_parameter, restore_state
from topoflow.config import Config, OptimConfig
from topoflow.config_io import config_to_dict
from topoflow.data.assembly import ForecastData
from topoflow.data.sampling import BatchPlan
from topoflow.errors import ConfigError, ResumeRefused, RunDirectoryError
from topoflow.files import require_writable
from topoflow.ranks import Context
from topoflow.run_dir import RunDirectory
from topoflow.text import matches, shorten
from topoflow.tools.lightning import training
from topoflow.tools.lightning.reading import PARTS, as_mapping, is_kind, read_lightning, require, same, show
from topoflow.tools.lightning.weights import MASK, Weights, read_weights
from topoflow.train_state import TrainProgress, TrainState

log = logging.getLogger(__name__)

SAME_KEYS = {"data.variables": "data.variables", "data.target_variables": "data.targets",
             "model.patch_size": "model.patch_size", "model.num_heads": "model.num_heads",
             "model.drop_rate": "model.drop_rate", "model.drop_path": "model.drop_path"}  # fmt: skip
"""{key of the programs' own config: the key of ours that means the same}."""

MAY_DIFFER = ("model.drop_rate", "model.drop_path", "mask", "wind")
"""Settings whose difference is only reported."""

BATCH_KEYS = ("train.batch_size", "train.devices", "train.num_nodes")
"""Keys of a program's own config whose product is the samples in one batch of all devices."""

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
    data = build.open_data(config, context)
    plan = build.build_plan(config, data, context)
    try:
        schedule = training.read_schedule(content)
        if schedule is not None and config.optim.schedule_length is None:
            optim = dataclasses.replace(config.optim, schedule_length=schedule["T_max"])
            config = dataclasses.replace(config, optim=optim)
        config = build.resolve(config, data, plan)
        state = build.build_state(config, data, None, plan, context)
        conversion = convert(content, state, config, data, plan, choice)
        parts = (state.model, state.optimizer, state.scheduler)
        restored = restore_state(conversion.state, *parts, config.checkpoint.allow_new, conversion.rates_from_config)
    except ResumeRefused as refusal:
        raise ResumeRefused(f"{source}: {refusal}") from None
    state.progress = TrainProgress(**conversion.state["progress"])
    normalization = build.build_normalization(config, data, context)
    train_data = build.build_train_data(config, data, normalization, plan, context)
    capture = build.capture_with(Certifier(state, train_data, config.train), config, data, context)
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
    size, interval = config.train.global_batch_size, config.optim.schedule_interval
    home = groups_by_parameter(initial["optimizer"]["groups"])
    weights = read_weights(checkpoint, choice, initial["model"], list(data.input_names), list(data.target_names))
    groups, moments = training.read_optimizer(checkpoint, weights, home)
    warnings = training.check_moments(checkpoint, moments, config.checkpoint.allow_new)
    schedule, stated = training.read_schedule(checkpoint), _read_stated(checkpoint)
    batch_samples, accumulation = _count(stated, *BATCH_KEYS), _count(stated, "train.accumulate_grad_batches")
    position = training.read_position(checkpoint, accumulation)
    theirs = {home[name]: group for group in groups for name in group["params"]}
    ours = [group for group in initial["optimizer"]["groups"] if group["name"] in theirs]
    differing = _compare(
        [
            *_optimizer_settings([(theirs[group["name"]], group) for group in ours], schedule, config.optim),
            *_network_settings(weights, stated, config, data),
            *_batch_settings(stated, position, size),
        ],
        config.checkpoint.allow_changed,
    )
    # counted in steps of the config's size where the file does not state the size of its batches
    count, what, each = position.batches, "batches", batch_samples
    if each is None:
        count, what, each = position.steps, "steps", size
    samples = count * each
    plan.require_position(samples, f"{count} {what} of {each} samples of epoch {position.epoch}")
    # in epochs, rates change where our order of samples begins anew, whatever the length of Lightning's epochs
    steps = position.epoch * plan.steps_per_epoch + samples // size if interval == "epoch" else position.step
    training.require_consistent_schedule(schedule, groups, position, interval)
    taken = {
        "model": weights.model(),
        "optimizer": {"groups": [{**group, "lr": theirs[group["name"]]["lr"]} for group in ours], "state": moments},
        "scheduler": {"steps": steps},
        "progress": {
            "step": position.step,
            "updates": max((int(entry["step"]) for entry in moments.values()), default=0),
            "epoch": position.epoch,
            "samples_in_epoch": samples,
        },
    }
    batches = f", of Lightning {position.epoch_batches} batches on each device" if position.epoch_batches else ""
    lines = [
        *_describe_file(checkpoint, weights, groups, moments),
        f"head: kept {len(weights.kept)} of {weights.outputs} outputs, those of {', '.join(data.target_names)}",
        f"step {position.step}, {position.epoch} epochs complete, {samples} samples of the next one done, schedule at "
        f"step {steps}",
        f"our epoch has {plan.steps_per_epoch} steps{batches}; train.max_epochs counts ours from step 0",
        "not in the file: the order of its samples (the rest of the epoch follows ours) and the normalization of its "
        "data (the config's is used)",
    ]
    if choice == "averaged":
        warnings.append("the weights are averaged ones; the moments are those of the trained weights")
    rates_from_config = any(key.startswith("optim.") for key in differing.values())
    return Conversion(taken, rates_from_config, weights.mask, weights.names, lines, [*differing, *warnings])


def _read_stated(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"section.key": value} of the program's own config, as far as the file has it."""
    saved = as_mapping(checkpoint.get("hyper_parameters"))
    sections = as_mapping(saved.get("config", saved))
    return {f"{name}.{key}": value for name, keys in sections.items() for key, value in as_mapping(keys).items()}


def _count(stated: Mapping[str, Any], *keys: str) -> int | None:
    """Return the product of stated values, None unless all are positive whole numbers."""
    values: list[Any] = [stated.get(key) for key in keys]
    return math.prod(values) if all(is_kind(value, int) and value > 0 for value in values) else None


Setting = tuple[str, Any, Any]
"""A key of our config, perhaps with a note; what the file states; the config's value."""


def _compare(settings: Iterable[Setting], allowed: Sequence[str]) -> dict[str, str]:
    """Return {message: key} of the settings that differ, each of which must be permitted."""
    differing = {
        f"{label}: {show(theirs)} in the file, {show(ours)} in the config": label.split()[0]
        for label, theirs, ours in settings
        if not same(theirs, ours)
    }
    refused = [message for message, key in differing.items() if not matches(key, (*MAY_DIFFER, *allowed))]
    require(
        not refused,
        f"contradicts the config: {'; '.join(refused)}: "
        "expected the same, or checkpoint.allow_changed to list the keys that may differ",
    )
    return differing


def _optimizer_settings(
    groups: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]],
    schedule: Mapping[str, Any] | None,
    optim: OptimConfig,
) -> Iterator[Setting]:
    """Yield what optimizer and schedule of the file state; groups: pairs of the file's and ours."""
    for theirs, ours in groups:
        label = f"optim.learning_rate x optim.group_multipliers.{ours['name']}"
        yield label, theirs.get("initial_lr", theirs["lr"]), ours["initial_lr"]
        yield from ((f"optim.{key}", theirs[key], ours[key]) for key in ("weight_decay", "betas", "eps"))
    yield "optim.schedule", "constant" if schedule is None else "cosine", optim.schedule
    if schedule is not None:
        yield "optim.schedule_length (T_max)", schedule["T_max"], optim.schedule_length
        yield "optim.eta_min", schedule["eta_min"], optim.eta_min


def _network_settings(
    weights: Weights, stated: Mapping[str, Any], config: Config, data: ForecastData
) -> Iterator[Setting]:
    """Yield what the weights and the program's own config state."""
    ours = {f"{name}.{key}": value for name, keys in config_to_dict(config).items() for key, value in keys.items()}
    wind, mask, inputs = config.model.wind, data.source.mask, list(data.input_names)
    yield from ((key, stated[theirs], ours[key]) for theirs, key in SAME_KEYS.items() if theirs in stated)
    if "train.gradient_clip_val" in stated:
        clip = stated["train.gradient_clip_val"]
        yield "optim.grad_clip_norm", None if same(clip, 0) else clip, config.optim.grad_clip_norm
    if weights.target_indices is not None:
        chosen = [inputs.index(target) if target in inputs else None for target in data.target_names]
        yield "data.targets (as positions in data.variables)", weights.target_indices, chosen
    if weights.mask is not None and not np.array_equal(weights.mask.numpy(), mask):
        cells = [f"{int(cells.sum())} of {list(cells.shape)} cells" for cells in (weights.mask, mask)]
        yield f"mask of the data ({MASK}.npy in the run directory is the file's)", f"{MASK} with {cells[0]}", cells[1]
    if weights.program == "predecessor" and wind != "legacy_regional":
        label = "model.wind (the predecessor's)"
        if (*mask.shape, config.model.patch_size) != SCANNED_GRID:
            label = "wind (model.wind; the predecessor's does not exist on this grid)"
        yield label, "legacy_regional", wind
    elif stated.get("model.parallel_patch_embed") is True:
        yield "model.wind", "tokens sorted by parallel_patch_embed, which no option does,", wind


def _batch_settings(stated: Mapping[str, Any], position: training.Position, size: int) -> Iterator[Setting]:
    """Yield the size of a step, or what is missing to count the samples of the epoch; size: the config's."""
    step_samples = _count(stated, *BATCH_KEYS, "train.accumulate_grad_batches")
    if step_samples is not None:
        yield "train.global_batch_size", step_samples, size
    elif position.batches and _count(stated, *BATCH_KEYS) is None:
        found = ", ".join(f"{key}: {show(stated[key]) if key in stated else 'missing'}" for key in BATCH_KEYS)
        yield f"train.global_batch_size (which counts the samples of the epoch; {found})", "unknown", size


def _describe_file(
    checkpoint: Mapping[str, Any], weights: Weights, groups: Sequence[Mapping[str, Any]], moments: Mapping[str, Any]
) -> list[str]:
    """Return what the file holds and what was left in it, in lines for the user."""
    sizes = [f"{show(group.get('name'))} {len(group['params'])}" for group in groups]
    total = sum(len(group["params"]) for group in groups)
    left = [show(name) for name in checkpoint if name not in (*PARTS, "pytorch-lightning_version", "hparams_name")]
    mask = [] if weights.mask is None else [f"china_mask: {weights.mask.sum()} of {weights.mask.numel()} cells used"]
    return [
        f"{weights.program} program, Lightning {show(checkpoint.get('pytorch-lightning_version'))}",
        f"in the file: weights {len(weights.names)}, moments {len(moments)}/{total} in {len(groups)} group(s): "
        f"{', '.join(sizes)}",
        *mask,
        f"not carried over: {', '.join([*left, 'best validation loss'])}",
    ]
