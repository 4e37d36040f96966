"""What a Lightning file states about its run, compared with a config."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from topoflow.errors import ResumeRefused
from topoflow.text import matches
from topoflow.tools.lightning.moments import FileGroup
from topoflow.tools.lightning.reading import is_kind, show, take

Sections = Mapping[str, Mapping[str, Any]]
"""{section: {key: value}} of a config."""


@dataclass
class Comparison:
    """Collects differences as lines; `accepted` {key: lines} are of keys that match `allowed` (allow_changed)."""

    allowed: Sequence[str]
    refused: list[str] = field(default_factory=list)
    accepted: dict[str, list[str]] = field(default_factory=dict)

    def compare(self, key: str, stated: Any, configured: Any, name: str | None = None) -> None:
        """Record a difference between the file's value of a config key and the config's."""
        if not same(stated, configured):
            self.add(key, f"{name or key}: {show(stated)} in the file, {show(configured)} in the config")

    def add(self, key: str, line: str) -> None:
        """Record a difference in words."""
        lines = self.accepted.setdefault(key, []) if matches(key, self.allowed) else self.refused
        lines.append(line)

    def raise_if_refused(self) -> None:
        """Raise ResumeRefused, naming both values of each key, if anything differs that may not."""
        if self.refused:
            raise ResumeRefused(
                f"contradicts the config: {'; '.join(self.refused)}: "
                "expected the same, or checkpoint.allow_changed to list the keys that may differ"
            )


def same(one: Any, other: Any) -> bool:
    """Tell whether two values are equal; numbers to nine digits, since products of rates are rounded in any order."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if is_kind(one, float) and is_kind(other, float):
        return math.isclose(one, other, rel_tol=1e-9)
    return type(one) is type(other) and isinstance(one, str | bool | None) and one == other


def read_schedule(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the state of the file's CosineAnnealingLR; None without one, which is a constant rate.

    Raises:
        ResumeRefused: another scheduler, or more than one.
    """
    schedulers = take(checkpoint, list, "lr_schedulers")
    if not schedulers:
        return None
    needed = {"T_max": int, "eta_min": float, "base_lrs": list, "last_epoch": int, "_last_lr": list}
    found = schedulers[0] if len(schedulers) == 1 and isinstance(schedulers[0], Mapping) else {}
    if any(not is_kind(found.get(key), kind) for key, kind in needed.items()) or found["T_max"] == 0:
        values = ", ".join(f"{show(key)}: {show(value)}" for key, value in found.items())
        raise ResumeRefused(
            f"lr_schedulers: {len(schedulers)}, {values or 'unreadable'}: expected one CosineAnnealingLR "
            f"({', '.join(needed)})"
        )
    return found


def compare_groups(
    comparison: Comparison, groups: Sequence[FileGroup], ours: Mapping[str, Mapping[str, Any]], optim: Mapping[str, Any]
) -> None:
    """Compare the optimizer's settings group by group; ours: {name: param group as the config makes it}."""
    for group in groups:
        base = group.settings.get("initial_lr", group.settings["lr"])
        for name in group.ours:
            what = f"optim.learning_rate x optim.group_multipliers.{name}"
            comparison.compare("optim.learning_rate", base, ours[name]["initial_lr"], what)
        for key in ("weight_decay", "betas", "eps"):
            comparison.compare(f"optim.{key}", group.settings[key], optim[key])


def compare_schedule(
    comparison: Comparison, schedule: Mapping[str, Any] | None, groups: Sequence[FileGroup], optim: Mapping[str, Any]
) -> None:
    """Compare the schedule with the config's; raise ResumeRefused if its rates are not those of the optimizer."""
    comparison.compare("optim.schedule", "constant" if schedule is None else "cosine", optim["schedule"])
    if schedule is None:
        return
    for key, setting in (("base_lrs", "initial_lr"), ("_last_lr", "lr")):
        rates = [group.settings.get(setting) for group in groups]
        if not same(schedule[key], rates):
            raise ResumeRefused(
                f"lr_schedulers: {key} {show(schedule[key])}: expected {setting} of the groups, {show(rates)}"
            )
    length = optim["schedule_length"]
    comparison.compare("optim.schedule_length", schedule["T_max"], length, "optim.schedule_length (T_max)")
    comparison.compare("optim.eta_min", schedule["eta_min"], optim["eta_min"])


def read_hyperparameters(checkpoint: Mapping[str, Any]) -> Sections:
    """Return the sections of the program's own config, where it was saved; a file need not have one."""
    saved = checkpoint.get("hyper_parameters")
    stated = saved.get("config", saved) if isinstance(saved, Mapping) else {}
    sections = stated.items() if isinstance(stated, Mapping) else ()
    return {name: section for name, section in sections if isinstance(section, Mapping)}


def compare_hyperparameters(comparison: Comparison, stated: Sections, config: Sections) -> None:
    """Compare what the program's own config states about channels, network and steps; absent values are not."""
    for section, theirs, ours in (
        ("data", "variables", "variables"),
        ("data", "target_variables", "targets"),
        ("model", "num_heads", "num_heads"),
        ("model", "patch_size", "patch_size"),
    ):
        if theirs in stated.get(section, {}):
            comparison.compare(f"{section}.{ours}", stated[section][theirs], config[section][ours])
    train = stated.get("train", {})
    if "gradient_clip_val" in train:
        clip = train["gradient_clip_val"]
        clip = None if is_kind(clip, float) and clip == 0 else clip
        comparison.compare("optim.grad_clip_norm", clip, config["optim"]["grad_clip_norm"])
    size = _product(train, "batch_size", "accumulate_grad_batches", "devices", "num_nodes")
    if size is not None:
        comparison.compare("train.global_batch_size", size, config["train"]["global_batch_size"])


def samples_per_batch(comparison: Comparison, stated: Sections, size: int) -> int | None:
    """Return the samples of one batch of all devices together; None where the file does not state them.

    Then the place in the epoch can only be counted in steps of the config's size, which the user must allow.
    """
    keys, train = ("batch_size", "devices", "num_nodes"), stated.get("train", {})
    samples = _product(train, *keys)
    if samples is None:
        found = ", ".join(f"{key}: {show(train[key]) if key in train else 'missing'}" for key in keys)
        line = f"unknown in the file ({found}), {size} in the config, by which the place in the epoch would be counted"
        comparison.add("train.global_batch_size", f"train.global_batch_size: {line}")
    return samples


def _product(section: Mapping[str, Any], *keys: str) -> int | None:
    """Return the product of counts; None where one is not stated as a number. No default is assumed."""
    counts: list[Any] = [section.get(key) for key in keys]
    return math.prod(counts) if all(is_kind(count, int) and count > 0 for count in counts) else None
