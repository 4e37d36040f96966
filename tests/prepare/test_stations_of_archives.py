"""Station measurements as archives have them: every cell mean of the prepared data is that of plain pandas."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from topoflow.data.prepared.reader import PreparedData, index_prepared
from topoflow.tools.prepare.command import prepare
from topoflow.tools.prepare.recipe import GridSpec, Recipe, Rules, Source, read_recipe

RECIPES = Path(__file__).parents[2] / "configs/recipes"
MOLAR_VOLUME_25 = 24.4654
"""Litres of a mole at 298.15 K and 1013.25 hPa: 8.314462618 x 298.15 / 101.325."""
MOLAR_MASSES = {"no": 30.006, "no2": 46.005, "o3": 47.997, "so2": 64.058, "co": 28.010}


def prepared(recipe, output) -> PreparedData:
    done = prepare(recipe, output, progress=False)
    assert done.is_decided, done.lines
    return PreparedData(index_prepared(str(output)))


def cell_means(rows: pd.DataFrame, degrees: float) -> pd.Series:
    """Means of `value` by name, time and the south-west corner of the cell, counted in cells."""
    row = np.floor(rows["lat"] / degrees + 1e-9).astype(int)
    column = np.floor(rows["lon"] / degrees + 1e-9).astype(int)
    return rows.groupby(["name", "time", row.rename("row"), column.rename("column")])["value"].mean()


def require_same(data: PreparedData, expected: pd.Series, degrees: float, rtol: float) -> None:
    """All values of the data are `expected`, and no others."""
    south = np.round(data.grid.lat2d[:, 0] / degrees - 0.5).astype(int)
    west = np.round(data.grid.lon2d[0] / degrees - 0.5).astype(int)
    for name in expected.index.unique("name"):
        part = expected.loc[name]
        at = (
            np.searchsorted(data.times, part.index.get_level_values("time").to_numpy().astype("M8[h]")),
            np.argmax(south[None] == part.index.get_level_values("row").to_numpy()[:, None], axis=1),
            np.argmax(west[None] == part.index.get_level_values("column").to_numpy()[:, None], axis=1),
        )
        fields = np.full((len(data.times), *data.grid.shape), np.nan)
        fields[at] = part.to_numpy()
        assert len(part) > 100
        np.testing.assert_allclose(data.read(name, np.arange(len(data.times))), fields, rtol, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("degrees", [0.1, 0.5], ids=["a cell for each", "one cell for all"])
def test_openaq_locations(shared_dir, tmp_path, degrees):
    raw = shared_dir / "data/raw"
    shipped = read_recipe(RECIPES / "openaq.yaml")
    assert shipped.sources[0].path == str(RECIPES / "*.csv.gz")
    source = dataclasses.replace(shipped.sources[0], path=str(raw / "openaq_location_*.csv.gz"))
    grid = GridSpec(degrees=degrees, box=(43.5, 44.5, -80.0, -79.0))
    data = prepared(dataclasses.replace(shipped, sources=(source,), grid=grid), tmp_path / "out")

    table = pd.concat([pd.read_csv(path) for path in sorted(raw.glob("openaq_location_*.csv.gz"))])
    assert set(table.loc[table["parameter"].isin(MOLAR_MASSES), "unit"]) == {"ppm"}
    names = {"temperature": "temp", "relativehumidity": "rh", "pm25": "pm25"} | {name: name for name in MOLAR_MASSES}
    rows = pd.DataFrame(
        {
            "name": table["parameter"].map(names),
            "time": pd.to_datetime(table["datetimeUtc"]).dt.tz_localize(None),
            "lat": table["latitude"],
            "lon": table["longitude"],
            "value": table["value"],
        }
    ).dropna()
    factors = {name: 1000 * mass / MOLAR_VOLUME_25 for name, mass in MOLAR_MASSES.items()}
    rows["value"] = rows["value"] * rows["name"].map(factors).fillna(1) + (rows["name"] == "temp") * 273.15
    require_same(data, cell_means(rows, degrees), degrees, rtol=1e-5)
    assert set(data.dynamic) == set(rows["name"])


def test_beijing_with_its_wind_and_weather(shared_dir, tmp_path):
    path = shared_dir / "data/beijing_12_stations_2013_2017_hourly.nc"
    source = Source(path=str(path), time_zone="UTC+8", names={"rain": "rain"})
    grid = GridSpec(degrees=0.25, box=(39.5, 40.5, 115.75, 117.0))
    terrain, rules = str(shared_dir / "data/terrain_asia_20min.nc"), Rules(drop=("elevation < 0",))
    data = prepared(Recipe((source,), grid, elevation=terrain, rules=rules), tmp_path / "out")

    with xr.open_dataset(path) as dataset:
        frame = dataset.drop_vars("elevation").to_dataframe().reset_index()
    assert frame["time"].min() == pd.Timestamp("2013-03-01")
    frame["time"] -= pd.Timedelta(hours=8)
    frame["temp"], frame["psfc"] = frame["temp"] + 273.15, frame["psfc"] * 100
    names = ["u", "v", "temp", "psfc", "pm25", "pm10", "so2", "no2", "co", "o3", "rain"]
    rows = frame.melt(["time", "station", "lat", "lon"], names, var_name="name").dropna()
    require_same(data, cell_means(rows, 0.25), 0.25, rtol=1e-5)
    assert data.units["rain"] == "mm"
    dew, air = frame["dew_point"], frame["temp"] - 273.15
    pressures = (np.exp(17.625 * celsius / (celsius + 243.04)) for celsius in (dew, air))  # Alduchov and Eskridge 1996
    humidity = frame[["time", "lat", "lon"]].assign(name="rh", value=100 * next(pressures) / next(pressures)).dropna()
    require_same(data, cell_means(humidity, 0.25), 0.25, rtol=0.01)


def test_wind_of_words_is_that_of_the_components(shared_dir, tmp_path):
    """The tables of UCI have speed and one of 16 directions; the NetCDF file has the components that they are."""
    with xr.open_dataset(shared_dir / "data/beijing_12_stations_2013_2017_hourly.nc") as dataset:
        frame = dataset[["u", "v", "wind_speed"]].isel(time=slice(0, 24 * 40)).to_dataframe().reset_index()
    words = ["N", "NNE", "NE", "ENE", "E", "ESE", "SE", "SSE", "S", "SSW", "SW", "WSW", "W", "WNW", "NW", "NNW"]
    degrees = np.degrees(np.arctan2(-frame["u"], -frame["v"])) % 360
    frame["wd"] = [words[round(d / 22.5) % 16] if np.isfinite(d) else "NA" for d in degrees]
    frame["WSPM"] = frame["wind_speed"]
    clock = {part: getattr(frame["time"].dt, part) for part in ("year", "month", "day", "hour")}
    table = frame.assign(**clock, No=range(len(frame)))
    for station, rows in table.groupby("station"):
        columns = ["No", "year", "month", "day", "hour", "wd", "WSPM", "station"]
        rows[columns].to_csv(tmp_path / f"PRSA_Data_{station}_20130301-20170228.csv", index=False, na_rep="NA")
    places = frame.drop_duplicates("station")[["station", "lat", "lon"]]
    places.set_axis(["station", "latitude", "longitude"], axis=1).to_csv(tmp_path / "beijing_stations.csv", index=False)
    (tmp_path / "recipe.yaml").write_text((RECIPES / "uci_beijing.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    shipped = read_recipe(tmp_path / "recipe.yaml")
    grid = GridSpec(degrees=0.25, box=(39.5, 40.5, 115.75, 117.0))
    data = prepared(dataclasses.replace(shipped, grid=grid), tmp_path / "out")
    rows = frame.assign(time=frame["time"] - pd.Timedelta(hours=8))
    rows = rows.melt(["time", "station", "lat", "lon"], ["u", "v"], var_name="name").dropna()
    expected = cell_means(rows, 0.25)
    assert set(data.dynamic) == {"u", "v"}
    for name in ("u", "v"):
        found = data.read(name, np.arange(len(data.times)))
        assert np.isfinite(found).sum() == len(expected.loc[name])
    require_same(data, expected, 0.25, rtol=1e-3)
