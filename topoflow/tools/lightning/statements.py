"""What a file says of its run beside the state itself, held against a config."""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from topoflow.errors import ResumeRefused
from topoflow.tools.lightning.moments import FileGroup


@dataclass
class Statements:
    """Collects what differs: `refused` and `accepted` lines, the latter where a key is allowed to differ.

    allowed: names or globs of config keys, as checkpoint.allow_changed.
    """

    allowed: Sequence[str]
    refused: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    accepted_keys: list[str] = field(default_factory=list)

    def compare(self, key: str, said: Any, configured: Any, name: str | None = None) -> None:
        """Note a difference between the file's value of a config key and the config's."""
        if not _alike(said, configured):
            self.differ(key, f"{name or key}: {_show(said)} in the file, {_show(configured)} in the config")

    def differ(self, key: str, line: str) -> None:
        """Note a difference in words."""
        if any(fnmatch.fnmatchcase(key, pattern) for pattern in self.allowed):
            self.accepted.append(line)
            self.accepted_keys.append(key)
        else:
            self.refused.append(line)

    def require_none(self, path: str) -> None:
        """Raise ResumeRefused, naming both values of each key, if anything differs that may not."""
        if self.refused:
            raise ResumeRefused(
                f"{path}: contradicts the config: {'; '.join(self.refused)}: "
                "expected the same, or checkpoint.allow_changed to list the keys that may differ"
            )


def compare_groups(
    statements: Statements, groups: Sequence[FileGroup], ours: Mapping[str, Mapping[str, Any]], optim: Mapping[str, Any]
) -> None:
    """The optimizer's settings, group by group; ours: {name: param group as the config makes it}."""
    for group in groups:
        base = group.settings.get("initial_lr", group.settings["lr"])
        for name in group.ours:
            what = f"optim.learning_rate x optim.group_multipliers.{name}"
            statements.compare("optim.learning_rate", base, ours[name]["initial_lr"], what)
        for key in ("weight_decay", "betas", "eps"):
            statements.compare(f"optim.{key}", group.settings[key], optim[key])


def compare_schedule(
    statements: Statements,
    schedulers: Sequence[Mapping[str, Any]],
    groups: Sequence[FileGroup],
    optim: Mapping[str, Any],
) -> None:
    """The schedule: one CosineAnnealingLR, or none, which is a constant rate.

    Raises:
        ResumeRefused: another scheduler, or one whose rates are not those of the optimizer.
    """
    if not schedulers:
        statements.compare("optim.schedule", "constant", optim["schedule"])
        return
    needed = ("T_max", "eta_min", "base_lrs", "last_epoch", "_last_lr")
    scheduler = schedulers[0]
    if len(schedulers) > 1 or any(key not in scheduler for key in needed):
        found = " and ".join(f"one with {', '.join(map(str, entry))}" for entry in schedulers)
        raise ResumeRefused(f"lr_schedulers: {found}: expected one CosineAnnealingLR ({', '.join(needed)})")
    for key, setting in (("base_lrs", "initial_lr"), ("_last_lr", "lr")):
        rates = [group.settings.get(setting) for group in groups]
        if not _alike(list(scheduler[key]), rates):
            raise ResumeRefused(
                f"lr_schedulers: {key} {_show(scheduler[key])}: expected {setting} of the groups, {_show(rates)}"
            )
    statements.compare("optim.schedule", "cosine", optim["schedule"])
    statements.compare(
        "optim.schedule_length", scheduler["T_max"], optim["schedule_length"], "optim.schedule_length (T_max)"
    )
    statements.compare("optim.eta_min", scheduler["eta_min"], optim["eta_min"])


def schedule_length(checkpoint: Mapping[str, Any]) -> int | None:
    """T_max of the file's schedule, for a config that leaves the length open; None if it has none."""
    schedulers = checkpoint["lr_schedulers"]
    length = schedulers[0].get("T_max") if schedulers else None
    return length if type(length) is int and length >= 1 else None


def compare_hyperparameters(
    statements: Statements, said: Mapping[str, Any], config: Mapping[str, Any], with_drops: bool
) -> list[str]:
    """What the program's own config says of the network and the gradient; returns what is only worth a warning.

    A value that is absent from the file is not compared. with_drops: whether the program's network heeds drop_rate and
    drop_path of that config.
    """
    data, model, train = (said.get(name) or {} for name in ("data", "model", "train"))
    for key, name, section in (("variables", "variables", data), ("target_variables", "targets", data)):
        if key in section:
            statements.compare(f"data.{name}", list(section[key]), list(config["data"][name]))
    for key in ("num_heads", "patch_size"):
        if key in model:
            statements.compare(f"model.{key}", model[key], config["model"][key])
    if "gradient_clip_val" in train:
        statements.compare(
            "optim.grad_clip_norm", train["gradient_clip_val"] or None, config["optim"]["grad_clip_norm"]
        )
    size = _samples_per_step(train)
    if size is not None:
        statements.compare("train.global_batch_size", size, config["train"]["global_batch_size"])
    return [
        f"model.{key}: {model[key]} in the file, {config['model'][key]} in the config"
        for key in ("drop_rate", "drop_path")
        if with_drops and key in model and not _alike(model[key], config["model"][key])
    ]


def samples_per_batch(said: Mapping[str, Any]) -> int | None:
    """Samples of one batch of all devices together, from the program's own config; None where it does not tell."""
    train = said.get("train") or {}
    return _product([train.get("batch_size"), train.get("devices", 1), train.get("num_nodes", 1)])


def _samples_per_step(train: Mapping[str, Any]) -> int | None:
    """Samples of one step, where the program's own config states all that makes them; no default is assumed."""
    return _product([train.get(key) for key in ("batch_size", "accumulate_grad_batches", "devices", "num_nodes")])


def _product(counts: Sequence[Any]) -> int | None:
    return math.prod(counts) if all(type(count) is int and count > 0 for count in counts) else None


def _alike(one: Any, other: Any) -> bool:
    """Equal; numbers to nine digits, since products of rates may have been rounded in another order."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-9)
    return one == other


def _show(value: Any) -> str:
    return f"[{', '.join(map(_show, value))}]" if isinstance(value, list | tuple) else str(value)
