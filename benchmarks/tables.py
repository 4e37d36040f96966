"""Medians with their spread, ratios of measurements taken in turn, and Markdown tables of them."""

import statistics
from collections.abc import Sequence

import numpy as np


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 3) -> str:
    """Return `median (smallest - largest)`, each times scale, with so many significant digits."""
    middle, low, high = (
        significant(scale * value, digits) for value in (statistics.median(values), min(values), max(values))
    )
    return middle if len(values) == 1 else f"{middle} ({low} - {high})"


def ratio(over: Sequence[float], under: Sequence[float], digits: int = 2) -> str:
    """Return `ratio of medians (quartiles of the ratios of each round)`.

    over and under are by round. Noise that lasts longer than a round affects both of a pair and cancels in the ratio.
    """
    if min(under) <= 0:  # memory: a tiny step may fit into memory that is already free
        return ""
    whole = statistics.median(over) / statistics.median(under)
    if len(over) < 2:
        return f"{whole:.{digits}f}"
    low, high = np.quantile(np.divide(over, under), [0.25, 0.75])
    return f"{whole:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def significant(value: float, digits: int = 3) -> str:
    """Return the value with so many significant digits, without an exponent, never rounding before the point."""
    if value == 0:
        return "0"
    after_point = digits - 1 - int(np.floor(np.log10(abs(value))))
    return f"{value:.{max(after_point, 0)}f}"


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table, padded to be readable as text: first column left-aligned, others right-aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])] + [
            cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = "|".join(["-" * (widths[0] + 2)] + ["-" * (width + 1) + ":" for width in widths[1:]])
    print("\n".join([line(head), f"|{rule}|", *(line(row) for row in rows)]) + "\n", flush=True)
