"""Compare the reader with xarray in every format, and test each of its refusals."""

import logging
import warnings

import numpy as np
import pytest
import xarray as xr

from topoflow.data.source import open_source
from topoflow.errors import DataError, MissingPath

NAMES = ("u", "v", "pm25", "co", "elevation", "population")
KINDS = ("zarr2", "zarr2-plain", "zarr3", "zarr3-plain", "netcdf")


def suffix(kind):
    return ".nc" if kind == "netcdf" else ".zarr"


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_reads_what_xarray_reads(make_fields, write_store, tmp_path, kind, in_memory):
    years = [make_fields(start="2018-12-31", hours=24, seed=1), make_fields(start="2019-01-01", hours=30, seed=2)]
    for year, dataset in zip((2018, 2019), years, strict=True):
        write_store(dataset, tmp_path / "data" / f"data_{year}_masked{suffix(kind)}", kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = open_source(str(tmp_path / "data"), NAMES, in_memory)
        assert source.in_memory is in_memory
        both = xr.concat(years, "time", data_vars="minimal")
        np.testing.assert_array_equal(source.times, both.time.values)
        assert source.times.dtype == "datetime64[h]"
        for indices in ([0], [53], [22, 23, 24, 25], [40, 3, 3, 30, 0], slice(20, 28)):
            for name in ("u", "co"):
                got = source.read(name, indices)
                assert got.dtype == np.float32
                np.testing.assert_array_equal(got, both[name].isel(time=indices).values)
        for moment in ("2018-12-31T00", "2018-12-31T23", "2019-01-01T00", "2019-01-02T05"):
            snapshot = source.snapshot(("co", "u"), int(np.flatnonzero(source.times == np.datetime64(moment))[0]))
            np.testing.assert_array_equal(snapshot, both[["co", "u"]].sel(time=moment).to_array().values)
    np.testing.assert_array_equal(source.grid.elevation_m, both.elevation.values)
    np.testing.assert_array_equal(source.grid.population, both.population.values)
    np.testing.assert_array_equal(source.grid.lat2d, np.broadcast_to(both.lat.values[:, None], (4, 6)))
    np.testing.assert_array_equal(source.static("lon2d"), np.broadcast_to(np.float32(both.lon.values), (4, 6)))


def test_stores_are_put_in_the_order_of_their_times(make_fields, write_store, tmp_path):
    write_store(make_fields(start="2019-06-01", seed=1), tmp_path / "a.nc", "netcdf")
    write_store(make_fields(start="2019-03-01", seed=2), tmp_path / "b.nc", "netcdf")
    source = open_source(str(tmp_path), NAMES)
    assert str(source.times[0]) == "2019-03-01T00"
    np.testing.assert_array_equal(source.read("u", [48])[0], make_fields(seed=1).u.values[0])


def test_a_snapshot_may_be_changed_by_the_caller(make_fields, write_store, tmp_path):
    write_store(make_fields(), tmp_path / "data_2019.zarr")
    source = open_source(str(tmp_path), NAMES, in_memory=True)
    before = source.read("u", [5])
    source.snapshot(("u",), 5)[:] = 0
    source.read("u", [5])[:] = 0
    np.testing.assert_array_equal(source.read("u", [5]), before)


def test_one_store_or_file_by_its_own_path(make_fields, write_store, tmp_path):
    for name, kind in (("any.zarr", "zarr3"), ("old.zarr", "zarr2-plain"), ("any.nc", "netcdf")):
        path = write_store(make_fields(), tmp_path / name, kind)
        assert len(open_source(str(path), NAMES).times) == 48


def test_small_data_are_held_in_memory_and_large_ones_not(make_fields, write_store, tmp_path, monkeypatch):
    write_store(make_fields(), tmp_path / "data_2019.zarr")
    assert open_source(str(tmp_path), NAMES).in_memory
    monkeypatch.setattr("topoflow.data.source.IN_MEMORY_LIMIT_BYTES", 4 * 48 * 4 * 24 - 1)
    assert not open_source(str(tmp_path), NAMES).in_memory


def test_packed_integers_and_doubles_are_decoded(make_fields, tmp_path):
    dataset = make_fields().astype(np.float64)
    for name in dataset.data_vars:
        dataset[name].attrs = make_fields()[name].attrs
    encoding = {"co": {"dtype": "int16", "scale_factor": 0.01, "_FillValue": -32768}}
    dataset.to_netcdf(tmp_path / "packed.nc", encoding=encoding)
    with xr.open_dataset(tmp_path / "packed.nc") as reference:
        for in_memory in (True, False):
            source = open_source(str(tmp_path), NAMES, in_memory)
            for name in ("co", "u"):
                np.testing.assert_array_equal(source.read(name, slice(None)), reference[name].values.astype(np.float32))
    assert np.isnan(source.read("co", slice(None))).any()


def test_rows_keep_their_order(make_fields, write_store, tmp_path):
    for north_first in (True, False):
        dataset = make_fields(north_first=north_first)
        path = write_store(dataset, tmp_path / f"{north_first}.zarr")
        source = open_source(str(path), NAMES)
        assert source.grid.north_first is north_first
        np.testing.assert_array_equal(source.read("u", [3])[0], dataset.u.values[3])


def test_other_order_of_dimensions_is_transposed(make_fields, write_store, tmp_path):
    dataset = make_fields()
    path = write_store(dataset.transpose("lon", "time", "lat"), tmp_path / "other.zarr")
    for in_memory in (True, False):
        source = open_source(str(path), NAMES, in_memory)
        np.testing.assert_array_equal(source.read("co", slice(None)), dataset.co.values)
        np.testing.assert_array_equal(source.grid.elevation_m, dataset.elevation.values)


@pytest.mark.parametrize(("rows", "columns"), [("y", "x"), ("lat", "lon")])
@pytest.mark.parametrize("as_coordinates", [True, False])
def test_two_dimensional_coordinates(make_fields, write_store, tmp_path, rows, columns, as_coordinates):
    dataset = make_fields()
    lat2d, lon2d = np.meshgrid(dataset.lat.values, dataset.lon.values, indexing="ij")
    lat2d = lat2d + 0.01 * (lon2d - 100)  # a turned grid
    dataset = dataset.drop_vars(["lat", "lon"]).rename({"lat": rows, "lon": columns})
    dataset["lat2d"], dataset["lon2d"] = ((rows, columns), lat2d), ((columns, rows), lon2d.T)
    dataset = dataset.set_coords(["lat2d", "lon2d"]) if as_coordinates else dataset
    source = open_source(str(write_store(dataset, tmp_path / "turned.zarr")), NAMES)
    np.testing.assert_array_equal(source.grid.lat2d, lat2d)
    np.testing.assert_array_equal(source.grid.lon2d, lon2d)
    assert source.grid.north_first


def test_absent_units_are_taken_as_expected_and_logged(make_fields, write_store, tmp_path, caplog):
    dataset = make_fields()
    del dataset.co.attrs["units"]
    path = write_store(dataset, tmp_path / "data_2019.zarr")
    with caplog.at_level(logging.WARNING):
        open_source(str(path), NAMES)
    assert len(caplog.records) == 1
    assert "co in ug m-3" in caplog.text


def test_static_fields_matter_only_when_asked_for(make_fields, write_store, tmp_path):
    path = write_store(make_fields().drop_vars("elevation"), tmp_path / "data_2019.zarr")
    assert open_source(str(path), ("u", "population")).grid.elevation_m is None
    with pytest.raises(DataError, match=r"data_2019\.zarr has no variable 'elevation'"):
        open_source(str(path), ("u", "elevation"))


# --- refusals ---------------------------------------------------------------------------------------------------------


def change_units(dataset):
    dataset.co.attrs["units"] = "mg m-3"


def drop_variable(dataset):
    del dataset["pm25"]


def add_infinity(dataset):
    dataset.u[7, 0, 0] = np.inf


def sea_without_height(dataset):
    dataset.elevation[0, :2] = np.nan


def static_over_time(dataset):
    dataset["elevation"] = dataset.elevation.expand_dims(time=dataset.time)


def flags_for_numbers(dataset):
    dataset["co"] = (dataset.u > 0).assign_attrs(units="ug m-3")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change_units, "'co' has units 'mg m-3': expected 'ug m-3' .convert"),
        (drop_variable, "no variable 'pm25': it has co, elevation"),
        (add_infinity, "'u' has infinite"),
        (sea_without_height, "'elevation' has no value in 2 of 24 cells"),
        (static_over_time, "'elevation' has dimensions .*time.*expected .lat, lon."),
        (flags_for_numbers, "'co' is of type bool"),
    ],
)
@pytest.mark.parametrize("kind", ["zarr3", "netcdf"])
def test_variables_that_are_refused(make_fields, write_store, tmp_path, kind, spoil, message):
    dataset = make_fields()
    spoil(dataset)
    path = write_store(dataset, tmp_path / f"data_2019{suffix(kind)}", kind)
    with pytest.raises(DataError, match=f"data_2019{suffix(kind)}.*{message}") as refusal:
        open_source(str(tmp_path), NAMES, in_memory=True)
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_infinity_is_refused_when_read_from_disk(make_fields, write_store, tmp_path):
    dataset = make_fields()
    add_infinity(dataset)
    source = open_source(str(write_store(dataset, tmp_path / "data_2019.zarr")), NAMES, in_memory=False)
    source.read("u", [6])
    with pytest.raises(DataError, match="'u' has infinite"):
        source.read("u", [7])


