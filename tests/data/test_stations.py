import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from topoflow.errors import ConfigError, DataError, MissingPath
from topoflow.tools.prepare import stations, store_writer
from topoflow.tools.prepare.stations import grid_stations

BOX = (30.0, 33.0, 100.0, 104.0)


def write_stations(path: Path, start: str = "2019-12-31T00", hours: int = 30, seed: int = 0, **units: str) -> Path:
    """Write a CF timeSeries file of nine random stations in BOX, a fifth of the values missing."""
    generator = np.random.default_rng(seed)
    units = units or {"pm25": "ug m-3", "co": "mg m-3"}
    values = generator.uniform(1, 90, (len(units), hours, 9))
    values[generator.random(values.shape) < 0.2] = np.nan
    dataset = xr.Dataset(
        {name: (("time", "station"), values[k], {"units": units[name]}) for k, name in enumerate(units)},
        coords={
            "time": pd.date_range(start, periods=hours, freq="h"),
            "lat": ("station", generator.uniform(BOX[0], BOX[1], 9)),
            "lon": ("station", generator.uniform(BOX[2], BOX[3], 9)),
        },
        attrs={"time_zone": "UTC+8"},
    )
    dataset["elevation"] = ("station", generator.uniform(0, 500, 9), {"units": "m"})
    dataset.to_netcdf(path)
    return path


def write_terrain(path: Path, spacing: float = 0.5, margin: float = 1.0) -> xr.DataArray:
    lat = np.arange(BOX[0] - margin + spacing / 2, BOX[1] + margin, spacing)
    lon = np.arange(BOX[2] - margin + spacing / 2, BOX[3] + margin, spacing)
    heights = np.random.default_rng(1).integers(-100, 4000, (len(lat), len(lon))).astype("int16")
    elevation = xr.DataArray(heights, {"lat": lat, "lon": lon}, ("lat", "lon"), "elevation", {"units": "m"})
    elevation.to_netcdf(path)
    return elevation


def read_years(folder: Path) -> xr.Dataset:
    years = [xr.open_dataset(store, engine="zarr", consolidated=False) for store in sorted(folder.glob("data_*.zarr"))]
    return xr.concat(years, "time", data_vars="minimal", coords="minimal", compat="equals", join="exact")


