"""Back trajectories: where the air that is over each cell at a lead time was at the start, and what it has passed over.

A position is a fractional (column, row) of the grid. It moves by dp/dt = J^-1 (u, v), with u and v in m/s to the east
and north, and J what one column and one row are in metres to the east and north: central differences of the cells'
coordinates on the sphere, so that grids may be curvilinear. J^-1 (u, v) is bilinear in space, and linear in time
between the given hours. A step back is one of the midpoint method (Staniforth and Cote 1991, Mon. Wea. Rev. 119, 2206,
section 2), at most STEP_HOURS long. The air is that of one layer: it does not rise or sink.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from topoflow.errors import ConfigError

STEP_HOURS = 3.0
"""Longest step. The error of a step falls with its square, see docs/physics.md."""
EARTH_RADIUS_M = 6371008.8
"""Mean radius of the Earth (IUGG, GRS 80)."""
MOST_LATITUDE = 89.0
"""Closer to a pole, a step to the east is too many columns."""


class IndexSpace:
    """The positions between the cells of a grid.

    Args:
        lat, lon: of the cells in degrees, [H] and [W], or [H, W] each.

    Attributes:
        shape: (H, W).
        closed: whether the last column borders on the first, around the globe. Elsewhere positions end at the edge.

    Raises:
        ConfigError: there are fewer than 3 rows or columns, or a cell lies beyond MOST_LATITUDE.
    """

    def __init__(self, lat: np.ndarray, lon: np.ndarray):
        lat2d, lon2d = np.meshgrid(lat, lon, indexing="ij") if lat.ndim == 1 else (lat, lon)
        self.shape = rows, columns = lat2d.shape
        if min(rows, columns) < 3:
            raise ConfigError(f"data.advect: the grid has {rows} x {columns} cells: expected at least 3 x 3")
        if np.abs(lat2d).max() > MOST_LATITUDE:
            raise ConfigError(
                f"data.advect: the grid reaches latitude {lat2d.flat[np.abs(lat2d).argmax()]:g}: expected cells within "
                f"{MOST_LATITUDE:g} degrees of the equator"
            )
        phi = np.deg2rad(lat2d)
        turn = np.unwrap(np.unwrap(np.deg2rad(lon2d), axis=1), axis=0)
        last_step = (turn[:, 0] - turn[:, -1]) % (2 * np.pi)
        self.closed = bool(np.allclose(last_step, (turn[:, -1] - turn[:, 0]) / (columns - 1), rtol=1e-3))
        north = [EARTH_RADIUS_M * np.gradient(phi, axis=axis, edge_order=2) for axis in (1, 0)]
        east = [EARTH_RADIUS_M * np.cos(phi) * np.gradient(turn, axis=axis, edge_order=2) for axis in (1, 0)]
        inverse = np.array([[north[1], -east[1]], [-north[0], east[0]]]) / (east[0] * north[1] - east[1] * north[0])
        self._cells_per_hour = 3600 * inverse  # of 1 m/s: [2 (column, row), 2 (east, north), H, W]
        # one more than a power of two, so that torch's coordinates from -1 to 1 are exact for the cells themselves
        self._padded = tuple(1 + 2 ** int(np.ceil(np.log2(size))) for size in self.shape)

    def cells(self, count: int, dtype: np.dtype) -> np.ndarray:
        """Return the positions of all cells, `count` times: [2 (column, row), count, H, W]."""
        return np.repeat(np.indices(self.shape, dtype)[::-1, None], count, axis=1)

    def velocity(self, wind_ms: np.ndarray) -> np.ndarray:
        """Return wind [n, 2 (u, v), H, W] in columns and rows an hour, [n, 2 (column, row), H, W]."""
        factors = self._cells_per_hour.astype(wind_ms.dtype)
        return factors[:, 0] * wind_ms[:, :1] + factors[:, 1] * wind_ms[:, 1:]

    def keep_inside(self, positions: np.ndarray) -> None:
        """Move positions [2, ...] that are beyond an edge to the edge, or around the globe, in place."""
        (height, width), (columns, rows) = self.shape, positions
        np.clip(rows, 0, height - 1, out=rows)
        if self.closed:
            np.mod(columns, width, out=columns)
        else:
            np.clip(columns, 0, width - 1, out=columns)

    def pad(self, fields: np.ndarray) -> np.ndarray:
        """Return fields [..., H, W] as `sample` takes them: continued to the right and below."""
        height, width = self.shape
        padded = np.zeros((*fields.shape[:-2], *self._padded), fields.dtype)
        padded[..., :height, :width] = fields
        if self.closed:
            padded[..., :height, width] = fields[..., 0]
        return padded

    def sample(self, padded: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return bilinear values [C, n, H, W] of fields from `pad` [C, ...], all finite, at positions [2, n, H, W].

        torch does it, with the calling thread alone, ten times as fast as numpy.
        """
        shape = positions.shape[1:]
        points = np.empty((*shape, 2), positions.dtype)
        for axis, size in enumerate(padded.shape[:0:-1]):
            np.multiply(positions[axis], 2 / (size - 1), out=points[..., axis])
        points -= 1
        points = torch.from_numpy(points.reshape(1, -1, shape[-1], 2))
        values = torch.nn.functional.grid_sample(torch.from_numpy(padded)[None], points, align_corners=True)
        return values.numpy().reshape(len(padded), *shape)


