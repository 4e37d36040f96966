"""Terrain, population and mask of files as they are."""

import numpy as np
import pytest
import xarray as xr

from tests.support.prepare_worlds import gridded, prepare_paths


def fine(name, values, unit="1"):
    """A field of 0.1 degrees over 29.5 to 37.5 N and 109.5 to 117.5 E, north first."""
    lat, lon = 37.45 - 0.1 * np.arange(80), 109.55 + 0.1 * np.arange(80)
    field = np.broadcast_to(np.asarray(values, "f4"), (80, 80))
    return xr.Dataset({name: (("lat", "lon"), field, {"units": unit})}, coords={"lat": lat, "lon": lon})


@pytest.fixture
def air(tmp_path):
    gridded(6).to_netcdf(tmp_path / "air.nc")
    return tmp_path


def test_people_are_summed_on_a_grid_whose_rows_are_not_straight(tmp_path):
    dataset = gridded(6)
    lat, lon = np.meshgrid(dataset.lat, dataset.lon, indexing="ij")
    dataset = dataset.drop_vars(["lat", "lon"]).rename(lat="y", lon="x")
    tilted = {"lat": (("y", "x"), lat + 0.05 * (lon - 113.5)), "lon": (("y", "x"), lon)}
    dataset.assign_coords(tilted).to_netcdf(tmp_path / "air.nc")
    fine("population", 3.0).to_netcdf(tmp_path / "people.nc")
    _, data = prepare_paths(tmp_path, "air.nc", population="people.nc")
    assert data.static("population").sum() == 3 * 80 * 80
    assert data.static("population")[3, 3] == pytest.approx(300, rel=0.05)


def test_people_are_summed_where_fields_are_interpolated(air):
    fine("population", 3.0).to_netcdf(air / "people.nc")
    grid = {"degrees": 2.0, "box": [30, 36, 110, 116], "method": "bilinear"}
    _, data = prepare_paths(air, "air.nc", population="people.nc", grid=grid)
    np.testing.assert_allclose(data.static("population"), 3 * 20 * 20, rtol=1e-3)


@pytest.mark.parametrize("depth", [-4000.0, -9999.0, -32768.0])
def test_depths_and_marks_are_no_heights(air, depth):
    heights = np.where(np.arange(80) < 40, depth, 100.0)
    fine("elevation", heights, "m").to_netcdf(air / "terrain.nc")
    done, _ = prepare_paths(air, "air.nc", elevation="terrain.nc")
    assert any("elevation" in line and f"{depth:g}" in line for line in done.lines)
    _, data = prepare_paths(air, "air.nc", elevation="terrain.nc", rules={"drop": ["elevation < 0"]})
    assert data.static("elevation")[0].tolist() == [0.0] * 4 + [100.0] * 4


def test_a_negative_number_of_people_needs_a_decision(air):
    people = np.where(np.arange(80) < 10, -9999.0, 5.0)
    fine("population", people).to_netcdf(air / "people.nc")
    done, _ = prepare_paths(air, "air.nc", population="people.nc")
    assert any("population == -9999" in line for line in done.lines)
    done, data = prepare_paths(air, "air.nc", population="people.nc", rules={"drop": ["population == -9999"]})
    assert np.nanmax(data.static("population")) == pytest.approx(500, rel=0.02)
    assert any("dropped population == -9999: 800 cells" in line for line in done.lines)


def test_a_static_field_of_several_years_is_refused(air):
    several = xr.concat([fine("population", 3.0), fine("population", 4.0)], dim="year")
    several.to_netcdf(air / "people.nc")
    done, _ = prepare_paths(air, "air.nc", population="people.nc")
    assert any("year 2" in line for line in done.lines)


@pytest.mark.parametrize("dims", [(), ("valid_time",), ("valid_time", "number")])
def test_a_mask_may_have_further_dimensions_of_size_one(air, dims):
    mask = fine("lsm", np.where(np.arange(80) < 40, 1, 0)).expand_dims(dict.fromkeys(dims, 1))
    mask.to_netcdf(air / "mask.nc")
    _, data = prepare_paths(air, "air.nc", mask="mask.nc")
    assert data.mask.tolist() == [[True] * 4 + [False] * 4] * 8


def test_a_mask_of_fractions_counts_where_most_is_land(air):
    fine("lsm", np.linspace(0, 1, 80)).to_netcdf(air / "mask.nc")
    done, data = prepare_paths(air, "air.nc", mask="mask.nc")
    assert data.mask.tolist() == [[False] * 4 + [True] * 4] * 8
    assert any("fractions" in line for line in done.lines)


def test_a_mask_of_classes_is_refused(air):
    fine("XLAND", np.where(np.arange(80) < 40, 1, 2)).to_netcdf(air / "mask.nc")
    done, _ = prepare_paths(air, "air.nc", mask="mask.nc")
    assert any("1 to 2" in line and "0 or 1" in line for line in done.lines)
