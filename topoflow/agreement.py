"""The proof, before anything is trained, that all processes were started as the same program on the same data."""

import platform
import socket
from collections.abc import Mapping

import torch

from topoflow.config import Config, config_to_dict
from topoflow.data import BatchPlan, ForecastData
from topoflow.distributed import Context
from topoflow.errors import RanksDisagree
from topoflow.reproducibility import describe_software, hash_sources


def require_same_program(context: Context, config: Config) -> None:
    """Prove that all processes have the same code, versions, number of threads, and config.

    Raises:
        RanksDisagree: on every process, with the table of who has what.
    """
    if context.world_size == 1:
        return  # and does not read a hundred source files
    software = describe_software(torch.device("cpu"))
    facts = {name: str(software[name]) for name in ("python", "torch", "numpy", "topoflow", "threads")}
    facts["system"] = platform.system()
    facts["sources of topoflow"] = hash_sources()[:16]
    for section, keys in config_to_dict(config).items():
        facts |= {f"{section}.{key}": repr(value) for key, value in keys.items()}
    require_agreement(context, facts, "at the start")


def require_same_data(context: Context, data: ForecastData, plan: BatchPlan) -> None:
    """Prove that all processes cut the data set into the same batches; that it is the same was seen when it was opened.

    Raises:
        RanksDisagree: on every process, with the table of who has what.
    """
    facts = {
        "batches in an epoch": str(plan.steps_per_epoch * plan.accumulation),
        "order of samples": plan.fingerprint,
    }
    facts |= {f"samples for {split}": str(len(index.starts)) for split, index in data.splits.items()}
    require_agreement(context, facts, "with the data open")


def require_agreement(context: Context, facts: Mapping[str, str], when: str) -> None:
    """Prove that `facts` {name: value} are equal on all processes; only their hash travels if they are.

    Raises:
        RanksDisagree: on every process: a line for each fact that differs, with ranks and hosts for each value.
    """
    if context.are_same(facts):
        return
    gathered = context.gather_objects((socket.gethostname(), dict(facts)))
    lines = [f"ranks disagree {when}: expected one program on one data set"]
    for name in sorted({name for _, held in gathered for name in held}):
        ranks_with: dict[str, list[int]] = {}
        for rank, (_, held) in enumerate(gathered):
            ranks_with.setdefault(held.get(name, "nothing"), []).append(rank)
        if len(ranks_with) > 1:
            lines.append(f"  {name}")
            for value, ranks in sorted(ranks_with.items(), key=lambda item: item[1]):
                hosts = ", ".join(sorted({gathered[rank][0] for rank in ranks})[:4])
                lines.append(f"    {value} on rank(s) {_shorten(ranks)} ({hosts})")
    refusal = RanksDisagree("\n".join(lines))
    refusal.shared = True
    raise refusal


def _shorten(ranks: list[int]) -> str:
    """`0-3, 7` of increasing numbers."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
