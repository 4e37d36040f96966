"""Fields and stations on the cells of another grid; missing values do not count.

Sums run in a fixed order, so they do not depend on how many hours are read at once.
"""

from dataclasses import dataclass

import numpy as np

from topoflow.data.grid import SAME_PLACE_DEGREES, same_place
from topoflow.errors import ConfigError
from topoflow.tools.prepare.recipe import Method

_REGULAR_DEGREES = 1e-6
"""Cells whose rows and columns are this straight lie on 1-D latitudes and longitudes."""


@dataclass(frozen=True)
class Axes:
    """A grid of rows of one latitude and columns of one longitude, north first, west to east.

    lat [H], lon [W]: centres in degrees. lat_edges [H + 1], lon_edges [W + 1]: midway between centres, or as given.
    """

    lat: np.ndarray
    lon: np.ndarray
    lat_edges: np.ndarray
    lon_edges: np.ndarray


@dataclass(frozen=True)
class Target:
    """lat, lon: float64 [H, W], north first, west to east. axes: of straight rows and columns."""

    lat: np.ndarray
    lon: np.ndarray
    axes: Axes | None

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return self.lat.shape


def axes_of(lat2d: np.ndarray, lon2d: np.ndarray) -> Axes | None:
    """Return the axes of a grid [H, W], or None where rows or columns are not straight."""
    straight = np.ptp(lat2d, axis=1).max() <= _REGULAR_DEGREES and np.ptp(lon2d, axis=0).max() <= _REGULAR_DEGREES
    if not straight:
        return None
    lat, lon = lat2d[:, 0], lon2d[0]
    return Axes(lat, lon, np.clip(_edges(lat), -90.0, 90.0), _edges(lon))


def _edges(centres: np.ndarray) -> np.ndarray:
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


@dataclass(frozen=True)
class _Axis:
    """Along one axis, output i is the sum over k of weight[i, k] times input index[i, k]. Both [n, K]."""

    index: np.ndarray
    weight: np.ndarray


class FieldRegridding:
    """From the cells of a gridded source to those of the target.

    area: the mean of what a cell of the target covers, by area on the sphere. bilinear: between the four nearest
    centres. A source whose rows or columns are not straight has no areas here: a cell of the target is then the mean
    of the centres inside it, or the value of the cell that it lies in. On the same cells, values are left as they are.

    Args:
        lat, lon: of the source, float64 [h, w], north first, west to east.
        target_lat, target_lon: of the target, float64 [H, W].
        method: area or bilinear.

    Raises:
        ConfigError: bilinear between grids that are not straight.
    """

    def __init__(
        self, lat: np.ndarray, lon: np.ndarray, target_lat: np.ndarray, target_lon: np.ndarray, method: Method
    ):
        self.shape: tuple[int, int] = target_lat.shape
        self.is_identity = same_place(lat, target_lat) and same_place(lon, target_lon)
        self._points: PointMeans | None = None
        self._areas: np.ndarray | None = None
        if self.is_identity:
            return
        have, want = axes_of(lat, lon), axes_of(target_lat, target_lon)
        if have is None or want is None:
            if method == "bilinear":
                raise ConfigError("grid.method: bilinear: expected sources and a grid of straight rows and columns")
            self._points = PointMeans(lat.ravel(), lon.ravel(), target_lat, target_lon)
            self._empty = np.setdiff1d(np.arange(target_lat.size), self._points.cell)
            inside = target_lat.ravel()[self._empty], target_lon.ravel()[self._empty]
            self._donors = _nearest(*inside, lat, lon) if have is None else _enclosing(*inside, have)
        elif method == "area":
            # the area between two parallels grows with the sine of the latitude
            sines = np.sin(np.deg2rad(-have.lat_edges))
            wanted_sines = np.sin(np.deg2rad(-_aligned(want.lat_edges, have.lat_edges)))
            self._rows = _overlaps(sines, wanted_sines, period=None)
            self._columns = _overlaps(have.lon_edges, _aligned(want.lon_edges, have.lon_edges, 360.0), period=360.0)
            self._areas = np.diff(sines)[:, None] * np.diff(have.lon_edges)
        else:
            self._rows = _neighbours(-have.lat, -want.lat, period=None)
            self._columns = _neighbours(have.lon, want.lon, period=360.0)

    def mean(self, fields: np.ndarray) -> np.ndarray:
        """Return float32 [..., H, W] of fields [..., h, w]: weighted means of the values present, NaN without one."""
        if self.is_identity:
            return fields.astype(np.float32, copy=False)
        if self._points is not None:
            flat = fields.reshape(*fields.shape[:-2], -1)
            mean = self._points.mean(flat).reshape(*fields.shape[:-2], -1)
            mean[..., self._empty] = np.where(self._donors >= 0, flat[..., self._donors], np.nan)
            return mean.reshape(*fields.shape[:-2], *self.shape)
        present = ~np.isnan(fields)
        total = self._sum(np.where(present, fields, 0.0))
        weight = self._sum(present.astype(np.float64))
        mean = np.full(total.shape, np.nan)
        np.divide(total, weight, out=mean, where=weight > 1e-12)
        return mean.astype(np.float32)

    def share_out(self, counts: np.ndarray) -> np.ndarray:
        """Return float32 [H, W] of counts [h, w], of which a cell gives each of the target the share that it covers.

        So their sum stays, but for what lies outside the target. Where rows are not straight, a count goes to where the
        centre of its cell is.

        Raises:
            ConfigError: the method is bilinear, which keeps no sum.
        """
        if self.is_identity:
            return self.mean(counts)
        if self._points is not None:
            return self._points.sum(counts.ravel())
        if self._areas is None:
            raise ConfigError("counts are shared out by area: expected the method area")
        present = ~np.isnan(counts)
        total = self._sum(np.where(present, counts, 0.0) / self._areas)
        return np.where(self._sum(present.astype(np.float64)) > 0, total, np.nan).astype(np.float32)

    def _sum(self, fields: np.ndarray) -> np.ndarray:
        rows, columns = self._rows, self._columns
        down = sum(
            (rows.weight[:, k, None] * fields[..., rows.index[:, k], :] for k in range(rows.index.shape[1])),
            start=np.zeros(()),
        )  # [..., H, w]
        across = (columns.weight[:, k] * down[..., columns.index[:, k]] for k in range(columns.index.shape[1]))
        return sum(across, start=np.zeros(()))