def trace_back(
    space: IndexSpace,
    lead_times_hours: Sequence[int],
    wind_hours: Sequence[int],
    wind_ms: np.ndarray,
    beneath: np.ndarray | None = None,
    step_hours: float = STEP_HOURS,
) -> tuple[np.ndarray, np.ndarray]:
    """Follow the air back from all cells at each lead time to the start (hour 0).

    Args:
        lead_times_hours: increasing [L].
        wind_hours: increasing [n], from 0 to the longest lead or later.
        wind_ms: u and v at those hours in m/s, [n, 2, H, W], none missing; its type is that of the computation.
        beneath: fields [C, H, W] to average along the paths; NaN where missing.

    Returns:
        positions at the start, [2 (column, row), L, H, W]; means of `beneath` over the time of the path, by the
        midpoint rule over the steps, float64 [C, L, H, W], NaN where all of it is missing.
    """
    assert wind_hours[0] == 0
    assert wind_hours[-1] >= lead_times_hours[-1]
    winds = space.pad(space.velocity(wind_ms))
    ground = space.pad(_values_and_presence(np.empty((0, *space.shape)) if beneath is None else beneath, winds.dtype))
    sums = np.zeros((len(ground), len(lead_times_hours), *space.shape))
    positions = space.cells(len(lead_times_hours), winds.dtype)
    for later, hours in _steps(lead_times_hours, wind_hours, step_hours):
        first = bisect_left(lead_times_hours, later)  # air of shorter leads does not move yet
        moving, middle = positions[:, first:], later - hours / 2
        halfway = moving - hours / 2 * space.sample(_at(winds, wind_hours, later), moving)
        space.keep_inside(halfway)
        found = space.sample(np.concatenate([_at(winds, wind_hours, middle), ground]), halfway)
        moving -= hours * found[:2]
        space.keep_inside(moving)
        sums[:, first:] += hours * found[2:].astype(np.float64)
    return positions, _mean_of_present(sums)


def interpolate(space: IndexSpace, fields: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return bilinear values [C, L, H, W] of fields [C, H, W] at positions [2, L, H, W].

    Missing values (NaN) are left out: the weights are those of the cells present. NaN where there is none.
    """
    if np.isnan(fields).any():
        weighted = _values_and_presence(fields, fields.dtype)
        return _mean_of_present(space.sample(space.pad(weighted), positions))
    return space.sample(space.pad(fields), positions)


def _steps(leads: Sequence[int], wind_hours: Sequence[int], longest: float) -> list[tuple[float, float]]:
    """Return the steps back from the longest lead to 0: (hour where it begins, its length).

    A step begins at each lead, and at each hour of the wind, where its change in time has a kink.
    """
    nodes = sorted({0, *leads, *(hour for hour in wind_hours if hour < leads[-1])})
    found: list[tuple[float, float]] = []
    for earlier, later in pairwise(nodes):
        count = int(np.ceil((later - earlier) / longest))
        hours = (later - earlier) / count
        found += [(earlier + number * hours, hours) for number in range(1, count + 1)]
    return found[::-1]


def _at(winds: np.ndarray, hours: Sequence[int], hour: float) -> np.ndarray:
    """Return what [n, ...] are at `hours`, at an hour between them."""
    after = max(1, bisect_left(hours, hour))
    share = winds.dtype.type((hour - hours[after - 1]) / (hours[after] - hours[after - 1]))
    return winds[after - 1] + share * (winds[after] - winds[after - 1])


def _values_and_presence(fields: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return fields [C, H, W] with 0 where missing, and below them whether each is present: [2 C, H, W]."""
    present = ~np.isnan(fields)
    return np.concatenate([np.where(present, fields, 0), present]).astype(dtype)


def _mean_of_present(weighted: np.ndarray) -> np.ndarray:
    """Return sums over sums of weights, [2 C, ...] -> [C, ...], NaN where no weight."""
    total, weight = np.split(weighted, 2)
    return np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)
