"""A regular latitude-longitude grid of cells."""

from dataclasses import dataclass

import numpy as np

from topoflow.data.grid import SAME_PLACE_DEGREES
from topoflow.errors import ConfigError

EDGE = 1e-9
"""Fraction of a cell by which a point may seem to lie below an edge through rounding, and still belongs above it."""


@dataclass(frozen=True)
class Cells:
    """Cells of `degrees` on a side, half open: the south and west edge belong to a cell, the north and east do not."""

    south: float
    west: float
    degrees: float
    shape: tuple[int, int]
    """Rows (south first) and columns (west first)."""

    @property
    def lat(self) -> np.ndarray:
        """Latitudes of the rows' centres [H], degrees."""
        return self.south + (np.arange(self.shape[0]) + 0.5) * self.degrees

    @property
    def lon(self) -> np.ndarray:
        """Longitudes of the columns' centres [W], degrees."""
        return self.west + (np.arange(self.shape[1]) + 0.5) * self.degrees


def build_cells(
    lat: np.ndarray, lon: np.ndarray, degrees: float, box: tuple[float, float, float, float] | None
) -> Cells:
    """The cells of a box (south, north, west, east edges), by default of the points' extent rounded outward.

    Points on both sides of the date line have a narrow extent across it: the circle is cut at their widest gap.

    ConfigError if `degrees` is not positive or does not divide the box, or if the box is not one.
    """
    if not (np.isfinite(degrees) and degrees > 0):
        raise ConfigError(f"degrees: {degrees}: expected a number > 0")
    if box is None:
        lon = continuous_longitudes(lon)
        south, west = (float(np.floor(values.min() / degrees + EDGE)) for values in (lat, lon))
        north, east = (float(np.floor(values.max() / degrees + EDGE)) + 1 for values in (lat, lon))
        east = min(east, west + np.ceil(360 / degrees - EDGE))  # once round the world
        return Cells(south * degrees, west * degrees, degrees, (int(north - south), int(east - west)))
    south, north, west, east = box
    if not (-90 <= south < north <= 90 and west < east <= west + 360):
        raise ConfigError(
            f"box: [{south:g}, {north:g}, {west:g}, {east:g}]: expected south < north, west < east in degrees"
        )
    shape = []
    for low, high, side in ((south, north, "height"), (west, east, "width")):
        count = round((high - low) / degrees)
        if count < 1 or abs(count * degrees - (high - low)) > 1e-6 * degrees:
            raise ConfigError(
                f"degrees: {degrees:g}: expected a cell side that divides the {side} of the box, {high - low:g} degrees"
            )
        shape.append(count)
    return Cells(south, west, degrees, (shape[0], shape[1]))


def continuous_longitudes(lon: np.ndarray, west: float | None = None) -> np.ndarray:
    """Return longitudes [...] moved by whole turns so that they do not jump: 358, 359, 0, 1 become -2, -1, 0, 1.

    The circle is cut just west of `west` (degrees), by default at the widest gap between longitudes; the westernmost
    comes out in -180..180, so that 179, -180 become 179, 180.
    """
    lon = np.asarray(lon, np.float64)
    if west is None:
        circle = np.unique(lon % 360.0)
        west = float(circle[np.argmax(np.diff(circle, prepend=circle[-1] - 360.0))])
    west = (west + 180.0) % 360.0 - 180.0
    return lon - 360.0 * np.floor((lon - west + SAME_PLACE_DEGREES) / 360.0)
