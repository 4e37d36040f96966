"""What was found: checks, each with a verdict for every node that deserves one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

OK, WARNING, FAIL = "ok", "WARNING", "FAIL"
VERDICTS = (OK, WARNING, FAIL)
"""From good to bad."""


def worst(verdicts: Iterable[str]) -> str:
    """The worst of some verdicts, ok without any."""
    return max(verdicts, key=VERDICTS.index, default=OK)


@dataclass(frozen=True)
class Finding:
    """Something not as it should be on one node, in words that say what to do. ranks: those of the node it is about."""

    verdict: str
    node: str
    ranks: tuple[int, ...]
    text: str


@dataclass
class Check:
    """One subject, examined on all nodes. summary: what was found, in a line.

    figures: {node: {name: value}}, plain values whose names end in their unit.
    """

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


@dataclass
class Report:
    """All checks. facts: what was examined; ranks_of: {node: its ranks}, in the order of ranks."""

    facts: Mapping[str, Any]
    ranks_of: Mapping[str, list[int]]
    checks: list[Check] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        return worst(check.verdict for check in self.checks)

    def verdict_of(self, node: str) -> str:
        """The worst that was found on a node."""
        return worst(finding.verdict for check in self.checks for finding in check.findings if finding.node == node)

    def figures_of(self, node: str) -> dict[str, Any]:
        """Everything that was measured on a node."""
        return {name: value for check in self.checks for name, value in check.figures.get(node, {}).items()}

    def as_dict(self) -> dict[str, Any]:
        """Plain values, in the shape that the package's docstring describes."""
        return {
            "verdict": self.verdict,
            **self.facts,
            "checks": [
                {
                    "check": check.name,
                    "verdict": check.verdict,
                    "summary": check.summary,
                    "findings": [
                        {
                            "verdict": finding.verdict,
                            "node": finding.node,
                            "ranks": list(finding.ranks),
                            "text": finding.text,
                        }
                        for finding in check.findings
                    ],
                }
                for check in self.checks
            ],
            "nodes": [
                {"node": node, "verdict": self.verdict_of(node), "ranks": list(ranks), "figures": self.figures_of(node)}
                for node, ranks in self.ranks_of.items()
            ],
        }
