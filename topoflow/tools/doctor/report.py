"""The report: what was found on all nodes, judged check by check, and printed as text or as JSON."""

import json
import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from topoflow.config import Config
from topoflow.terminal import print_output
from topoflow.text import format_table, number_ranges, shorten

OK, WARNING, FAIL = VERDICTS = ("ok", "WARNING", "FAIL")
"""From good to bad."""
WIDTH, NAME_WIDTH, VERDICT_WIDTH, MOST_NODES = 120, 15, 9, 6
LISTS = ("devices", "visible", "pass_seconds", "memory_bytes")
"""Figures that differ between the processes of a node."""
COLUMNS = {
    "device": ("devices", ""),
    "CPUs": ("processors", ""),
    "clock": ("clock_offset_seconds", "s"),
    "disk free": ("free_bytes", "B"),
    "write": ("write_bytes_per_second", "B/s"),
    "samples/s": ("data_samples_per_second", ""),
    "network": ("network_bytes_per_second", "B/s"),
    "pass": ("pass_seconds", "s"),
    "memory": ("memory_bytes", "B"),
}
"""{title of a column of the table of nodes: figure, unit}."""
RATES = {
    "data": ("data_samples_per_second", "reads", "samples/s", (0.25,)),
    "run directory": ("write_bytes_per_second", "writes", "B/s", (0.25,)),
    "network": ("network_bytes_per_second", "sends and receives", "B/s", (0.5, 0.2)),
}
"""{check: figure, verb, unit, and shares of the median below which a node is slow: first a warning, then a failure}."""
Finding = tuple[str, str]
"""Verdict and text."""
Place = str | int
"""A node, by its name, or a rank."""


@dataclass
class Found:
    """What a process found for a check."""

    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    """Plain values, with names that end in their unit."""
    same: dict[str, Any] = field(default_factory=dict)
    """Facts that must be equal on all."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else rank 0 compares, or a later measurement needs."""
    summary: str = ""
    has_failed: bool = False
    """The last finding says why, and nothing is compared."""

    def find(self, verdict: str, text: str) -> None:
        """Add a finding; none if the verdict is ok."""
        if verdict != OK:
            self.findings.append((verdict, text))


Compare = Callable[["Report", Mapping[Any, Found]], str]
"""Compares {place: found}, adds findings and figures to them, and returns a summary."""


