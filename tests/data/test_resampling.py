"""Compare resampled grids with torch, xarray and sums."""

import numpy as np
import pytest
import torch
from scipy.interpolate import RegularGridInterpolator

from topoflow.data.grid import build_grid
from topoflow.errors import ConfigError
from topoflow.tools.prepare.resampling import build_resampling

LAT, LON = np.linspace(55, 15, 12), np.linspace(70, 140, 20)
GRID = build_grid(*np.meshgrid(LAT, LON, indexing="ij"), where="a test")
FIELDS = np.random.default_rng(0).standard_normal((3, 12, 20)).astype(np.float32)


@pytest.mark.parametrize("shape", [(6, 10), (24, 40), (5, 7), (12, 20), (3, 4), (17, 9)])
def test_bilinear_is_that_of_the_published_program(shape):
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(FIELDS)[None].double(), size=shape, mode="bilinear", align_corners=False
    )[0]
    np.testing.assert_allclose(build_resampling(GRID, shape, "bilinear").mean(FIELDS), expected, rtol=1e-5, atol=1e-6)


def test_bilinear_is_linear_between_centres():
    resampling = build_resampling(GRID, (9, 16), "bilinear")
    inside = resampling.grid.lat2d[2:-2, 2:-2], resampling.grid.lon2d[2:-2, 2:-2]
    interpolate = RegularGridInterpolator((LAT[::-1], LON), FIELDS[0][::-1].astype(np.float64))
    np.testing.assert_allclose(resampling.mean(FIELDS)[0, 2:-2, 2:-2], interpolate(inside), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 10), (5, 7), (12, 20), (12, 7), (2, 3)])
def test_area_is_the_integral_over_the_new_cell(shape):
    """Compare with cells cut into pieces so small that both grids consist of whole pieces."""
    fine = np.repeat(np.repeat(FIELDS.astype(np.float64), shape[0], axis=1), shape[1], axis=2)
    weight = np.repeat(np.repeat(np.cos(np.deg2rad(GRID.lat2d)), shape[0], axis=0), shape[1], axis=1)
    blocks = (shape[0], 12, shape[1], 20)
    expected = (fine * weight).reshape(3, *blocks).sum((2, 4)) / weight.reshape(blocks).sum((1, 3))
    np.testing.assert_allclose(build_resampling(GRID, shape, "area").mean(FIELDS), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["area", "bilinear"])
def test_missing_cells_do_not_count(method):
    fields = np.full((1, 12, 20), 3.25, np.float32)
    fields[:, np.random.default_rng(1).random((12, 20)) < 0.5] = np.nan
    fields[:, :4, :4] = np.nan
    mean = build_resampling(GRID, (6, 10), method).mean(fields)
    np.testing.assert_array_equal(mean[~np.isnan(mean)], np.float32(3.25))
    assert np.isnan(mean[0, :2, :2]).all()
    has_any = ~np.isnan(fields[0]).reshape(6, 2, 10, 2).all(axis=(1, 3))
    np.testing.assert_array_equal(~np.isnan(mean[0]), has_any)


def test_people_are_neither_lost_nor_created():
    people = np.random.default_rng(2).uniform(0, 1e6, (12, 20)).astype(np.float32)
    for shape in ((6, 10), (5, 7), (12, 20)):
        shared = build_resampling(GRID, shape, "area").share_out(people)
        assert shared.sum(dtype=np.float64) == pytest.approx(people.sum(dtype=np.float64), rel=1e-6)
    np.testing.assert_array_equal(build_resampling(GRID, (12, 20), "area").share_out(people), people)


def test_the_same_extent_in_the_same_order_of_rows():
    for lat in (LAT, LAT[::-1]):
        grid = build_grid(*np.meshgrid(lat, LON, indexing="ij"), where="a test")
        for method in ("area", "bilinear"):
            coarse = build_resampling(grid, (6, 10), method).grid
            assert coarse.north_first is grid.north_first
            np.testing.assert_allclose(coarse.lat2d[:, 0], lat.reshape(6, 2).mean(axis=1))
            np.testing.assert_allclose(coarse.lon2d[0], LON.reshape(10, 2).mean(axis=1))


def test_refusals():
    with pytest.raises(ConfigError, match=r"--grid 13x20: finer than the data, 12x20: expected --method bilinear"):
        build_resampling(GRID, (13, 20), "area")
    with pytest.raises(ConfigError, match="--grid 1x20"):
        build_resampling(GRID, (1, 20), "bilinear")
