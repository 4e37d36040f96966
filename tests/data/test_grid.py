"""Positions of cells and patches, and the mask."""

import numpy as np
import pytest
import xarray as xr

from topoflow.data.grid import Grid, build_grid, load_mask
from topoflow.errors import ConfigError, DataError, MissingPath


def regular_grid(lat, lon):
    return build_grid(*np.meshgrid(lat, lon, indexing="ij"), where="here")


def haversine_km(lat1, lon1, lat2, lon2):
    lat1, lon1, lat2, lon2 = np.deg2rad([lat1, lon1, lat2, lon2])
    a = np.sin((lat2 - lat1) / 2) ** 2 + np.cos(lat1) * np.cos(lat2) * np.sin((lon2 - lon1) / 2) ** 2
    return 2 * 6371.0088 * np.arcsin(np.sqrt(a))


def test_row_order_is_read_from_the_coordinates():
    assert regular_grid([30, 20, 10], [100, 101]).north_first
    assert not regular_grid([10, 20, 30], [100, 101]).north_first


def test_patch_centres_are_where_great_circles_put_them():
    lat, lon = np.linspace(29, 31, 8), np.linspace(99, 101, 12)
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


def test_flipping_the_rows_flips_the_patches():
    rng = np.random.default_rng(1)  # sums of these differ in the last bit if taken from north to south
    lat, lon = np.sort(rng.uniform(20, 50, 12)), np.sort(rng.uniform(73, 134, 8))
    south, north = regular_grid(lat, lon), regular_grid(lat[::-1], lon)
    for first, second in zip(south.patch_centres_km(4), north.patch_centres_km(4), strict=True):
        np.testing.assert_array_equal(first.reshape(3, 2), second.reshape(3, 2)[::-1])


def test_the_date_line_is_not_a_gap():
    x, _ = regular_grid([0, 1], [178, 179, -180, -179]).patch_centres_km(1)
    np.testing.assert_allclose(np.diff(x[:4]), 111.195, rtol=1e-3)


def test_patch_that_does_not_divide_is_refused_with_the_sizes():
    with pytest.raises(ConfigError, match=r"model.patch_size: 4 .* 6 x 8"):
        regular_grid(np.arange(6), np.arange(8)).patch_centres_km(4)


@pytest.mark.parametrize(
    ("lat", "lon", "message"),
    [
        ([10, 30, 20], [100, 101], "coordinate lat"),
        ([10, 20], [101, 100], "coordinate lon does not increase"),
        ([10, np.nan], [100, 101], "coordinate lat"),
        ([80, 91], [100, 101], "coordinate lat has values"),
        ([10], [100, 101], "1 x 2"),
    ],
)
def test_coordinates_that_are_not_a_grid(lat, lon, message):
    with pytest.raises(DataError, match=f"here: .*{message}"):
        regular_grid(np.array(lat, float), np.array(lon, float))


@pytest.fixture
def grid() -> Grid:
    return regular_grid([30.0, 20.0, 10.0], [100.0, 101.0])


MASK = np.array([[1, 0], [0, 2], [1, 1]])


def mask_dataset(lat=(30.0, 20.0, 10.0), name="mask"):
    return xr.Dataset({name: (("lat", "lon"), MASK)}, {"lat": list(lat), "lon": [100.0, 101.0]})


def test_without_a_path_all_cells_count(grid):
    mask = load_mask(None, grid)
    assert mask.dtype == bool
    assert mask.all()
    assert mask.shape == (3, 2)


def test_mask_from_each_kind_of_file(grid, tmp_path):
    np.save(tmp_path / "mask.npy", MASK)
    mask_dataset().to_netcdf(tmp_path / "mask.nc")
    mask_dataset().to_zarr(tmp_path / "mask.zarr", zarr_format=2)
    for name in ("mask.npy", "mask.nc", "mask.zarr"):
        mask = load_mask(str(tmp_path / name), grid)
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, MASK != 0)


def test_masks_that_are_refused_by_name(grid, tmp_path):
    def refused(kind, name, message, array=None):
        if array is not None:
            np.save(tmp_path / name, array)
        with pytest.raises(kind, match=f"data.mask: .*{name}.*{message}"):
            load_mask(str(tmp_path / name), grid)

    refused(MissingPath, "absent.npy", "does not exist")
    refused(DataError, "empty.npy", "is empty", np.zeros((3, 2)))
    refused(DataError, "shape.npy", r"\(2, 3\)", np.ones((2, 3)))
    refused(DataError, "nan.npy", "not finite", np.full((3, 2), np.nan))
    refused(DataError, "text.npy", "not finite", np.full((3, 2), "yes"))
    (tmp_path / "mask.txt").write_text("1")
    refused(ConfigError, "mask.txt", "unknown file type")
    for broken in ("broken.npy", "broken.nc"):
        (tmp_path / broken).write_text("nothing of the kind")
        refused(DataError, broken, "cannot be read")
    mask_dataset(name="land").to_netcdf(tmp_path / "named.nc")
    refused(DataError, "named.nc", "no variable 'mask': it has .*land")
    mask_dataset(lat=(10.0, 20.0, 30.0)).to_netcdf(tmp_path / "flipped.nc")
    refused(DataError, "flipped.nc", "lat differ")