def _aligned(want: np.ndarray, have: np.ndarray, period: float = np.inf) -> np.ndarray:
    """Edges `want`, or those of `have` (plus whole periods) where both are one place.

    Coordinates in float32 are up to 2e-5 degrees off, and cells that only touch would overlap by that much.
    """
    offset = want[:, None] - have
    if np.isfinite(period):
        offset -= period * np.round(offset / period)
    nearest = np.take_along_axis(offset, np.abs(offset).argmin(axis=1)[:, None], axis=1)[:, 0]
    return np.where(np.abs(nearest) <= SAME_PLACE_DEGREES, want - nearest, want)


def _overlaps(have: np.ndarray, want: np.ndarray, period: float | None) -> _Axis:
    """Lengths shared by each of the intervals `want` with those of `have`; edges increase; turned by whole periods."""
    low, high = have[:-1], have[1:]
    turns = (0.0,) if period is None else tuple(_turns(have[0], have[-1], want[0], want[-1], period))
    shared = np.zeros((len(want) - 1, len(low)))
    for turn in turns:
        first = np.maximum(want[:-1, None], low[None] + turn)
        last = np.minimum(want[1:, None], high[None] + turn)
        shared += np.maximum(last - first, 0.0)
    return _sparse(shared)


def _turns(low: float, high: float, want_low: float, want_high: float, period: float) -> np.ndarray:
    return np.arange(np.floor((want_low - high) / period), np.ceil((want_high - low) / period) + 1) * period


def _neighbours(have: np.ndarray, want: np.ndarray, period: float | None) -> _Axis:
    """The two centres of `have` around each of `want`, weighted linearly; beyond the outer ones by half a cell, one."""
    count = len(have)
    places, order = have, np.arange(count)
    if period is not None:
        turns = _turns(have[0], have[-1], want[0], want[-1], period)
        places = np.concatenate([have + turn for turn in turns])
        order = np.tile(np.arange(count), len(turns))
    spacing = float(np.median(np.diff(have)))
    right = np.clip(np.searchsorted(places, want), 1, len(places) - 1)
    left = right - 1
    # a gap between turned copies (a source that does not go round the globe) is no place to interpolate in
    gap = places[right] - places[left]
    fraction = np.clip((want - places[left]) / gap, 0.0, 1.0)
    is_wide = gap > 1.5 * np.maximum(spacing, np.diff(have).max())
    fraction = np.where(is_wide, np.round(fraction), fraction)
    weight = np.zeros((len(want), count))
    near = np.minimum(np.abs(want - places[left]), np.abs(want - places[right]))
    inside = ((want >= places[left]) & (want <= places[right]) & ~is_wide) | (near <= 0.51 * spacing)
    rows = np.arange(len(want))
    np.add.at(weight, (rows, order[left]), np.where(inside, 1 - fraction, 0.0))
    np.add.at(weight, (rows, order[right]), np.where(inside, fraction, 0.0))
    return _sparse(weight)