class Report:
    """What is known of all nodes. Checks are printed as they are made, or all at the end as one JSON object.

    Attributes:
        head: the first keys of the JSON object.
        config: what is to be trained.
        nodes, checks: in the shape of the JSON object; nodes {name: node}, in the order of ranks. Empty before `begin`.
        node_of: {rank: name of its node}.
        found: of each rank, {check: found}.
    """

    def __init__(self, head: Mapping[str, Any], config: Config, is_shown: bool, as_json: bool):
        self.head, self.config, self._is_shown, self._as_json = head, config, is_shown, as_json
        self.nodes: dict[str, dict[str, Any]] = {}
        self.node_of: dict[int, str] = {}
        self.checks: list[dict[str, Any]] = []
        self.found: list[dict[str, Found]] = []

    def begin(self, ranks_of: Mapping[str, list[int]]) -> None:
        """Print what is examined. ranks_of: {node: its ranks}."""
        for node, ranks in ranks_of.items():
            self.nodes[node] = {"node": node, "verdict": OK, "ranks": ranks, "figures": {}}
            self.node_of |= dict.fromkeys(ranks, node)
        what = self.head["config"] or "no CONFIG: a small built-in model, no data set, the current folder"
        lines = _wrap(f"topoflow doctor: {what}")
        if self.head["data"]:
            lines += _wrap(f"run directory {self.head['run_directory']}, data {self.head['data']}")
        self._print([*lines, ""])

    def judge(self, name: str, found: Mapping[Place, Found], compare: Compare | None = None) -> None:
        """Judge what was found for a check, and print it. Without `compare`, the summary is the first one found."""
        compared = {place: item for place, item in found.items() if not item.has_failed}
        find_different(compared)
        first = next((item.summary for item in found.values() if item.summary), "nothing was measured")
        summary = compare(self, compared) if compare else first
        if name in RATES:
            summary += self._find_slow(compared, *RATES[name])
        findings: dict[tuple[str, str, str], dict[str, Any]] = {}
        for place, item in found.items():
            node = self.nodes[place if isinstance(place, str) else self.node_of[place]]
            for figure, value in item.figures.items():
                held = node["figures"].get(figure, [])
                node["figures"][figure] = [*held, value] if figure in LISTS else value
            for verdict, text in item.findings:
                new = {"verdict": verdict, "node": node["node"], "ranks": [], "text": text}
                finding = findings.setdefault((verdict, node["node"], text), new)
                finding["ranks"] += node["ranks"] if isinstance(place, str) else [place]
                node["verdict"] = _worst([node, finding])
        made = {"check": name, "verdict": _worst(findings.values()), "summary": summary}
        self.checks.append({**made, "findings": [*findings.values()]})
        self._print(self._check_lines(self.checks[-1]))

    def end(self, status: int | None = None) -> int:
        """Print the end of the report; return `status`, by default 1 if a check failed, else 0."""
        nodes, verdict = [*self.nodes.values()], _worst(self.checks)
        if self._as_json and self._is_shown:
            print_output(json.dumps({"verdict": verdict, **self.head, "checks": self.checks, "nodes": nodes}, indent=1))
        counts = Counter(node["verdict"] for node in nodes)
        shown = ", ".join(f"{counts[one]} {one}" for one in reversed(VERDICTS) if one in counts)
        self._print(["", *_table(nodes), "", f"{verdict}: of {len(nodes)} node(s), {shown}"])
        return int(verdict == FAIL) if status is None else status

    def end_early(self, status: int, name: str, summary: str, problems: Mapping[Any, str]) -> int:
        """Add a failed check and end; return `status`. problems: {place: text}."""
        self.judge(name, {place: Found([(FAIL, text)], summary=summary) for place, text in problems.items()})
        return self.end(status)

    def _find_slow(
        self, found: Mapping[Place, Found], figure: str, verb: str, unit: str, shares: tuple[float, ...]
    ) -> str:
        """Find places that are slow, see RATES; return words for the summary."""
        rates = {place: item.figures[figure] for place, item in found.items() if figure in item.figures}
        if not rates:
            return ""
        median, slowest = statistics.median(rates.values()), min(rates, key=lambda place: rates[place])
        for place, rate in rates.items():
            text = f"{verb} {format_value(rate, unit)}, the median node {format_value(median, unit)}"
            verdict = (OK, WARNING, FAIL)[sum(rate < share * median for share in shares)]
            found[place].find(verdict, f"{text}: check its mounts and its network")
        node = slowest if isinstance(slowest, str) else self.node_of[slowest]
        return f"; slowest node: {node}, {format_value(rates[slowest], unit)}"

    def _check_lines(self, check: Mapping[str, Any]) -> list[str]:
        places: dict[tuple[str, str], list[str]] = {}
        for finding in check["findings"]:
            node, ranks = finding["node"], finding["ranks"]
            is_part = ranks != self.nodes[node]["ranks"]
            which = f"{node} rank{'s' * (len(ranks) > 1)} {number_ranges(ranks)}" if is_part else node
            places.setdefault((finding["verdict"], finding["text"]), []).append(which)
        lines = _row(check["check"], check["verdict"], check["summary"])
        for (verdict, text), where in places.items():
            shown = "all nodes" if len(where) > 1 and where == [*self.nodes] else shorten(where, MOST_NODES)
            lines += _row("", verdict if verdict != check["verdict"] else "", f"{shown}: {text}")
        return lines

    def _print(self, lines: list[str]) -> None:
        if self._is_shown and not self._as_json:
            print_output("\n".join(lines))


def find_different(found: Mapping[Place, Found]) -> None:
    """Find the places whose facts in `same` differ from those of most others."""
    for name in dict.fromkeys(name for item in found.values() for name in item.same):
        usual, count = Counter(item.same.get(name) for item in found.values()).most_common(1)[0]
        for item in found.values():
            if item.same.get(name) != usual:
                text = f"{name} is {item.same.get(name)}, but {usual} on {count} other(s): expected the same on all"
                item.find(FAIL, text)


def format_value(value: float, unit: str) -> str:
    """Return `1.23 MB` for 1234567 and B, `0.0123 s` for s, and `12.3 cells` for other units."""
    if unit not in ("B", "B/s"):
        return f"{value:.4f} s" if unit == "s" else f"{value:.3g} {unit}".rstrip()
    prefixes = ["", "k", "M", "G", "T"]
    while value >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.3g} {prefixes[0]}{unit}"


def _table(nodes: list[dict[str, Any]]) -> list[str]:
    def cell(figure: Any, unit: str) -> str:
        if isinstance(figure, list) and isinstance(figure[0], str):
            return f"{len(figure)} x {figure[0].partition(' ')[2] or figure[0]}"[:24]
        return "" if figure is None else format_value(max(figure) if isinstance(figure, list) else figure, unit)

    rows = []
    for node in nodes:
        cells = [cell(node["figures"].get(figure), unit) for figure, unit in COLUMNS.values()]
        rows.append([node["node"], number_ranges(node["ranks"]), *cells, node["verdict"]])
    return format_table(["node", "ranks", *COLUMNS, "verdict"], rows)


def _row(name: str, verdict: str, text: str) -> list[str]:
    return _wrap(text, f"{name:<{NAME_WIDTH}}{verdict:<{VERDICT_WIDTH}}")


def _wrap(text: str, first: str = "") -> list[str]:
    """Return lines that begin with `first`, and then with as many spaces."""
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False)


def _worst(judged: Iterable[Any]) -> str:
    return max((item["verdict"] for item in judged), key=VERDICTS.index, default=OK)
