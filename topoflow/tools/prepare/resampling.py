"""Fields on another number of rows and columns over the same extent; cells without a value do not count."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from topoflow.data.grid import Grid, build_grid
from topoflow.errors import ConfigError, DataError

Method = Literal["area", "bilinear"]


@dataclass(frozen=True)
class _Axis:
    """Along one axis, output i is the sum over k of weight[i, k] times input index[i, k]. Both [n, K]."""

    index: np.ndarray
    weight: np.ndarray


@dataclass(frozen=True)
class Resampling:
    """From one grid to another. Built by `build_resampling`.

    grid: the one that comes out, without static fields. area: [h, w], what a cell of the one that goes in weighs.
    """

    grid: Grid
    method: Method
    area: np.ndarray
    _rows: _Axis
    _columns: _Axis

    def mean(self, fields: np.ndarray) -> np.ndarray:
        """float32 [..., H, W] of fields [..., h, w]: the weighted mean of the values there are, NaN without one."""
        present = ~np.isnan(fields)
        weight = np.where(present, self.area, 0.0)
        total = self._sum(np.where(present, fields, 0.0) * weight)
        weight = self._sum(weight)
        mean = np.full(total.shape, np.nan)
        np.divide(total, weight, out=mean, where=weight > 0)
        return mean.astype(np.float32)

    def share_out(self, field: np.ndarray) -> np.ndarray:
        """float32 [H, W] of a field [h, w] of counts, of which a cell gives each other the share that it covers of it.

        So their sum stays, but for cells without a value. With `bilinear`, counts are interpolated like all else.
        """
        if self.method == "bilinear":
            return self.mean(field)
        present = ~np.isnan(field)
        total = self._sum(np.where(present, field.astype(np.float64), 0.0))
        return np.where(self._sum(present.astype(np.float64)) > 0, total, np.nan).astype(np.float32)

    def _sum(self, fields: np.ndarray) -> np.ndarray:
        """float64 [..., H, W]. Summed in a fixed order, so bit-identical on any machine, unlike a matrix product."""
        rows, columns = self._rows, self._columns
        down = sum(
            (rows.weight[:, k, None] * fields[..., rows.index[:, k], :] for k in range(rows.index.shape[1])),
            start=np.zeros(()),
        )  # [..., H, w]
        across = (columns.weight[:, k] * down[..., columns.index[:, k]] for k in range(columns.index.shape[1]))
        return sum(across, start=np.zeros(()))


def build_resampling(grid: Grid, shape: tuple[int, int], method: Method) -> Resampling:
    """From `grid` to `shape` rows and columns over the same extent.

    area: the mean of the cells that lie in the new one, each by the area of it that does: the share of its rows and
    columns, times the cosine of its latitude. Only to fewer or as many rows and columns.
    bilinear: between the centres of the four nearest cells, as the published program does it on the fly and as
    torch.nn.functional.interpolate does (mode="bilinear", align_corners=False). It skips cells where it coarsens.

    Raises ConfigError for a shape that cannot be made.
    """
    rows, columns = grid.shape
    wanted = f"--grid {shape[0]}x{shape[1]}"
    if min(shape) < 2:
        raise ConfigError(f"{wanted}: expected at least 2x2")
    if method == "area" and (shape[0] > rows or shape[1] > columns):
        raise ConfigError(f"{wanted}: finer than the data, {rows}x{columns}: expected --method bilinear to refine")
    build = _overlaps if method == "area" else _neighbours
    axes = build(rows, shape[0]), build(columns, shape[1])
    area = np.cos(np.deg2rad(grid.lat2d)) if method == "area" else np.ones(grid.shape)
    plain = Resampling(grid, method, np.ones(grid.shape), *axes)
    counts = plain._sum(np.ones(grid.shape))
    try:
        coarse = build_grid(*(plain._sum(d) / counts for d in (grid.lat2d, grid.lon2d)), where="the resampled grid")
    except DataError as error:
        raise ConfigError(f"{wanted}: {error}") from error
    return Resampling(coarse, method, area, *axes)


def _overlaps(have: int, want: int) -> _Axis:
    """How much of each of `have` intervals lies in each of `want` that cover the same length. The weights of one of the
    `have` intervals sum to 1."""
    edges = np.arange(want + 1) * have  # in units of 1 / want of an interval: whole numbers, so nothing is rounded
    first, last = edges[:-1] // want, -(-edges[1:] // want)
    index = first[:, None] + np.arange(int((last - first).max()))
    low = np.maximum(edges[:-1, None], index * want)
    high = np.minimum(edges[1:, None], (index + 1) * want)
    return _Axis(np.minimum(index, have - 1), np.maximum(high - low, 0) / want)


def _neighbours(have: int, want: int) -> _Axis:
    """The two intervals whose centres are nearest to that of each of `want`, weighted linearly; one at the ends."""
    centre = np.maximum((np.arange(want) + 0.5) * have / want - 0.5, 0.0)
    low = np.minimum(np.floor(centre).astype(np.int64), have - 1)
    fraction = np.minimum(centre - low, 1.0)
    fraction = np.where(low == have - 1, 0.0, fraction)
    return _Axis(np.stack([low, np.minimum(low + 1, have - 1)], axis=1), np.stack([1 - fraction, fraction], axis=1))
