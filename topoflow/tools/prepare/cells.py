"""A regular latitude-longitude grid of cells, and means over the points that lie in each."""

from dataclasses import dataclass

import numpy as np

from topoflow.data.grid import SAME_PLACE_DEGREES
from topoflow.errors import ConfigError, DataError

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

    def index(self, lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
        """Flat index (row * W + column) of the cell of each point, -1 outside: int64 [P]; 240 W is 120 E."""
        row = np.floor((lat - self.south) / self.degrees + EDGE).astype("int64")
        # a point just below the west edge must not wrap to 360 when it belongs on the edge
        east = (lon - self.west + EDGE * self.degrees) % 360.0
        column = np.floor(east / self.degrees).astype("int64")
        inside = (row >= 0) & (row < self.shape[0]) & (column < self.shape[1])
        return np.where(inside, row * self.shape[1] + column, -1)

    def describe(self) -> str:
        """The edges, for a message."""
        north, east = self.south + self.shape[0] * self.degrees, self.west + self.shape[1] * self.degrees
        return f"{self.south:g} to {north:g} N, {self.west:g} to {east:g} E"


def build_cells(
    lat: np.ndarray, lon: np.ndarray, degrees: float, box: tuple[float, float, float, float] | None
) -> Cells:
    """The cells of a box (south, north, west, east edges), by default of the points' extent rounded outward.

    Points on both sides of the date line have a narrow extent across it: the circle is cut at their widest gap.

    ConfigError if `degrees` is not positive or does not divide the box, or if the box is not one.
    """
    if not (np.isfinite(degrees) and degrees > 0):
        raise ConfigError(f"--degrees {degrees}: expected a number > 0")
    if box is None:
        lon = continuous_longitudes(lon)
        south, west = (float(np.floor(values.min() / degrees + EDGE)) for values in (lat, lon))
        north, east = (float(np.floor(values.max() / degrees + EDGE)) + 1 for values in (lat, lon))
        east = min(east, west + np.ceil(360 / degrees - EDGE))  # once round the world
        return Cells(south * degrees, west * degrees, degrees, (int(north - south), int(east - west)))
    south, north, west, east = box
    if not (-90 <= south < north <= 90 and west < east <= west + 360):
        raise ConfigError(
            f"--box {south:g},{north:g},{west:g},{east:g}: expected south < north, west < east in degrees"
        )
    shape = []
    for low, high, side in ((south, north, "height"), (west, east, "width")):
        count = round((high - low) / degrees)
        if count < 1 or abs(count * degrees - (high - low)) > 1e-6 * degrees:
            raise ConfigError(
                f"--degrees {degrees:g}: expected a cell side that divides the {side} of --box, {high - low:g} degrees"
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


def cell_means_of_points(cells: Cells, lat: np.ndarray, lon: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean of the points within each cell, the value of the nearest point (great circle) where there is none.

    `lat`, `lon`, `values` are [P]; NaN values do not count. Returns float32 [H, W]; DataError if there is no value.
    """
    present = np.isfinite(values)
    lat, lon, values = lat[present], lon[present], values[present].astype("float64")
    if not len(values):
        raise DataError("terrain: no height has a value: expected at least one")
    index = cells.index(lat, lon)
    inside = index >= 0
    size = cells.shape[0] * cells.shape[1]
    total = np.bincount(index[inside], weights=values[inside], minlength=size)
    count = np.bincount(index[inside], minlength=size)
    mean = total / np.maximum(count, 1)
    points = _unit_vectors(lat, lon)
    lat2d, lon2d = np.meshgrid(cells.lat, cells.lon, indexing="ij")
    centres = _unit_vectors(lat2d.ravel(), lon2d.ravel())
    for cell in np.flatnonzero(count == 0):
        mean[cell] = values[np.argmax(points @ centres[cell])]
    return mean.reshape(cells.shape).astype("float32")


def check_covers(cells: Cells, lat: np.ndarray, lon: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Row and column numbers of a rectilinear grid (centres `lat` [h], `lon` [w]) that the cells need.

    These are the rows and columns within the box and a margin of one spacing or cell around it. DataError, naming the
    grid, if the centre of an outermost cell lies beyond its edge.
    """
    if len(lat) < 2 or len(lon) < 2:
        raise DataError(f"{name}: {len(lat)} x {len(lon)} heights: expected at least 2 x 2")
    middle = cells.west + cells.degrees * cells.shape[1] / 2
    lon = middle + (lon - middle + 180.0) % 360.0 - 180.0
    selected = []
    for axis, have, need in (("latitude", lat, cells.lat), ("longitude", lon, cells.lon)):
        spacing = float(np.median(np.abs(np.diff(np.sort(have)))))
        if need[0] < have.min() - 0.51 * spacing or need[-1] > have.max() + 0.51 * spacing:
            raise DataError(
                f"{name}: {axis} {have.min():g} to {have.max():g} does not cover the cells' {need[0]:g} to {need[-1]:g}"
            )
        margin = max(spacing, cells.degrees)
        selected.append(np.flatnonzero((have >= need[0] - margin) & (have <= need[-1] + margin)))
    return selected[0], selected[1]


def _unit_vectors(lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
    """Points on the unit sphere [P, 3] of latitudes and longitudes in degrees."""
    phi, theta = np.radians(lat), np.radians(lon)
    return np.stack([np.cos(phi) * np.cos(theta), np.cos(phi) * np.sin(theta), np.sin(phi)], axis=-1)
