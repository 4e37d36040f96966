"""What a file has beside the fields that are read: levels, variables with other names, files of other kinds."""

import gzip

import numpy as np
import pytest
import xarray as xr

from tests.support.prepare_worlds import gridded, prepare_paths, prepare_recipe


def on_levels(dataset, dim, count):
    levels = xr.concat([dataset.pm25 + 100 * k for k in range(count)], dim=dim)
    return dataset.assign(pm25=levels.transpose("time", dim, "lat", "lon").assign_attrs(units="ug m-3"))


@pytest.mark.parametrize("position", [0, 2])
def test_the_recipe_says_which_level_is_read(tmp_path, position):
    dataset = gridded(12)
    on_levels(dataset, "bottom_top", 3).to_netcdf(tmp_path / "data.nc")
    done, _ = prepare_paths(tmp_path, "data.nc")
    assert any("bottom_top 3" in line and "levels: {bottom_top: 0}" in line for line in done.lines)
    _, data = prepare_recipe(tmp_path, {"sources": [{"path": "data.nc", "levels": {"bottom_top": position}}]})
    np.testing.assert_allclose(data.read("pm25", [5])[0], dataset.pm25[5, ::-1] + 100 * position, rtol=1e-6)


@pytest.mark.parametrize("position", ["3", "-1", "surface"])
def test_a_level_that_is_not_there_is_refused(tmp_path, position):
    on_levels(gridded(12), "bottom_top", 3).to_netcdf(tmp_path / "data.nc")
    done, _ = prepare_recipe(tmp_path, {"sources": [{"path": "data.nc", "levels": {"bottom_top": position}}]})
    assert any(f"bottom_top: {position}" in line and "0 to 2" in line for line in done.lines)


def test_era5_with_its_first_release_is_refused_with_the_way_out(tmp_path):
    on_levels(gridded(12), "expver", 2).to_netcdf(tmp_path / "data.nc")
    done, _ = prepare_paths(tmp_path, "data.nc")
    assert any("expver 2" in line and "combine_first" in line for line in done.lines)


def test_fields_that_are_not_read_are_named_once(tmp_path):
    dataset = gridded(12, pm25="ug m-3", PM25_SFC="ug m-3")
    for k in range(3):
        dataset.isel(time=slice(4 * k, 4 * k + 4)).to_netcdf(tmp_path / f"part{k}.nc")
    gridded(12, other="1").to_netcdf(tmp_path / "unknown.nc")
    done, _ = prepare_recipe(tmp_path, {"sources": [{"path": "part*.nc"}, {"path": "unknown.nc"}]})
    assert sum("PM25_SFC" in line for line in done.lines) == 1
    assert any("unknown.nc" in line and "other" in line for line in done.lines)


def test_files_of_a_folder_that_are_not_read_are_counted(tmp_path):
    (tmp_path / "data").mkdir()
    gridded(12).to_netcdf(tmp_path / "data/a.nc")
    (tmp_path / "data/wrfout_d01_2019-01-01_00:00:00").write_bytes(b"")
    done, _ = prepare_paths(tmp_path, "data")
    assert any("1 of 2 files" in line and "wrfout_d01" in line for line in done.lines)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"PK\x03\x04 and so on", "ZIP"),
        (gzip.compress(b"CDF"), "gunzip"),
        (b"GRIB\0\0\0\1", "grib_to_netcdf"),
        (b"\n<!DOCTYPE html><html>", "download it again"),
        (b'{"type": "error"}', "download it again"),
        (b"", "is empty"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "save it as CSV"),
    ],
)
def test_a_file_of_another_kind_is_named_with_what_to_do(tmp_path, content, expected):
    (tmp_path / "data.nc").write_bytes(content)
    done, _ = prepare_paths(tmp_path, "data.nc")
    [line] = done.lines
    assert line.startswith("error")
    assert expected in line


@pytest.mark.parametrize("days", [1, 30])
def test_daily_data_are_refused_by_their_step(tmp_path, days):
    dataset = gridded(12)
    time = np.datetime64("2019-01-01", "ns") + np.arange(12) * np.timedelta64(24 * days, "h")
    dataset.assign_coords(time=time).to_netcdf(tmp_path / "data.nc")
    done, _ = prepare_paths(tmp_path, "data.nc")
    assert any(f"every {24 * days} h" in line and "3 h" in line for line in done.lines)


def test_a_fine_grid_that_is_not_straight_gets_the_values_of_the_cells_around(tmp_path):
    weather = gridded(4, (9, 9), t2m="K")
    weather["t2m"] = (
        ("time", "lat", "lon"),
        280 + weather.lat.values[None, :, None] + np.zeros((4, 9, 9)),
        {"units": "K"},
    )
    weather.to_netcdf(tmp_path / "weather.nc")
    fine = gridded(4, (40, 40))
    lat, lon = np.meshgrid(np.linspace(32, 34, 40), np.linspace(112, 114, 40), indexing="ij")
    lat = lat + 0.05 * (lon - 113)
    fine = fine.drop_vars(["lat", "lon"]).rename(lat="y", lon="x")
    fine.assign_coords(lat=(("y", "x"), lat), lon=(("y", "x"), lon)).to_netcdf(tmp_path / "air.nc")
    _, data = prepare_recipe(tmp_path, {"sources": [{"path": "air.nc"}, {"path": "weather.nc"}]})
    found = data.read("temp", [0])[0]
    assert np.isfinite(found).all()
    assert np.abs(found - 280 - data.grid.lat2d).max() <= 0.5


def test_wind_along_tilted_rows_needs_the_angle(tmp_path):
    dataset = gridded(4, U10="m s-1", V10="m s-1") / 10
    lat, lon = np.meshgrid(dataset.lat, dataset.lon, indexing="ij")
    dataset = dataset.drop_vars(["lat", "lon"]).rename(lat="y", lon="x")
    tilted = dataset.assign_coords(lat=(("y", "x"), lat + 0.1 * (lon - 113.5)), lon=(("y", "x"), lon))
    for name in ("U10", "V10"):
        tilted[name].attrs["units"] = "m s-1"
    tilted.to_netcdf(tmp_path / "wrf.nc")
    done, _ = prepare_paths(tmp_path, "wrf.nc")
    assert any("tilted" in line and "COSALPHA" in line for line in done.lines)
    _, data = prepare_recipe(tmp_path, {"sources": [{"path": "wrf.nc", "names": {"u": "U10", "v": "V10"}}]})
    assert data.dynamic == ("u", "v")


def test_unwritten_chunks_may_be_zeros(tmp_path):
    dataset = gridded(48)
    dataset.pm25[24:] = 0.0
    dataset.pm25[30:, 0, 0] = 1.0
    encoding = {"pm25": {"chunks": (6, 8, 8)}}
    dataset.to_zarr(tmp_path / "data.zarr", zarr_format=3, encoding=encoding, consolidated=False)
    metadata = tmp_path / "data.zarr/pm25/zarr.json"
    metadata.write_text(metadata.read_text().replace('"fill_value": "NaN"', '"fill_value": 0.0'))
    (tmp_path / "data.zarr/pm25/c/4/0/0").unlink()
    done, _ = prepare_paths(tmp_path, "data.zarr", rules={"constant": "keep"})
    assert any("never written" in line and "fill" in line for line in done.lines)
    _, data = prepare_paths(tmp_path, "data.zarr", rules={"constant": "keep", "incomplete": "fill"})
    assert (data.read("pm25", slice(24, 30)) == 0).all()