def long_table(path: Path, name: str, degrees: float = 1.0) -> pd.DataFrame:
    """Return one row per report: time, row, column, value."""
    with xr.open_dataset(path) as dataset:
        table = dataset[[name]].to_dataframe().reset_index().dropna(subset=name)
    table["row"] = ((table["lat"] - BOX[0]) // degrees).astype(int)
    table["column"] = ((table["lon"] - BOX[2]) // degrees).astype(int)
    return table


def assert_equals_groupby(gridded: xr.Dataset, name: str, table: pd.DataFrame, factor: float = 1.0) -> None:
    groups = table.groupby(["time", "row", "column"])[name].agg(["mean", "count"]).reset_index()
    shape = gridded[name].shape
    mean, count = np.full(shape, np.nan), np.zeros(shape, dtype=int)
    places = (gridded.get_index("time").get_indexer(groups["time"]), groups["row"], groups["column"])
    mean[places], count[places] = groups["mean"] * factor, groups["count"]
    np.testing.assert_allclose(gridded[name].values, mean, rtol=2e-7)
    np.testing.assert_array_equal(gridded[f"{name}_count"].values, count)


def test_cell_means_equal_a_groupby_over_two_years_and_in_our_units(tmp_path, monkeypatch):
    monkeypatch.setattr(stations, "BLOCK_BYTES", 1)  # a block for each chunk
    monkeypatch.setattr(store_writer, "CHUNK_HOURS", (1, 5))
    path = write_stations(tmp_path / "in.nc")
    summary = grid_stations([path], tmp_path / "out", 1.0, BOX, progress=False)
    assert sorted(store.name for store in (tmp_path / "out").iterdir()) == ["data_2019.zarr", "data_2020.zarr"]
    gridded = read_years(tmp_path / "out")
    assert dict(gridded.sizes) == {"time": 30, "lat": 3, "lon": 4}
    assert gridded["co"].attrs["units"] == "ug m-3"
    assert gridded["co"].dtype == np.float32
    assert gridded.attrs["time_zone"] == "UTC+8"
    assert_equals_groupby(gridded, "pm25", long_table(path, "pm25"))
    assert_equals_groupby(gridded, "co", long_table(path, "co"), factor=1000.0)
    assert summary.cells_with_stations == int((gridded["station_count"] > 0).sum())
    assert summary.variables == ("pm25", "co")


def test_stations_of_several_files_are_pooled_where_their_times_overlap(tmp_path):
    first = write_stations(tmp_path / "a.nc", "2019-03-01T00", seed=1)
    second = write_stations(tmp_path / "b.nc", "2019-03-01T20", seed=2, pm25="mg m-3", o3="ug m-3")
    summary = grid_stations([first, second], tmp_path / "out", 1.0, BOX, progress=False)
    gridded = read_years(tmp_path / "out")
    assert summary.hours == gridded.sizes["time"] == 50
    assert summary.stations == 18
    scaled = long_table(second, "pm25")
    scaled["pm25"] *= 1000.0
    assert_equals_groupby(gridded, "pm25", pd.concat([long_table(first, "pm25"), scaled]))
    assert_equals_groupby(gridded, "o3", long_table(second, "o3"))


def test_hours_that_no_file_has_are_not_made_up(tmp_path):
    files = [write_stations(tmp_path / f"{day}.nc", f"2019-03-{day}T00", hours=5) for day in ("01", "03")]
    grid_stations(files, tmp_path / "out", progress=False)
    hours = read_years(tmp_path / "out")["time"].values
    assert len(hours) == 10
    assert hours[5] - hours[4] == np.timedelta64(44, "h")


def test_units_convert_by_their_attribute(tmp_path):
    path = write_stations(tmp_path / "in.nc", temp="degC", psfc="hPa", u="km h-1", so2="ug/m3")
    grid_stations([path], tmp_path / "out", 1.0, BOX, progress=False)
    gridded = read_years(tmp_path / "out")
    for name, convert in (
        ("temp", lambda celsius: celsius + 273.15),
        ("psfc", lambda hectopascal: hectopascal * 100),
        ("u", lambda kilometres: kilometres / 3.6),
        ("so2", lambda same: same),
    ):
        table = long_table(path, name)
        table[name] = convert(table[name])
        assert_equals_groupby(gridded, name, table)


def test_terrain_is_the_mean_within_a_cell(tmp_path):
    path = write_stations(tmp_path / "in.nc")
    terrain = write_terrain(tmp_path / "terrain.nc")
    grid_stations([path], tmp_path / "out", 1.0, BOX, tmp_path / "terrain.nc", progress=False)
    expected = terrain[2:8, 2:10].astype("float64").coarsen(lat=2, lon=2).mean().values
    np.testing.assert_allclose(read_years(tmp_path / "out")["elevation"].values, expected, rtol=1e-6)


def test_terrain_is_the_nearest_point_where_cells_are_finer(tmp_path):
    path = write_stations(tmp_path / "in.nc")
    terrain = write_terrain(tmp_path / "terrain.nc")
    grid_stations([path], tmp_path / "out", 0.1, BOX, tmp_path / "terrain.nc", progress=False)
    gridded = read_years(tmp_path / "out")
    expected = terrain.sel(lat=gridded["lat"], lon=gridded["lon"], method="nearest")
    np.testing.assert_array_equal(gridded["elevation"].values, expected.values)


@pytest.mark.parametrize(("north", "east"), [(2.0, 0.0), (-2.0, 0.0), (0.0, 2.0), (0.0, -2.0)])
def test_terrain_that_ends_inside_the_box_is_refused(tmp_path, north, east):
    path = write_stations(tmp_path / "in.nc")
    terrain = write_terrain(tmp_path / "terrain.nc")
    terrain.assign_coords(lat=terrain["lat"] + north, lon=terrain["lon"] + east).to_netcdf(tmp_path / "moved.nc")
    with pytest.raises(DataError, match="does not cover"):
        grid_stations([path], tmp_path / "out", 1.0, BOX, tmp_path / "moved.nc", progress=False)


def test_without_terrain_the_stations_own_heights_are_used(tmp_path):
    path = write_stations(tmp_path / "in.nc")
    grid_stations([path], tmp_path / "out", 1.0, BOX, progress=False)
    elevation = read_years(tmp_path / "out")["elevation"].values
    with xr.open_dataset(path) as dataset:
        table = dataset[["elevation"]].to_dataframe()
    means = table.groupby([table["lat"].astype(int) - 30, table["lon"].astype(int) - 100])["elevation"].mean()
    np.testing.assert_allclose([elevation[cell] for cell in means.index], means, rtol=1e-6)
    assert np.isfinite(elevation).all()


def test_box_defaults_to_the_extent_rounded_outward(tmp_path):
    path = write_stations(tmp_path / "in.nc")
    with xr.open_dataset(path) as dataset:
        lat, lon = dataset["lat"].values, dataset["lon"].values
    grid_stations([path], tmp_path / "out", 0.5, progress=False)
    gridded = read_years(tmp_path / "out")
    for centres, values in ((gridded["lat"], lat), (gridded["lon"], lon)):
        assert centres[0] == np.floor(values.min() * 2) / 2 + 0.25
        assert centres[-1] == np.ceil(values.max() * 2) / 2 - 0.25


def test_stations_outside_are_counted_and_skipped_variables_named(tmp_path, caplog):
    path = write_stations(tmp_path / "in.nc", pm25="ug m-3", rain="mm")
    with xr.open_dataset(path) as dataset:
        outside = int((dataset["lat"] >= 31).sum())
    with caplog.at_level("INFO"):
        summary = grid_stations([path], tmp_path / "out", 1.0, (30, 31, 100, 104), progress=False)
    assert 0 < summary.stations_outside == outside
    assert f"{outside} of 9 stations lie outside" in caplog.text
    assert summary.skipped == ("rain",)
    assert f"({9 - outside} inside, {outside} outside the box), 30 hours of pm25 (skipped: rain)" in str(summary)
    assert "rain" in caplog.text


def test_longitudes_that_differ_by_360_degrees_are_the_same_place(tmp_path):
    path = write_stations(tmp_path / "in.nc")
    grid_stations([path], tmp_path / "east", 1.0, BOX, progress=False)
    grid_stations([path], tmp_path / "west", 1.0, (30, 33, -260, -256), progress=False)
    east, west = read_years(tmp_path / "east"), read_years(tmp_path / "west")
    np.testing.assert_array_equal(east["pm25"].values, west["pm25"].values)


def edit(path: Path, change) -> Path:
    with xr.open_dataset(path) as dataset:
        edited = change(dataset.load())
    edited.to_netcdf(path)
    return path


def shift_last_hour(dataset: xr.Dataset) -> xr.Dataset:
    times = dataset["time"].values.copy()
    times[-1] = times[0]
    return dataset.assign_coords(time=times)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda data: data.assign(pm25=data["pm25"].assign_attrs(units="ppb")), "variable pm25: unit 'ppb'"),
        (lambda data: data.assign(pm25=data["pm25"].drop_attrs()), "variable pm25 has no attribute units"),
        (lambda data: data.drop_vars(["pm25", "co"]), "no known variable"),
        (lambda data: data.drop_vars("lat"), "no `lat` over the stations"),
        (lambda data: data.assign_coords(lat=data["lat"].where(data["lat"] > data["lat"].min())), "have no position"),
        (lambda data: data.assign_coords(time=data["time"] + np.timedelta64(30, "m")), "not a whole hour"),
        (shift_last_hour, "do not increase"),
    ],
)
def test_a_file_that_is_not_as_expected_is_refused(tmp_path, change, expected):
    path = edit(write_stations(tmp_path / "in.nc"), change)
    with pytest.raises(DataError, match=expected):
        grid_stations([path], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_arguments_that_cannot_be_used_are_refused(tmp_path):
    path = write_stations(tmp_path / "in.nc")
    out = tmp_path / "out"
    with pytest.raises(MissingPath, match="nowhere"):
        grid_stations([tmp_path / "nowhere.nc"], out, progress=False)
    with pytest.raises(ConfigError, match=r"--degrees 0\.7"):
        grid_stations([path], out, 0.7, BOX, progress=False)
    with pytest.raises(ConfigError, match=r"--degrees 0\.0"):
        grid_stations([path], out, 0.0, BOX, progress=False)
    with pytest.raises(ConfigError, match="--box"):
        grid_stations([path], out, 1.0, (33, 30, 100, 104), progress=False)
    with pytest.raises(DataError, match="no station lies inside"):
        grid_stations([path], out, 1.0, (-5, 5, 0, 5), progress=False)
    (tmp_path / "text.nc").write_text("no NetCDF")
    with pytest.raises(DataError, match="cannot be read"):
        grid_stations([tmp_path / "text.nc"], out, progress=False)
    assert not out.exists()
    out.mkdir()
    (out / "data_2019.zarr").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        grid_stations([path], out, 1.0, BOX, progress=False)


def test_a_failure_half_way_leaves_nothing_behind(tmp_path, monkeypatch):
    path = write_stations(tmp_path / "in.nc")

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(stations.StationFile, "read", fail)
    with pytest.raises(OSError, match="disk full"):
        grid_stations([path], tmp_path / "out", 1.0, BOX, progress=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.nc"]


@pytest.fixture(scope="module")
def shared() -> Path:
    if "TOPOFLOW_SHARED" not in os.environ:
        pytest.skip("TOPOFLOW_SHARED is not set: the real data are not here")
    return Path(os.environ["TOPOFLOW_SHARED"]) / "data"


def test_real_china_has_323_cells_and_their_means(shared, tmp_path):
    path, terrain = shared / "china_cnemc_2019_hourly.nc", shared / "terrain_asia_20min.nc"
    summary = grid_stations([path], tmp_path / "out", 1.0, (18, 54, 73, 135), terrain, progress=False)
    assert summary.shape == (36, 62)
    assert summary.cells_with_stations == 323
    assert summary.stations + summary.stations_outside == 1476
    gridded = read_years(tmp_path / "out")
    with xr.open_dataset(path) as raw, xr.open_dataset(terrain) as heights:
        for south, west in ((39, 116), (31, 121), (30, 104), (43, 87)):
            within = ((raw["lat"] >= south) & (raw["lat"] < south + 1) & (raw["lon"] >= west)) & (raw["lon"] < west + 1)
            cell = gridded.sel(lat=south + 0.5, lon=west + 0.5)
            assert int(cell["station_count"]) == int(within.sum()) > 0
            for name, factor in (("o3", 1.0), ("co", 1000.0)):
                few = raw[name].isel(station=within.values)
                np.testing.assert_allclose(cell[name], few.mean("station") * factor, rtol=2e-7)
                np.testing.assert_array_equal(cell[f"{name}_count"], few.count("station"))
            inside = heights["elevation"].sel(lat=slice(south, south + 1), lon=slice(west, west + 1))
            np.testing.assert_allclose(cell["elevation"], inside.mean(), rtol=1e-5)
        assert np.isnan(gridded["pm25"].sel(time="2019-04-08")).all()


def test_real_beijing_has_wind(shared, tmp_path):
    path = shared / "beijing_12_stations_2013_2017_hourly.nc"
    summary = grid_stations([path], tmp_path / "out", 0.5, progress=False)
    assert summary.skipped == ("dew_point", "rain", "wind_speed")
    gridded = read_years(tmp_path / "out")
    assert sorted(np.unique(gridded["time"].dt.year)) == [2013, 2014, 2015, 2016, 2017]
    assert 250 < float(gridded["temp"].min()) < float(gridded["temp"].max()) < 320
    assert 97000 < float(gridded["psfc"].min()) < float(gridded["psfc"].max()) < 105000
    with xr.open_dataset(path) as raw:
        assert float(gridded["co"].max()) <= float(raw["co"].max())  # ug m-3 already
        within = (np.floor(raw["lat"] * 2) == 79) & (np.floor(raw["lon"] * 2) == 232)
        np.testing.assert_allclose(
            gridded["v"].sel(lat=39.75, lon=116.25), raw["v"].isel(station=within.values).mean("station"), atol=1e-6
        )
