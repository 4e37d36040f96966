"""The horizontal grid: where its cells are, how high they stand, and which of them count."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from topoflow.errors import ConfigError, DataError, MissingPath

EARTH_RADIUS_KM = 6371.0088
"""Mean radius of the Earth (IUGG, GRS 80)."""

SAME_PLACE_DEGREES = 1e-4
"""Coordinates closer than this are the same: more than what storing them as float32 costs."""


@dataclass(frozen=True)
class Grid:
    """H x W cells in the row order of the data, which are never flipped; columns run from west to east.

    lat2d, lon2d: float64 [H, W], degrees. north_first: whether row 0 is the northernmost. elevation_m: float32 [H, W],
    metres above sea level, no NaN; population: float32 [H, W], people in the cell; each None if it was not asked for.
    """

    lat2d: np.ndarray
    lon2d: np.ndarray
    north_first: bool
    elevation_m: np.ndarray | None = None
    population: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return self.lat2d.shape

    def heights_m(self) -> np.ndarray:
        """float32 [H, W]: terrain height in metres, 0 everywhere if it was not asked for (then nothing looks at it)."""
        return np.zeros(self.shape, np.float32) if self.elevation_m is None else self.elevation_m

    def patch_centres_km(self, patch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the patches stand: (x_km, y_km), each float64 [N], x to the east, y to the north.

        The N = (H / patch_size) (W / patch_size) patches are in raster order of the data. The projection is
        equirectangular about the middle of the grid's extent, whichever way its rows run. Rounded to a millimetre, so
        that patches of one row or column tie exactly. ConfigError if the grid does not divide into patches.
        """
        rows, columns = self.shape
        if rows % patch_size or columns % patch_size:
            raise ConfigError(
                f"model.patch_size: {patch_size} does not divide the grid of {rows} x {columns} cells: "
                "expected a divisor of both"
            )
        middle_lat = (self.lat2d.min() + self.lat2d.max()) / 2
        middle_lon = (self.lon2d.min() + self.lon2d.max()) / 2
        km_per_degree = np.pi / 180 * EARTH_RADIUS_KM
        x = (self.lon2d - middle_lon) * km_per_degree * np.cos(np.deg2rad(middle_lat))
        y = (self.lat2d - middle_lat) * km_per_degree
        blocks = (rows // patch_size, patch_size, columns // patch_size, patch_size)
        return tuple(np.round(field.reshape(blocks).mean(axis=(1, 3)).ravel(), 6) for field in (x, y))


def build_grid(lat2d: np.ndarray, lon2d: np.ndarray, where: str) -> Grid:
    """Grid from cell coordinates in degrees, [H, W] each; `where` names the file in the DataError raised if they fail.

    Longitudes that jump at the date line are made continuous (170, 180, 190).
    """
    lat2d, lon2d = np.asarray(lat2d, np.float64), np.asarray(lon2d, np.float64)
    if min(lat2d.shape) < 2:
        raise DataError(f"{where}: grid of {lat2d.shape[0]} x {lat2d.shape[1]} cells: expected at least 2 x 2")
    for name, degrees, limit in (("lat", lat2d, 90.0), ("lon", lon2d, 360.0)):
        if not np.all(np.abs(degrees) <= limit):
            raise DataError(
                f"{where}: coordinate {name} has values that are not between -{limit:g} and {limit:g} degrees"
            )
    if np.ptp(lon2d) > 180:
        wrapped = lon2d % 360
        lon2d = wrapped if np.ptp(wrapped) < np.ptp(lon2d) else lon2d
    southward, eastward = np.diff(lat2d, axis=0), np.diff(lon2d, axis=1)
    if not (np.all(southward < 0) or np.all(southward > 0)):
        raise DataError(f"{where}: coordinate lat is not monotonic along the rows")
    if not np.all(eastward > 0):
        raise DataError(f"{where}: coordinate lon does not increase along the columns: expected west to east")
    return Grid(lat2d, lon2d, north_first=bool(southward[0, 0] < 0))


def same_place(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two sets of coordinates in degrees agree in shape and, but for whole turns, in values."""
    return a.shape == b.shape and bool(np.all(np.abs((a - b + 180) % 360 - 180) <= SAME_PLACE_DEGREES))


def load_mask(path: str | None, grid: Grid, key: str = "data.mask") -> np.ndarray:
    """bool [H, W]: the cells that count, True everywhere without a path.

    A NetCDF or Zarr mask that states its coordinates must agree with the grid. Raises MissingPath, ConfigError for a
    kind of file that cannot hold a mask, DataError for a mask of another shape or place, with NaN, or without a cell;
    they begin with `key`.
    """
    if path is None:
        return np.ones(grid.shape, dtype=bool)
    values = _read_mask(Path(path), grid, key)
    if values.shape != grid.shape:
        raise DataError(f"{key}: {path} has shape {values.shape}: expected that of the grid, {grid.shape}")
    if values.dtype.kind not in "biuf" or not np.all(np.isfinite(values)):
        raise DataError(f"{key}: {path} contains values that are not finite: expected 0 or 1 in each cell")
    if not np.any(values):
        raise DataError(f"{key}: {path} is empty: expected at least one cell that is not 0")
    return values != 0


def _read_mask(path: Path, grid: Grid, key: str) -> np.ndarray:
    if not path.exists():
        raise MissingPath(f"{key}: {path} does not exist: expected a .npy, .nc or .zarr file with the mask")
    engine = {".nc": "netcdf4", ".zarr": "zarr"}.get(path.suffix)
    if path.suffix != ".npy" and engine is None:
        raise ConfigError(f"{key}: {path} has an unknown file type: expected a .npy, .nc or .zarr file")
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        import xarray as xr

        with xr.open_dataset(path, engine=engine) as dataset:
            dataset.load()
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{key}: {path} cannot be read: {error}".splitlines()[0]) from error
    if "mask" not in dataset:
        raise DataError(
            f"{key}: {path} has no variable 'mask': it has {', '.join(map(str, dataset.variables)) or 'none'}"
        )
    for name, degrees in (("lat", grid.lat2d[:, 0]), ("lon", grid.lon2d[0])):
        if name in dataset.coords and dataset[name].ndim == 1 and not same_place(dataset[name].values, degrees):
            raise DataError(f"{key}: {path} does not match the grid of the data: {name} differs")
    return dataset["mask"].values
