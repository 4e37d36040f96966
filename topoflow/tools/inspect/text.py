"""Plain text of a fixed width: tables, and facts with a label."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

WIDTH = 120
_LABEL = 21


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows under their header, each column as wide as it must be; the first is aligned left, the others right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(cells)
        ).rstrip()
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    ]


def fact(label: str, text: str) -> list[str]:
    """A label and what is to be said, wrapped beside it."""
    wrapped = textwrap.wrap(text, WIDTH - _LABEL, break_on_hyphens=False) or [""]
    return [f"{label if number == 0 else '':<{_LABEL}}{line}".rstrip() for number, line in enumerate(wrapped)]


def brief(value: Any, longest: int = 64) -> str:
    """A plain value on one line: what is long is cut, of many entries the first ones are shown."""
    if isinstance(value, dict):
        shown = [f"{key} {brief(item, longest)}" for key, item in list(value.items())[:12]]
        return ", ".join(shown) + (f", ... ({len(value)} in all)" if len(value) > 12 else "")
    if isinstance(value, list | tuple):
        shown = ", ".join(brief(item, longest) for item in value[:4])
        return f"[{shown}{f', ... ({len(value)} in all)' if len(value) > 4 else ''}]"
    text = str(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def number(value: float | None, digits: int = 2) -> str:
    """A measured number in scientific notation; nothing where there is none."""
    return "" if value is None else f"{value:.{digits}e}"
