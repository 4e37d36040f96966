"""The horizontal grid: where its cells are."""

from dataclasses import dataclass

import numpy as np

from topoflow.errors import ConfigError

EARTH_RADIUS_KM = 6371.0088
"""Mean radius of the Earth (IUGG, GRS 80)."""

SAME_PLACE_DEGREES = 1e-4
"""Coordinates closer than this are the same: more than what storing them as float32 costs."""


@dataclass(frozen=True)
class Grid:
    """H x W cells, rows from north to south, columns from west to east. lat2d, lon2d: float64 [H, W], degrees."""

    lat2d: np.ndarray
    lon2d: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return self.lat2d.shape

    def describe(self) -> str:
        """Its size and extent, for a message."""
        rows, columns = self.shape
        south, north = self.lat2d.min(), self.lat2d.max()
        west, east = self.lon2d.min(), self.lon2d.max()
        return f"{rows} x {columns} cells, latitude {south:g} to {north:g}, longitude {west:g} to {east:g}"

    def is_at(self, other: "Grid") -> bool:
        """Whether the cells of both are at the same place."""
        return same_place(self.lat2d, other.lat2d) and same_place(self.lon2d, other.lon2d)

    def to_dict(self) -> dict[str, list]:
        """Plain values, degrees: lists of rows and columns, or of all cells where these are not straight."""
        lat, lon = np.round(self.lat2d, 6), np.round(self.lon2d, 6)
        if np.all(lat == lat[:, :1]) and np.all(lon == lon[:1]):
            lat, lon = lat[:, 0], lon[0]
        return {"lat": lat.tolist(), "lon": lon.tolist()}

    @classmethod
    def from_dict(cls, content: dict[str, list]) -> "Grid":
        """What `to_dict` gave."""
        lat, lon = np.array(content["lat"]), np.array(content["lon"])
        return cls(*(np.meshgrid(lat, lon, indexing="ij") if lat.ndim == 1 else (lat, lon)))

    def patch_centres_km(self, patch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the patches stand: (x_km, y_km), each float64 [N], x to the east, y to the north.

        The N = (H / patch_size) (W / patch_size) patches are in raster order of the data. The projection is
        equirectangular about the middle of the grid's extent. Rounded to a millimetre, so that patches of one row or
        column tie exactly. ConfigError if the grid does not divide into patches.
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


def same_place(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two sets of coordinates in degrees agree in shape and, but for whole turns, in values."""
    return a.shape == b.shape and bool(np.all(np.abs((a - b + 180) % 360 - 180) <= SAME_PLACE_DEGREES))
