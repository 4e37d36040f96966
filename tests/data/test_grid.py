"""Positions of cells and patches."""

import numpy as np
import pytest

from topoflow.data.grid import Grid
from topoflow.errors import ConfigError


def regular_grid(lat, lon):
    return Grid(*np.meshgrid(lat, lon, indexing="ij"))


def haversine_km(lat1, lon1, lat2, lon2):
    lat1, lon1, lat2, lon2 = np.deg2rad([lat1, lon1, lat2, lon2])
    a = np.sin((lat2 - lat1) / 2) ** 2 + np.cos(lat1) * np.cos(lat2) * np.sin((lon2 - lon1) / 2) ** 2
    return 2 * 6371.0088 * np.arcsin(np.sqrt(a))


def test_patch_centres_are_where_great_circles_put_them():
    lat, lon = np.linspace(31, 29, 8), np.linspace(99, 101, 12)
    x, y = regular_grid(lat, lon).patch_centres_km(2)
    assert x.shape == y.shape == (24,)
    lat_of_patch, lon_of_patch = lat.reshape(-1, 2).mean(1), lon.reshape(-1, 2).mean(1)
    for patch in (0, 5, 6, 23):
        north, east = lat_of_patch[patch // 6], lon_of_patch[patch % 6]
        distance = haversine_km(30, 100, north, east)
        assert np.hypot(x[patch], y[patch]) == pytest.approx(distance, rel=5e-3)
        assert np.sign(x[patch]) == np.sign(east - 100)
        assert np.sign(y[patch]) == np.sign(north - 30)


def test_patches_of_one_row_or_column_tie_exactly():
    x, y = regular_grid(np.linspace(20, 53.3, 12), np.linspace(73.1, 134.9, 12)).patch_centres_km(3)
    assert all(len(set(column)) == 1 for column in x.reshape(4, 4).T)
    assert all(len(set(row)) == 1 for row in y.reshape(4, 4))


def test_the_date_line_is_not_a_gap():
    x, _ = regular_grid([1, 0], [178, 179, 180, 181]).patch_centres_km(1)
    np.testing.assert_allclose(np.diff(x[:4]), 111.195, rtol=1e-3)


def test_patch_that_does_not_divide_is_refused_with_the_sizes():
    with pytest.raises(ConfigError, match=r"model.patch_size: 4 .* 6 x 8"):
        regular_grid(np.arange(6), np.arange(8)).patch_centres_km(4)


@pytest.mark.parametrize("is_straight", [True, False])
def test_plain_values_say_where_the_cells_are(is_straight):
    grid = regular_grid([30.0, 20.0, 10.0], [100.0, 101.0])
    if not is_straight:
        grid = Grid(grid.lat2d + np.array([0.0, 0.5]), grid.lon2d)
    plain = grid.to_dict()
    assert np.ndim(plain["lat"]) == (1 if is_straight else 2)
    assert Grid.from_dict(plain).is_at(grid)
    assert not Grid.from_dict(plain).is_at(Grid(grid.lat2d[::-1], grid.lon2d))
    assert not Grid.from_dict(plain).is_at(Grid(grid.lat2d[:2], grid.lon2d[:2]))
    assert Grid.from_dict(plain).is_at(Grid(grid.lat2d, grid.lon2d - 360))
    assert grid.describe().startswith("3 x 2 cells, latitude 10 to 30")
