"""Stations over several files: by name, or by place where they have none."""

import numpy as np
import xarray as xr

from tests.support.prepare_worlds import prepare_paths


def series(values, lat, lon, ids=None, start="2019-01-01", hours=12):
    time = np.datetime64(start, "ns") + np.arange(hours) * np.timedelta64(1, "h")
    coords = {"time": time, "lat": ("station", np.array(lat)), "lon": ("station", np.array(lon))}
    dataset = xr.Dataset(coords=coords if ids is None else {**coords, "station": ids})
    field = np.array(values, "f4") + 0.01 * np.arange(hours, dtype="f4")[:, None]
    dataset["pm25"] = (("time", "station"), field, {"units": "ug m-3"})
    return dataset


def test_stations_without_names_are_known_by_their_place_in_all_files(tmp_path):
    series([10, 20, 30], [30.5, 31.5, 32.5], [110.5, 111.5, 112.5]).to_netcdf(tmp_path / "a.nc")
    later = series([30, 10], [32.5, 30.5], [112.5, 110.5], start="2019-01-01T12")
    later.to_netcdf(tmp_path / "b.nc")
    done, data = prepare_paths(tmp_path, "*.nc")
    assert any("3 stations, 3 of them in 3 cells" in line for line in done.lines)
    found = data.read("pm25", [12])[0]
    assert (found[2, 0], found[0, 2]) == (10.0, 30.0)
    assert np.isnan(found[1, 1])


def test_one_place_under_two_names_is_noted(tmp_path):
    series([10, 20], [30.5, 31.5], [110.5, 111.5], ["A", "B"]).to_netcdf(tmp_path / "a.nc")
    series([10, 20], [30.5, 31.5], [110.5, 471.5 - 360], ["a", "b"]).to_netcdf(tmp_path / "b.nc")
    done, _ = prepare_paths(tmp_path, "*.nc")
    assert any("2 stations are where another" in line for line in done.lines)


def test_records_with_a_time_and_place_each_are_refused(tmp_path):
    time = np.datetime64("2019-01-01", "ns") + np.arange(20) * np.timedelta64(1, "h")
    columns = {"pm25": 40 + np.arange(20.0), "lat": np.linspace(30, 35, 20), "lon": np.linspace(110, 115, 20)}
    dataset = xr.Dataset({name: ("obs", values) for name, values in columns.items()} | {"time": ("obs", time)})
    dataset.pm25.attrs["units"] = "ug m-3"
    dataset.to_netcdf(tmp_path / "obs.nc")
    done, _ = prepare_paths(tmp_path, "obs.nc")
    assert any("share the dimension obs" in line for line in done.lines)
