"""The report: checks with their findings, as JSON and as text."""

import json
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from topoflow.errors import RanksDisagree
from topoflow.text import format_table, number_ranges, shorten

OK, WARNING, FAIL = "ok", "WARNING", "FAIL"
VERDICTS = (OK, WARNING, FAIL)
"""From good to bad."""
WIDTH, _NAME_WIDTH, _VERDICT_WIDTH = 120, 15, 9
_MOST_NODES = 6


def worst(verdicts: Iterable[str]) -> str:
    """Return the worst of some verdicts; ok without any."""
    return max(verdicts, key=VERDICTS.index, default=OK)


@dataclass(frozen=True)
class Finding:
    """A problem on one node, with what to do about it. ranks: the processes of the node that it concerns."""

    verdict: str
    node: str
    ranks: tuple[int, ...]
    text: str


@dataclass
class Check:
    """One subject, examined on all nodes. figures: {node: {name: value}}, plain values; names end in their unit."""

    name: str
    summary: str = ""
    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        return worst(finding.verdict for finding in self.findings)

    def note(self, node: str, **figures: Any) -> None:
        """Add figures of a node."""
        self.figures.setdefault(node, {}).update(figures)


class Report:
    """All checks, printed as text while they are made, or as one JSON object at the end.

    facts: the head of the JSON object. is_shown: whether this process prints. ranks_of: {node: its ranks}, in the order
    of ranks; empty until the processes have met.
    """

    def __init__(self, facts: Mapping[str, Any], is_shown: bool = True, as_json: bool = False):
        self.facts, self._is_shown, self._as_json = facts, is_shown, as_json
        self.ranks_of: Mapping[str, Sequence[int]] = {}
        self.checks: list[Check] = []

    def begin(self, ranks_of: Mapping[str, Sequence[int]]) -> None:
        """Print what is examined. ranks_of: {node: its ranks}."""
        self.ranks_of = ranks_of
        what = self.facts["config"] or "no CONFIG: a small built-in model, no data set, the current folder"
        lines = [f"topoflow doctor: {what}"]
        if self.facts["data"]:
            lines.append(f"run directory {self.facts['run_directory']}, data {self.facts['data']}")
        self._print([part for line in lines for part in textwrap.wrap(line, WIDTH, break_on_hyphens=False)] + [""])

    def add(self, check: Check) -> None:
        """Add a check and print it."""
        self.checks.append(check)
        self._print(self._check_lines(check))

    def end(self, status: int | None = None) -> int:
        """Print what comes last; return `status`, by default 1 if a check failed, else 0."""
        if self._as_json and self._is_shown:
            sys.stdout.write(json.dumps(self.to_dict(), indent=1) + "\n")
            sys.stdout.flush()
        self._print(self._node_lines())
        return int(self.verdict == FAIL) if status is None else status

    def end_as_lost(self, text: str) -> int:
        """End after the processes lost each other: what was found until then is worth knowing. Returns the status."""
        node, ranks = next(iter(self.ranks_of.items()))
        summary = f"lost after {len(self.checks)} check(s): no further ones were made"
        self.add(Check("connection", summary, [Finding(FAIL, node, tuple(ranks), text)]))
        return self.end(RanksDisagree.exit_status)

    def _print(self, lines: list[str]) -> None:
        if self._is_shown and not self._as_json:
            print("\n".join(lines), flush=True)

    @property
    def verdict(self) -> str:
        return worst(check.verdict for check in self.checks)

    def verdict_of(self, node: str) -> str:
        """Return the worst verdict on a node."""
        return worst(finding.verdict for check in self.checks for finding in check.findings if finding.node == node)

    def figures_of(self, node: str) -> dict[str, Any]:
        """Return everything that was measured on a node."""
        return {name: value for check in self.checks for name, value in check.figures.get(node, {}).items()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values in the shape that the package's docstring describes."""
        checks = [
            {
                "check": check.name,
                "verdict": check.verdict,
                "summary": check.summary,
                "findings": [vars(finding) | {"ranks": list(finding.ranks)} for finding in check.findings],
            }
            for check in self.checks
        ]
        nodes = [
            {"node": node, "verdict": self.verdict_of(node), "ranks": list(ranks), "figures": self.figures_of(node)}
            for node, ranks in self.ranks_of.items()
        ]
        return {"verdict": self.verdict, **self.facts, "checks": checks, "nodes": nodes}

    def _check_lines(self, check: Check) -> list[str]:
        """Return a check, its verdict and summary, and below them each finding with its nodes."""
        lines = _row(check.name, check.verdict, check.summary)
        places: dict[tuple[str, str], list[str]] = {}
        for finding in check.findings:
            whole = list(finding.ranks) == list(self.ranks_of[finding.node])
            ranks = "" if whole else f" rank{'s' * (len(finding.ranks) > 1)} {number_ranges(finding.ranks)}"
            places.setdefault((finding.verdict, finding.text), []).append(f"{finding.node}{ranks}")
        for (verdict, text), nodes in places.items():
            everywhere = len(nodes) > 1 and nodes == list(self.ranks_of)
            where = "all nodes" if everywhere else shorten(nodes, _MOST_NODES)
            lines += _row("", verdict if verdict != check.verdict else "", f"{where}: {text}")
        return lines

    def _node_lines(self) -> list[str]:
        """Return the table of nodes and the verdict on all of them."""
        shown = {
            node: {title: form(figures[name]) for title, name, form in _COLUMNS if figures.get(name) is not None}
            for node in self.ranks_of
            for figures in [self.figures_of(node)]
        }
        titles = [title for title, _, _ in _COLUMNS if any(title in cells for cells in shown.values())]
        rows = [
            [node, number_ranges(ranks), *(shown[node].get(title, "") for title in titles), self.verdict_of(node)]
            for node, ranks in self.ranks_of.items()
        ]
        verdicts = [row[-1] for row in rows]
        words = {FAIL: "failed", WARNING: "with warnings", OK: "ok"}
        counts = [f"{verdicts.count(verdict)} {words[verdict]}" for verdict in words if verdict in verdicts]
        last = f"{self.verdict}: of {len(verdicts)} node(s), {', '.join(counts)}"
        return ["", *format_table(["node", "ranks", *titles, "verdict"], rows), "", last]


def format_bytes(count: float) -> str:
    """Return `1.2 MB` for 1234567."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.0f} {units[0]}" if units[0] == "B" or count >= 99.5 else f"{count:.2g} {units[0]}"


def format_rate(bytes_per_second: float) -> str:
    """Return `1.2 MB/s` for 1234567."""
    return f"{format_bytes(bytes_per_second)}/s"


def format_seconds(seconds: float) -> str:
    """Return `12.3 ms` for 0.0123."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _format_devices(names: list[str]) -> str:
    kinds = sorted({name.partition(" ")[2] or name for name in names})
    shown = f"{len(names)} x {', '.join(kinds)}"
    return shown if len(shown) <= 24 else f"{shown[:21]}..."


def _row(name: str, verdict: str, text: str) -> list[str]:
    indent = " " * (_NAME_WIDTH + _VERDICT_WIDTH)
    wrapped = textwrap.wrap(text, WIDTH - len(indent), break_on_hyphens=False) or [""]
    first = f"{name:<{_NAME_WIDTH}}{verdict:<{_VERDICT_WIDTH}}{wrapped[0]}".rstrip()
    return [first, *(f"{indent}{line}" for line in wrapped[1:])]


_COLUMNS = (
    ("device", "devices", _format_devices),
    ("CPUs", "processors", str),
    ("clock", "clock_offset_seconds", lambda seconds: f"{round(seconds * 1e3, 1) + 0.0:+.1f} ms"),
    ("disk free", "free_bytes", format_bytes),
    ("write", "write_bytes_per_second", format_rate),
    ("samples/s", "data_samples_per_second", "{:.3g}".format),
    ("network", "network_bytes_per_second", format_rate),
    ("pass", "pass_seconds", lambda seconds: format_seconds(max(seconds))),
    ("memory", "memory_bytes", lambda sizes: format_bytes(max(sizes))),
)
"""Title of a column, the figure that it shows, and how."""
