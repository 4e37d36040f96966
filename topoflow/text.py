"""Lists, ranges and tables as text, for log lines, errors and reports; and names matched against globs."""

import fnmatch
from collections.abc import Iterable, Sequence


def shorten(names: Iterable[object], most: int = 8) -> str:
    """Return the first `most` names, as in `a, b, c and 4 more`."""
    names = [str(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def number_ranges(numbers: Iterable[int]) -> str:
    """Return numbers in increasing order, with consecutive ones as ranges, as in `0-3, 7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table, each column as wide as its widest cell; the first is left-aligned, others right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a name is one of `patterns`, or matches one as a glob (case-sensitive)."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