def shifted(dataset, minutes):
    return dataset.assign_coords(time=dataset.time + np.timedelta64(minutes, "m"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: shifted(d, 30), "2019-01-01T00:30.* is not a whole hour"),
        (lambda d: d.isel(time=[0, 1, 1, 2]), "time 2019-01-01T01 follows 2019-01-01T01"),
        (lambda d: d.isel(time=[0, 2, 1]), "time 2019-01-01T01 follows 2019-01-01T02"),
        (lambda d: d.assign_coords(time=np.arange(48)), "'time' has type int64"),
        (lambda d: d.drop_vars("time"), "no coordinate 'time'"),
        (lambda d: d.drop_vars("lat"), "no usable coordinate 'lat'"),
        (lambda d: d.drop_vars("lon"), "no usable coordinate 'lon'"),
        (lambda d: d.isel(time=slice(0, 0)), "shape .0,."),
        (lambda d: d.rename(lat="north", lon="east"), "'u' has dimensions .*north.*expected .time, lat, lon."),
        (lambda d: d.isel(time=0), "'u' has dimensions"),
        (lambda d: d.assign(u=d.u.rename(lat="y", lon="x")), "on different dimensions"),
        (
            lambda d: d.assign_coords(lat2d=(("lat", "lon"), np.ones((4, 6))), lon2d=d.lon + 0 * d.lat),
            "different places",
        ),
    ],
)
def test_coordinates_that_are_refused(make_fields, write_store, tmp_path, change, message):
    path = write_store(change(make_fields()), tmp_path / "data_2019.nc", "netcdf")
    with pytest.raises(DataError, match=f"{path}.*{message}"):
        open_source(str(tmp_path), NAMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.assign_coords(lat=d.lat + 1), "have different grids"),
        (lambda d: d.isel(lat=slice(None, None, -1)), "have different grids"),
        (lambda d: d.isel(lon=slice(0, 5)), "4 x 5 cells.*4 x 6 cells.*have different grids"),
        (lambda d: d.assign(elevation=d.elevation + 1), "differ in variable 'elevation'"),
        (lambda d: d.assign_coords(time=d.time - np.timedelta64(1, "h")), "starts at 2019-01-02T23.*do not overlap"),
        (lambda d: d.drop_vars("co"), "no variable 'co'"),
    ],
)
def test_stores_that_disagree_are_both_named(make_fields, write_store, tmp_path, change, message):
    write_store(make_fields(), tmp_path / "data_2019a.zarr")
    write_store(change(make_fields(start="2019-01-03", seed=4)), tmp_path / "data_2019b.zarr")
    with pytest.raises(DataError, match=f"data_2019b.zarr.*{message}") as refusal:
        open_source(str(tmp_path), NAMES)
    assert "no variable" in message or "data_2019a.zarr" in str(refusal.value)


