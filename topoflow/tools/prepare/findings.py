"""Findings: what `prepare` met in the files, what it expected, and the recipe line that settles it."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

Severity = Literal["error", "decision", "note"]
"""error: the file cannot be used as it is. decision: a line of the recipe settles it. note: done, and counted."""

_ORDER: tuple[Severity, ...] = ("error", "decision", "note")


@dataclass(frozen=True)
class Finding:
    """One finding. file: path as given. variable: name in the file, or empty. settle: recipe line, or empty."""

    severity: Severity
    file: str
    variable: str
    found: str
    expected: str = ""
    settle: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return plain values for report.json."""
        return asdict(self)

    def line(self) -> str:
        """Return one line for a person."""
        where = f"{self.file}: {self.variable}" if self.variable else self.file
        expected = f": expected {self.expected}" if self.expected else ""
        settle = f"; recipe: {self.settle}" if self.settle else ""
        return f"{self.severity:8} {where}: {self.found}{expected}{settle}"


class Findings:
    """All findings of one run, each once, in the order in which they were made."""

    def __init__(self) -> None:
        self._found: dict[Finding, None] = {}

    def add(
        self, severity: Severity, file: object, variable: str, found: str, expected: str = "", settle: str = ""
    ) -> None:
        """Add a finding. file: a path, or anything else whose text names it."""
        self._found.setdefault(Finding(severity, str(file), variable, found, expected, settle))

    def sorted(self) -> list[Finding]:
        """Return errors first, then decisions, then notes."""
        return sorted(self._found, key=lambda finding: _ORDER.index(finding.severity))

    def open(self) -> list[Finding]:
        """Return the findings that must be settled before anything is written."""
        return [finding for finding in self.sorted() if finding.severity != "note"]

    def extend(self, findings: Iterable[Finding]) -> None:
        """Add findings made elsewhere."""
        for finding in findings:
            self._found.setdefault(finding)
