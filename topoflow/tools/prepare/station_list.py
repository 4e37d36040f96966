"""The list of stations: where each is."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from topoflow.data.grid import SAME_PLACE_DEGREES
from topoflow.errors import DataError
from topoflow.tools.prepare.findings import Findings
from topoflow.tools.prepare.table_columns import find_column
from topoflow.tools.prepare.table_files import read_columns, read_parts
from topoflow.tools.prepare.table_values import Numbers

Positions = dict[str, tuple[float, float]]
"""Latitude and longitude of each station in degrees, NaN where unknown."""


def read_station_list(path: Path, findings: Findings) -> Positions | None:
    """Return where stations are, from a table with an id, latitude and longitude; None after a finding.

    A name that occurs several times must be at one place (within 1e-4 degrees); else it is an error.
    """
    try:
        columns = read_columns(path)
        found = [find_column(columns, role, {}) for role in ("station", "lat", "lon")]
        names = [name for name in found if name is not None]
        if len(names) < 3:
            raise DataError(f"has columns {', '.join(columns[:12])}: expected station, latitude and longitude")
        positions: Positions = {}
        for part in read_parts(path, names):
            ids = part[names[0]].astype(str).str.strip()
            lats, lons = (Numbers().read(part[name], name) for name in names[1:])
            merge_positions(positions, zip(ids, lats.tolist(), lons.tolist(), strict=True))
        return positions
    except DataError as error:
        findings.add("error", path, "", str(error), "a table of stations")
        return None


def merge_positions(positions: Positions, rows: Iterable[tuple[str, float, float]]) -> None:
    """Add rows of (id, latitude, longitude) to positions.

    Raises:
        DataError: a station is at two places, farther than 1e-4 degrees from each other.
    """
    for name, lat, lon in rows:
        at = positions.get(name, (np.nan, np.nan))
        if np.isnan(at).any():
            positions[name] = (lat, lon)
        elif max(abs(at[0] - lat), abs((at[1] - lon + 180) % 360 - 180)) > SAME_PLACE_DEGREES:
            raise DataError(f"station {name!r} is at two places: {at[0]} {at[1]} and {lat} {lon}")