def test_coordinates_in_single_precision_are_the_same_grid(make_fields, write_store, tmp_path):
    write_store(make_fields(shape=(7, 7)), tmp_path / "data_2019a.zarr")
    single = make_fields(start="2019-01-03", shape=(7, 7))
    single = single.assign_coords(lat=single.lat.astype(np.float32), lon=single.lon.astype(np.float32))
    write_store(single, tmp_path / "data_2019b.zarr")
    assert len(open_source(str(tmp_path), NAMES).times) == 96


def test_folders_that_are_refused(make_fields, write_store, tmp_path):
    with pytest.raises(MissingPath, match="absent"):
        open_source(str(tmp_path / "absent"), NAMES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty contains no store"):
        open_source(str(tmp_path / "empty"), NAMES)
    write_store(make_fields(), tmp_path / "mixed" / "data_2019.zarr")
    write_store(make_fields(), tmp_path / "mixed" / "more.nc", "netcdf")
    with pytest.raises(DataError, match=r"mixed contains both Zarr .data_2019.zarr. and NetCDF .more.nc."):
        open_source(str(tmp_path / "mixed"), NAMES)


def test_broken_files_are_refused_by_name(make_fields, write_store, tmp_path):
    (tmp_path / "text.nc").write_text("no NetCDF")
    with pytest.raises(DataError, match=r"text\.nc cannot be opened as NetCDF"):
        open_source(str(tmp_path / "text.nc"), NAMES)
    for name in ("zarr.json", ".zgroup"):
        (tmp_path / f"store{name}").mkdir()
        (tmp_path / f"store{name}" / name).write_text("{")
        with pytest.raises(DataError, match=f"store{name} cannot be opened as Zarr"):
            open_source(str(tmp_path / f"store{name}"), NAMES)
    path = write_store(make_fields(), tmp_path / "chunks.zarr")
    chunk = next(file for file in (path / "co").rglob("*") if file.is_file() and file.name != "zarr.json")
    chunk.write_bytes(b"not compressed")
    with pytest.raises(DataError, match=r"chunks.zarr: variable 'co' cannot be read") as refusal:
        open_source(str(path), NAMES)
    assert "\n" not in str(refusal.value)