def _sparse(weights: np.ndarray) -> _Axis:
    """The non-zero weights [n, m] of each row, padded with weight 0."""
    most = max(1, int((weights > 0).sum(axis=1).max()))
    index = np.argsort(weights <= 0, axis=1, kind="stable")[:, :most]
    return _Axis(index, np.take_along_axis(weights, index, axis=1))


class PointMeans:
    """Means over the points (stations, or centres of cells) that lie in each cell of a grid.

    Args:
        lat, lon: of the points, float64 [P].
        target_lat, target_lon: of the cells, float64 [H, W]. A point belongs to the cell whose edges enclose it (the
            south and west edge do, the north and east do not); where rows or columns are not straight, to the nearest
            centre no farther than one diagonal.
        axes: the cells' edges where they are known exactly.
    """

    def __init__(
        self,
        lat: np.ndarray,
        lon: np.ndarray,
        target_lat: np.ndarray,
        target_lon: np.ndarray,
        axes: Axes | None = None,
    ):
        self.shape: tuple[int, int] = target_lat.shape
        axes = axes or axes_of(target_lat, target_lon)
        cell = _nearest(lat, lon, target_lat, target_lon) if axes is None else _enclosing(lat, lon, axes)
        self.cell = cell
        """Of each point, int64 [P]; -1 outside."""
        self._order = np.argsort(cell, kind="stable")
        self._order = self._order[cell[self._order] >= 0]
        self._cells, self._starts = np.unique(cell[self._order], return_index=True)

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Return float32 [..., H, W] of values [..., P]: the mean of those present in each cell, NaN without one."""
        leading = values.shape[:-1]
        mean = np.full((*leading, self.shape[0] * self.shape[1]), np.nan, np.float32)
        if len(self._order):
            chosen = values[..., self._order].astype(np.float64)
            present = ~np.isnan(chosen)
            total = np.add.reduceat(np.where(present, chosen, 0.0), self._starts, axis=-1)
            count = np.add.reduceat(present, self._starts, axis=-1, dtype=np.int64)
            means = np.full(total.shape, np.nan)
            np.divide(total, count, out=means, where=count > 0)
            mean[..., self._cells] = means
        return mean.reshape(*leading, *self.shape)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return float32 [H, W] of values [P]: the sum of those present in each cell, NaN without one."""
        there = (self.cell >= 0) & ~np.isnan(values)
        size = self.shape[0] * self.shape[1]
        total = np.bincount(self.cell[there], values[there], minlength=size)
        count = np.bincount(self.cell[there], minlength=size)
        return np.where(count > 0, total, np.nan).astype(np.float32).reshape(self.shape)


def _enclosing(lat: np.ndarray, lon: np.ndarray, axes: Axes) -> np.ndarray:
    edge = 1e-9  # a point may seem to lie below an edge through rounding
    north_to_south = -axes.lat_edges
    row = np.searchsorted(north_to_south, -lat - edge, side="left") - 1
    west = axes.lon_edges[0]
    column = np.searchsorted(axes.lon_edges, west + (lon - west + edge) % 360.0, side="right") - 1
    rows, columns = len(axes.lat), len(axes.lon)
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    return np.where(inside, row * columns + column, -1)


def _nearest(lat: np.ndarray, lon: np.ndarray, target_lat: np.ndarray, target_lon: np.ndarray) -> np.ndarray:
    centres = _unit_vectors(target_lat.ravel(), target_lon.ravel())
    grid = centres.reshape(*target_lat.shape, 3)
    reach = np.linalg.norm(np.diff(grid, axis=0), axis=-1).max() + np.linalg.norm(np.diff(grid, axis=1), axis=-1).max()
    points = _unit_vectors(lat, lon)
    cell = np.full(len(lat), -1)
    for start in range(0, len(lat), 256):
        closeness = points[start : start + 256] @ centres.T
        best = closeness.argmax(axis=1)
        chord = np.sqrt(np.maximum(2 - 2 * closeness[np.arange(len(best)), best], 0.0))
        cell[start : start + 256] = np.where(chord <= reach, best, -1)
    return cell


def _unit_vectors(lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
    """Points on the unit sphere [P, 3] of latitudes and longitudes in degrees."""
    phi, theta = np.radians(lat), np.radians(lon)
    return np.stack([np.cos(phi) * np.cos(theta), np.cos(phi) * np.sin(theta), np.sin(phi)], axis=-1)
