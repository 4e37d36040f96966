"""The report: facts of all processes, checks and figures, printed as text or as JSON."""

import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from topoflow.config import Config
from topoflow.errors import RanksDisagree
from topoflow.terminal import print_output
from topoflow.text import format_table, number_ranges, shorten

OK, WARNING, FAIL = VERDICTS = ("ok", "WARNING", "FAIL")
"""From good to bad."""
WIDTH, NAME_WIDTH, VERDICT_WIDTH, MOST_NODES = 120, 15, 9, 6
Place = TypeVar("Place", str, int)


class Report:
    """What is known of all nodes. Checks are printed as they are made, or all at the end as one JSON object.

    Attributes:
        head: the first keys of the JSON object.
        config: what is to be trained.
        nodes, checks: in the shape of the JSON object; nodes {name: node}, in the order of ranks. Empty before `begin`.
        facts: of each rank, {measurement: what it returned}; {"error": text} for one that failed.
    """

    def __init__(self, head: Mapping[str, Any], config: Config, is_shown: bool, as_json: bool):
        self.head, self.config, self._is_shown, self._as_json = head, config, is_shown, as_json
        self.nodes: dict[str, dict[str, Any]] = {}
        self.checks: list[dict[str, Any]] = []
        self.facts: list[dict[str, Any]] = []

    def begin(self, ranks_of: Mapping[str, list[int]]) -> None:
        """Print what is examined. ranks_of: {node: its ranks}."""
        self.nodes = {
            node: {"node": node, "verdict": OK, "ranks": ranks, "figures": {}} for node, ranks in ranks_of.items()
        }
        what = self.head["config"] or "no CONFIG: a small built-in model, no data set, the current folder"
        lines = [f"topoflow doctor: {what}"]
        if self.head["data"]:
            lines.append(f"run directory {self.head['run_directory']}, data {self.head['data']}")
        self._print([part for line in lines for part in textwrap.wrap(line, WIDTH, break_on_hyphens=False)] + [""])

    def add_facts(self, gathered: Iterable[Mapping[str, Any]]) -> None:
        """Add the facts of each rank, in the order of ranks."""
        gathered = list(gathered)
        self.facts = self.facts or [{} for _ in gathered]
        for facts, more in zip(self.facts, gathered, strict=True):
            facts.update(more)

    def node_of(self, rank: int) -> str:
        """Return the node of a rank."""
        return next(node for node, item in self.nodes.items() if rank in item["ranks"])

    def per_rank(self, name: str) -> dict[int, dict[str, Any]]:
        """Return {rank: result} of a measurement of processes; its failures become findings."""
        return self._results({rank: facts[name] for rank, facts in enumerate(self.facts) if name in facts})

    def per_node(self, name: str) -> dict[str, dict[str, Any]]:
        """Return {node: result} of a measurement by the first process of each node; its failures become findings."""
        first = {node: self.facts[item["ranks"][0]] for node, item in self.nodes.items()}
        return self._results({node: facts[name] for node, facts in first.items() if name in facts})

    def _results(self, found: dict[Place, dict[str, Any]]) -> dict[Place, dict[str, Any]]:
        for place, result in found.items():
            if "error" in result:
                self.find(WARNING if result.get("is_minor") else FAIL, place, result["error"])
        return {place: result for place, result in found.items() if "error" not in result}

    def by_node(self, results: Mapping[int, dict[str, Any]]) -> Iterator[tuple[str, dict[int, dict[str, Any]]]]:
        """Yield each node with {rank: result} of its processes, if there is any."""
        for node, item in self.nodes.items():
            if here := {rank: results[rank] for rank in item["ranks"] if rank in results}:
                yield node, here

    def judge(self, name: str, check: Callable[["Report"], str]) -> None:
        """Make a check and print it. check: adds findings and figures, and returns a summary."""
        made = {"check": name, "verdict": OK, "summary": "", "findings": []}
        self.checks.append(made)
        made["summary"] = check(self)
        lines = _row(name, made["verdict"], made["summary"])
        places: dict[tuple[str, str], list[str]] = {}
        for finding in made["findings"]:
            node, ranks = finding["node"], finding["ranks"]
            which = (
                f" rank{'s' * (len(ranks) > 1)} {number_ranges(ranks)}" if ranks != self.nodes[node]["ranks"] else ""
            )
            places.setdefault((finding["verdict"], finding["text"]), []).append(f"{node}{which}")
        for (verdict, text), nodes in places.items():
            where = "all nodes" if len(nodes) > 1 and nodes == [*self.nodes] else shorten(nodes, MOST_NODES)
            lines += _row("", verdict if verdict != made["verdict"] else "", f"{where}: {text}")
        self._print(lines)

    def fail(self, name: str, summary: str, findings: Mapping[Any, str]) -> None:
        """Print a failed check. findings: {node or rank: text}."""

        def check(_: Report) -> str:
            for where, text in findings.items():
                self.find(FAIL, where, text)
            return summary

        self.judge(name, check)

    def find(self, verdict: str, where: str | int | Iterable[int], text: str) -> None:
        """Add a finding on a node, a rank or some ranks to the check; none if the verdict is ok."""
        if verdict == OK:
            return
        ranks = {where} if isinstance(where, int) else set() if isinstance(where, str) else set(where)
        check = self.checks[-1]
        for node, item in self.nodes.items():
            here = [rank for rank in item["ranks"] if node == where or rank in ranks]
            if not here and node != where:
                continue
            finding = {"verdict": verdict, "node": node, "ranks": [], "text": text}
            same = [known for known in check["findings"] if {**known, "ranks": []} == finding]
            if not same:
                check["findings"].append(finding)
            (same or [finding])[0]["ranks"] += here
            for judged in (check, item):
                judged["verdict"] = max(judged["verdict"], verdict, key=VERDICTS.index)

    def note(self, node: str, **figures: Any) -> None:
        """Add figures of a node: plain values, with names that end in their unit."""
        self.nodes[node]["figures"].update(figures)

    def note_lists(self, results: Mapping[int, dict[str, Any]], **facts: str) -> None:
        """Add figures of the processes of each node, {figure: name of the fact}, as lists in the order of ranks."""
        for node, here in self.by_node(results):
            self.note(node, **{figure: [found[fact] for found in here.values()] for figure, fact in facts.items()})

    def end(self, status: int | None = None) -> int:
        """Print the end of the report; return `status`, by default 1 if a check failed, else 0."""
        verdict = max((check["verdict"] for check in self.checks), key=VERDICTS.index, default=OK)
        if self._as_json and self._is_shown:
            found = {"verdict": verdict, **self.head, "checks": self.checks, "nodes": [*self.nodes.values()]}
            print_output(json.dumps(found, indent=1))
        figures = [item["figures"] for item in self.nodes.values()]
        columns = [column for column in COLUMNS if any(held.get(column[1]) is not None for held in figures)]
        rows = []
        for node, item in self.nodes.items():
            shown = [(item["figures"].get(name), form) for _, name, form in columns]
            cells = ["" if figure is None else form(figure) for figure, form in shown]
            rows.append([node, number_ranges(item["ranks"]), *cells, item["verdict"]])
        verdicts = [item["verdict"] for item in self.nodes.values()]
        words = {FAIL: "failed", WARNING: "with warnings", OK: "ok"}
        counts = [f"{verdicts.count(verdict)} {words[verdict]}" for verdict in words if verdict in verdicts]
        table = format_table(["node", "ranks", *(title for title, _, _ in columns), "verdict"], rows)
        self._print(["", *table, "", f"{verdict}: of {len(verdicts)} node(s), {', '.join(counts)}"])
        return int(verdict == FAIL) if status is None else status

    def end_as_lost(self, text: str) -> int:
        """End after the processes lost each other, with what was found until then; return the status."""
        summary = f"a process was lost after {len(self.checks)} check(s): no further ones were made"
        self.fail("connection", summary, {next(iter(self.nodes)): text})
        return self.end(RanksDisagree.exit_status)

    def _print(self, lines: list[str]) -> None:
        if self._is_shown and not self._as_json:
            print_output("\n".join(lines))


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
    shown = f"{len(names)} x {', '.join(sorted({name.partition(' ')[2] or name for name in names}))}"
    return shown if len(shown) <= 24 else f"{shown[:21]}..."


def _row(name: str, verdict: str, text: str) -> list[str]:
    indent = " " * (NAME_WIDTH + VERDICT_WIDTH)
    first, *others = textwrap.wrap(text, WIDTH - len(indent), break_on_hyphens=False) or [""]
    return [f"{name:<{NAME_WIDTH}}{verdict:<{VERDICT_WIDTH}}{first}".rstrip(), *(f"{indent}{line}" for line in others)]


COLUMNS = (
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
"""Title of a column of the table of nodes, the figure in it, and its form."""
