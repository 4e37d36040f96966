"""The report as text: a line for each check while they are made, then the nodes with what was measured on each."""

import textwrap
from collections.abc import Iterable
from typing import Any

from topoflow.tools.doctor.amounts import show_bytes, show_rate, show_seconds
from topoflow.tools.doctor.report import FAIL, OK, WARNING, Check, Finding, Report

WIDTH = 120
_NAME, _VERDICT = 15, 9
_MOST_NAMES = 6
_COLUMNS = (
    "node", "ranks", "device", "CPUs", "clock", "disk free", "write", "samples/s", "network", "pass", "memory",
    "verdict",
)  # fmt: skip


def head_lines(report: Report) -> list[str]:
    """What is examined."""
    facts = report.facts
    what = facts["config"] or "no CONFIG: the doctor's own small model, no data set, the current folder"
    lines = [f"topoflow doctor: {what}"]
    if facts["config"]:
        lines.append(f"run directory {facts['run_directory']}, data {facts['data']}")
    return [line for text in lines for line in textwrap.wrap(text, WIDTH, break_on_hyphens=False)] + [""]


def check_lines(check: Check, ranks_of: dict[str, list[int]]) -> list[str]:
    """A check, its verdict and what was found; below it what is not as it should be, and where."""
    lines = _beside(check.name, check.verdict, check.summary)
    for verdict, where, text in _grouped(check.findings, ranks_of):
        lines += _beside("", verdict if verdict != check.verdict else "", f"{where}: {text}")
    return lines


def node_lines(report: Report) -> list[str]:
    """The table of nodes."""
    rows = [_COLUMNS, *(_row(report, node, ranks) for node, ranks in report.ranks_of.items())]
    used = [column for column in range(len(_COLUMNS)) if any(row[column] for row in rows[1:])]
    widths = {column: max(len(row[column]) for row in rows) for column in used}
    left = (_COLUMNS.index("node"), _COLUMNS.index("device"), _COLUMNS.index("verdict"))
    return [
        "  ".join(
            row[column].ljust(widths[column]) if column in left else row[column].rjust(widths[column])
            for column in used
        ).rstrip()
        for row in rows
    ]


def last_line(report: Report) -> str:
    """The verdict on all."""
    verdicts = [report.verdict_of(node) for node in report.ranks_of]
    words = {FAIL: "failed", WARNING: "with warnings", OK: "as they should be"}
    counts = [f"{verdicts.count(verdict)} {words[verdict]}" for verdict in words if verdict in verdicts]
    return f"{report.verdict}: of {len(verdicts)} node(s), {', '.join(counts)}"


def _beside(name: str, verdict: str, text: str) -> list[str]:
    indent = " " * (_NAME + _VERDICT)
    wrapped = textwrap.wrap(text, WIDTH - len(indent), break_on_hyphens=False) or [""]
    first = f"{name:<{_NAME}}{verdict:<{_VERDICT}}{wrapped[0]}".rstrip()
    return [first, *(f"{indent}{line}" for line in wrapped[1:])]


def _grouped(findings: Iterable[Finding], ranks_of: dict[str, list[int]]) -> list[tuple[str, str, str]]:
    """(verdict, where, text): what was found alike on several nodes is said once."""
    places: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        whole = list(finding.ranks) == ranks_of[finding.node]
        ranks = "" if whole else f" rank{'s' if len(finding.ranks) > 1 else ''} {number_ranges(finding.ranks)}"
        places.setdefault((finding.verdict, finding.text), []).append(f"{finding.node}{ranks}")
    grouped = []
    for (verdict, text), where in places.items():
        if len(where) > 1 and where == list(ranks_of):
            grouped.append((verdict, "all nodes", text))
        else:
            more = f" and {len(where) - _MOST_NAMES} more" if len(where) > _MOST_NAMES else ""
            grouped.append((verdict, ", ".join(where[:_MOST_NAMES]) + more, text))
    return grouped


def number_ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] is "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def _row(report: Report, node: str, ranks: list[int]) -> tuple[str, ...]:
    figures = report.figures_of(node)

    def show(name: str, form: Any) -> str:
        value = figures.get(name)
        return "" if value is None else form(value)

    return (
        node,
        number_ranges(ranks),
        show("devices", _show_devices),
        show("processors", str),
        show("clock_offset_seconds", lambda seconds: f"{round(seconds * 1e3, 1) + 0.0:+.1f} ms"),
        show("free_bytes", show_bytes),
        show("write_bytes_per_second", show_rate),
        show("data_samples_per_second", "{:.3g}".format),
        show("network_bytes_per_second", show_rate),
        show("pass_seconds", lambda seconds: show_seconds(max(seconds))),
        show("memory_bytes", lambda sizes: show_bytes(max(sizes))),
        report.verdict_of(node),
    )


def _show_devices(names: list[str]) -> str:
    kinds = sorted({name.partition(" ")[2] or name for name in names})
    shown = f"{len(names)} x {', '.join(kinds)}"
    return shown if len(shown) <= 24 else f"{shown[:21]}..."
