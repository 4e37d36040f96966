"""report.json and report.txt: what was found in the files and what was done with it."""

import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from topoflow.data.moments import Moments
from topoflow.data.prepared.days import DayRecord, read_days
from topoflow.data.prepared.manifest import Manifest
from topoflow.files import write_atomically
from topoflow.tools.prepare.findings import Finding

SHOWN = 40
"""Findings that are printed; report.json has all."""


def write_report(folder: Path, manifest: Manifest, findings: Sequence[Finding], how: Mapping[str, str]) -> list[str]:
    """Write both reports into the data set's `folder`; return the lines of report.txt.

    how: {variable: what it is made of}.
    """
    days = [day for year in manifest.years for day in read_days(folder / year.days.name, year.days.sha256)]
    content = {
        "variables": {v.name: _variable(manifest, days, v.name, how.get(v.name, "")) for v in manifest.variables},
        "dropped": _dropped(days),
        "findings": [finding.to_dict() for finding in findings],
    }
    lines = [*_table(manifest, content), *finding_lines(findings)]
    write_atomically(folder / "report.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    write_atomically(folder / "report.txt", "\n".join(lines) + "\n")
    return lines


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Return one line for each finding, errors and decisions first; of many, the first and their number."""
    lines = [finding.line() for finding in findings[:SHOWN]]
    more = len(findings) - SHOWN
    return [*lines, f"... and {more} more findings"] if more > 0 else lines


def _variable(manifest: Manifest, days: Sequence[DayRecord], name: str, how: str) -> dict[str, Any]:
    [variable] = [v for v in manifest.variables if v.name == name]
    moments = functools.reduce(Moments.merge, (day.moments[name] for day in days), Moments())
    cells = int(np.prod(manifest.shape)) * sum(day.hours for day in days)
    return {
        "unit": variable.unit,
        "from": how,
        "values": moments.count,
        "present": moments.count / cells,
        "mean": moments.mean if moments.count else None,
        "std": moments.std if moments.count else None,
        "error_max": variable.error_max,
        "error_rms": variable.error_rms,
    }


def _dropped(days: Sequence[DayRecord]) -> dict[str, dict[str, int]]:
    """{variable and rule: {year: number of values}}."""
    counts: dict[str, Counter[str]] = {}
    for day in days:
        for reason, count in day.dropped.items():
            counts.setdefault(reason, Counter())[day.day[:4]] += count
    return {reason: dict(sorted(by_year.items())) for reason, by_year in sorted(counts.items())}


def _table(manifest: Manifest, content: Mapping[str, Any]) -> list[str]:
    (rows, columns), times = manifest.shape, [year.times for year in manifest.years]
    size = sum(file.size for file in manifest.files())
    lines = [
        f"{times[0][0]} to {times[-1][-1]} UTC, every {manifest.step_hours} h, {rows} x {columns} cells, "
        f"{len(manifest.variables)} variables as {np.dtype(manifest.dtype)}, {size / 1e9:.2f} GB",
        f"{'variable':12} {'unit':8} {'present':>8} {'mean':>11} {'deviation':>11}  from",
    ]
    for name, found in content["variables"].items():
        mean, std = ("-" if found[key] is None else f"{found[key]:.5g}" for key in ("mean", "std"))
        lines.append(f"{name:12} {found['unit']:8} {found['present']:8.1%} {mean:>11} {std:>11}  {found['from']}")
        if manifest.dtype != "<f4" and found["std"]:
            relative = found["error_rms"] / found["std"]
            lines.append(
                f"{'':12} error of float16: at most {found['error_max']:.3g} {found['unit']}, RMS {relative:.1e} of "
                "the deviation"
            )
    lines.append(f"static fields: {', '.join(manifest.static_units)}")
    for reason, by_year in content["dropped"].items():
        years = ", ".join(f"{year}: {count}" for year, count in by_year.items())
        lines.append(f"dropped {reason}: {sum(by_year.values())} values ({years})")
    return lines
