"""SLURM's short forms, expanded without asking scontrol."""

import re

from topoflow.errors import ConfigError


def expand_node_list(text: str) -> list[str]:
    """Host names of a SLURM node list, without asking scontrol: `nid[005001-005003,005010],login1`."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        expanded = [""]
        for literal, bracket in re.findall(r"([^\[]*)(?:\[([^\]]*)\])?", part):
            choices = [literal + number for number in _expand_ranges(bracket)] if bracket else [literal]
            expanded = [prefix + choice for prefix in expanded for choice in choices]
        names += expanded
    if not names:
        raise ConfigError(f"environment: node list {text!r}: expected host names")
    return names


def _expand_ranges(text: str) -> list[str]:
    numbers = []
    for item in text.split(","):
        first, _, last = item.partition("-")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return numbers


def expand_tasks_per_node(text: str) -> list[int]:
    """Tasks on each node from SLURM's short form: `4,2,1(x2)` is [4, 2, 1, 1]."""
    counts: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item.strip())
        if match is None:
            raise ConfigError(f"environment: SLURM_STEP_TASKS_PER_NODE={text!r}: expected a form such as 4,2,1(x2)")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts
