"""A small physical world to try the program on: towns, wind and terrain, six pollutants, in NetCDF files."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import netCDF4
import numpy as np
from tqdm import tqdm

from topoflow.data.variables import POLLUTANTS, VARIABLES
from topoflow.errors import ConfigError
from topoflow.files import require_writable
from topoflow.tools.demo.geography import LAYER_M, Geography, build_geography
from topoflow.tools.demo.transport import advect, diffuse
from topoflow.tools.demo.weather import (
    Weather,
    WeatherFields,
    draw_weather,
    forecast_weather,
    red_noise,
    weather_fields,
)

START = np.datetime64("2018-10-01T00", "h")
SPIN_UP_HOURS = 96
HOUR_S = 3600.0
DIFFUSIVITY_M2_S = 4e3

TRACERS = ("co", "so2", "nox", "ox", "fine", "coarse")
"""Transported quantities: CO, SO2, fine and coarse particles in ug m-3; NOx = NO + NO2 and Ox = O3 + NO2 in ppb."""
NO2_UG_PER_PPB, O3_UG_PER_PPB = 1.88, 1.96
"""ug m-3 of 1 ppb at 25 C and 1013 hPa."""
INFLOW = np.array([240.0, 3.0, 3.0, 38.0, 9.0, 12.0])
"""Concentrations in the air that enters the domain, and everywhere at the start."""
TOWN_EMISSION = np.array([0.070, 0.0006, 3.0e-3, 1.5e-4, 0.0030, 0.0032])
INDUSTRY_EMISSION = np.array([0.040, 0.0030, 1.4e-3, 0.7e-4, 0.0026, 0.0036])
"""Increase at a pattern's peak per second, in ug m-3 or ppb; a twentieth of NOx is emitted as NO2."""
EXCHANGE_HOURS = 30.0
"""Time scale of the exchange with the air above the layer, which is as clean as the air that enters."""
DEPOSITION_M_S = np.array([0.0, 4e-3, 1e-3, 4e-3, 1.5e-3, 6e-3])
WASHOUT_PER_MM = np.array([0.0, 0.15, 0.03, 0.0, 0.25, 0.35])
MISSING_FRACTION = 0.02
MISSING_HOURS = 6
ISSUE_HOURS, FORECAST_STEPS = 12, tuple(range(0, 121, 6))
"""Hours between two weather forecasts, and hours after the issue that they reach."""
FORECAST = ("u", "v", "temp", "rh", "psfc")
BLOCK_HOURS = 720
"""Hours that are held in memory and written at once; gaps are drawn for each block."""


@dataclass(frozen=True)
class World:
    """The demo world's geography, weather and emissions, which the simulation starts from."""

    geography: Geography
    weather: Weather
    activity: np.ndarray
    """[T, TOWNS + 1]: how much each town, and industry, emits at each hour, 1 on average."""


def make_demo_data(
    output: Path,
    days: int = 180,
    grid: tuple[int, int] = (24, 32),
    seed: int = 0,
    progress: bool = True,
    forecasts: Path | None = None,
) -> None:
    """Simulate the demo world and write it as yearly NetCDF files, the same values for the same arguments.

    A plain with a winding ridge, a basin within a broken ring of mountains, and towns. The wind turns over days and
    bends around the terrain; towns and industry emit by the hour of day; tracers are carried, mixed, blocked by
    ridges, deposited and washed out; NO, NO2 and O3 are in balance under the sun; SO2 and NOx turn into fine particles;
    PM10 is PM2.5 and coarse particles, some of them dust. A fiftieth of the pollutant values is missing.

    Args:
        output: folder to create, with world_YYYY.nc; it appears only when it is complete.
        days: days from 2018-10-01 on.
        grid: rows and columns of 0.25 degree, at least 8 x 8.
        seed: of terrain, towns, weather and gaps.
        progress: show a progress bar.
        forecasts: another folder to create, with issued_YYYY.nc, the weather as it was forecast every ISSUE_HOURS with
            errors that grow, and the recipe to prepare it.

    Raises:
        ConfigError: a folder exists and is not empty, or cannot be written, or a number is out of range.
    """
    if days < 1:
        raise ConfigError(f"--days {days}: expected an integer >= 1")
    if min(grid) < 8:
        raise ConfigError(f"--grid {grid[0]}x{grid[1]}: expected at least 8x8")
    if seed < 0:
        raise ConfigError(f"--seed {seed}: expected an integer >= 0")
    for folder in filter(None, (output, forecasts)):
        _require_new_folder(folder)
    world = build_world(days, grid, seed)
    if forecasts is not None:
        with _appearing_at_once(forecasts) as partial:
            _write_forecasts(partial, world, seed, progress)
    with _appearing_at_once(output) as partial:
        _write_years(partial, world, seed, progress)


@contextmanager
def _appearing_at_once(folder: Path) -> Iterator[Path]:
    """Give a hidden folder, which gets the name `folder` once all is written."""
    partial = folder.absolute().with_name(f".{folder.absolute().name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        try:
            yield partial
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror or error}") from None


def _require_new_folder(output: Path) -> None:
    try:
        is_empty = output.is_dir() and not any(output.iterdir())
    except OSError as error:
        raise ConfigError(f"{output}: cannot be read: {error.strerror}") from None
    if not is_empty and (output.exists() or output.is_symlink()):
        raise ConfigError(f"{output}: already exists: expected a new or empty folder")
    require_writable(output.absolute().parent)


def _write_years(folder: Path, world: World, seed: int, progress: bool) -> None:
    gaps, times = np.random.default_rng([seed, 3]), world.weather.times[SPIN_UP_HOURS:]
    years = times.astype("datetime64[Y]").astype(int) + 1970
    hourly = simulate(world)
    with tqdm(total=len(times), desc="demo-data", unit="h", disable=not progress) as bar:
        for year in np.unique(years):
            of_year = np.flatnonzero(years == year)
            with netCDF4.Dataset(folder / f"world_{year}.nc", "w") as file:
                _describe(file, world.geography, times[of_year], seed)
                for first in range(0, len(of_year), BLOCK_HOURS):
                    block = of_year[first : first + BLOCK_HOURS]
                    weather = weather_fields(
                        world.weather, slice(block[0] + SPIN_UP_HOURS, block[-1] + 1 + SPIN_UP_HOURS), world.geography
                    )
                    pollutants = np.empty((len(block), len(POLLUTANTS), *world.geography.elevation_m.shape), np.float32)
                    for hour in range(len(block)):
                        pollutants[hour] = next(hourly)
                        bar.update()
                    for name in _DYNAMIC:
                        if name in POLLUTANTS:
                            values = _with_gaps(pollutants[:, POLLUTANTS.index(name)], gaps)
                        else:
                            values = getattr(weather, name)
                        file[name][first : first + len(block)] = values.astype(np.float32)


def _write_forecasts(folder: Path, world: World, seed: int, progress: bool) -> None:
    """Write the forecasts of each year, and the recipe to prepare them."""
    generator, weather = np.random.default_rng([seed, 4]), world.weather
    reach = FORECAST_STEPS[-1] + 1
    issues = np.arange(SPIN_UP_HOURS, len(weather.times) - reach + 1, ISSUE_HOURS)
    years = weather.times[issues].astype("datetime64[Y]").astype(int) + 1970
    with tqdm(total=len(issues), desc="forecasts", unit="issue", disable=not progress) as bar:
        for year in np.unique(years):
            of_year = issues[years == year]
            with netCDF4.Dataset(folder / f"issued_{year}.nc", "w") as file:
                _add_axes(file, world.geography, seed, weather.times[of_year], "forecast_reference_time")
                _add_axis(file, "step", np.array(FORECAST_STEPS), "hours", "forecast_period")
                for name in FORECAST:
                    _add_variable(file, name, ("time", "step", "lat", "lon"))
                for row, issue in enumerate(of_year):
                    forecast = forecast_weather(weather, int(issue), reach, generator)
                    fields = weather_fields(forecast, slice(None, None, FORECAST_STEPS[1]), world.geography)
                    for name in FORECAST:
                        file[name][row] = getattr(fields, name).astype(np.float32)
                    bar.update()
    (folder / "recipe.yaml").write_text(
        "# python -m topoflow prepare THIS_FILE -o OUT, for data.forecast\n"
        f"sources: [{{path: issued_*.nc}}]\nsteps: {list(FORECAST_STEPS)}\n",
        encoding="utf-8",
    )


def _describe(file: netCDF4.Dataset, geography: Geography, times: np.ndarray, seed: int) -> None:
    """Define the dimensions and variables of a year, and write those that do not change."""
    _add_axes(file, geography, seed, times, "time")
    for name in (*_STATIC, *_DYNAMIC):
        _add_variable(file, name, ("lat", "lon") if name in _STATIC else ("time", "lat", "lon"))
    for name, attribute in _STATIC.items():
        file[name][:] = getattr(geography, attribute)


def _add_axes(file: netCDF4.Dataset, geography: Geography, seed: int, times: np.ndarray, standard_name: str) -> None:
    """Define and write time, lat and lon. standard_name: of the time."""
    file.setncatts({"title": f"TopoFlow demo world, seed {seed}", "Conventions": "CF-1.8"})
    hours = (times - START).astype(np.int64)
    _add_axis(file, "time", hours, f"hours since {str(START).replace('T', ' ')}:00:00", standard_name)
    _add_axis(file, "lat", geography.lat, "degrees_north", "latitude")
    _add_axis(file, "lon", geography.lon, "degrees_east", "longitude")


def _add_axis(file: netCDF4.Dataset, name: str, values: np.ndarray, unit: str, standard_name: str) -> None:
    file.createDimension(name, len(values))
    variable = file.createVariable(name, values.dtype, (name,))
    variable.setncatts({"units": unit, "standard_name": standard_name})
    variable[:] = values


def _add_variable(file: netCDF4.Dataset, name: str, dimensions: tuple[str, ...]) -> None:
    variable = file.createVariable(name, np.float32, dimensions, fill_value=np.float32(np.nan))
    variable.setncatts({"units": VARIABLES[name].unit, "long_name": VARIABLES[name].long_name})


_STATIC = {"elevation": "elevation_m", "population": "population"}
_DYNAMIC = tuple(name for name, variable in VARIABLES.items() if variable.kind == "dynamic")


def _with_gaps(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return values [n, H, W] with gaps: random cells are missing for MISSING_HOURS at a time."""
    stretches = -(-len(values) // MISSING_HOURS)
    missing = generator.random((stretches, *values.shape[1:])) < MISSING_FRACTION
    return np.where(np.repeat(missing, MISSING_HOURS, axis=0)[: len(values)], np.nan, values)


def build_world(days: int, grid: tuple[int, int], seed: int) -> World:
    """Return terrain, weather and emissions for `days` and the spin-up before them."""
    geography = build_geography(grid, np.random.default_rng([seed, 0]))
    times = START + np.arange(-SPIN_UP_HOURS, 24 * days) * np.timedelta64(1, "h")
    weather = draw_weather(times, np.random.default_rng([seed, 1]))
    return World(geography, weather, _activity(times, len(geography.towns), np.random.default_rng([seed, 2])))


def _activity(times: np.ndarray, towns: int, generator: np.random.Generator) -> np.ndarray:
    hour = ((times - times.astype("datetime64[D]")) / np.timedelta64(1, "h"))[:, None]
    # two rush hours over a night's low; industry is steadier
    traffic = 0.45 + 1.3 * np.exp(-(((hour - 8) / 2.2) ** 2)) + 1.4 * np.exp(-(((hour - 18.5) / 3.0) ** 2))
    steady = 1 + 0.2 * np.cos(2 * np.pi * (hour - 14) / 24)
    daily = np.concatenate([np.repeat(traffic, towns, axis=1), steady], axis=1)
    return daily * np.exp(0.2 * red_noise(len(times), 30.0, generator, towns + 1) - 0.02)


def simulate(world: World) -> Iterator[np.ndarray]:
    """Yield the result of `near_ground` for each hour after the spin-up: [6, H, W]."""
    geography, weather = world.geography, world.weather
    tracers = np.broadcast_to(INFLOW[:, None, None], (len(TRACERS), *geography.elevation_m.shape)).copy()
    cell_m = (geography.dx_m, geography.dy_m)
    patterns = np.concatenate([geography.towns, geography.industry[None]]) / geography.depth
    for hour in range(len(weather.times)):
        fields = weather_fields(weather, slice(hour, hour + 1), geography)
        if hour >= SPIN_UP_HOURS:
            yield near_ground(tracers, fields)
        flow_x, flow_y = (
            np.einsum("k,kij->ij", weather.steering_ms[hour], flow) for flow in (geography.flow_x, geography.flow_y)
        )
        tracers = advect(tracers, geography.depth, flow_x, flow_y, INFLOW, cell_m, HOUR_S)
        tracers = diffuse(tracers, geography.depth, DIFFUSIVITY_M2_S, cell_m, HOUR_S)
        tracers = tracers + emissions(patterns, world.activity[hour], fields)
        tracers = react(tracers, fields)
        tracers = remove(tracers, fields)


def emissions(patterns: np.ndarray, activity: np.ndarray, fields: WeatherFields) -> np.ndarray:
    """Return what an hour of emission adds to the air: [S, H, W]. patterns [TOWNS + 1, H, W], activity [TOWNS + 1]."""
    emitted = activity[:, None, None] * patterns
    gain = TOWN_EMISSION[:, None, None] * emitted[:-1].sum(axis=0) + INDUSTRY_EMISSION[:, None, None] * emitted[-1]
    # dust rises where dry ground meets a strong wind
    excess = np.maximum(np.hypot(fields.u[0], fields.v[0]) - 5.0, 0.0)
    gain[TRACERS.index("coarse")] += 3e-4 * excess * (1 - fields.rh[0] / 100)
    return gain * HOUR_S


def react(tracers: np.ndarray, fields: WeatherFields) -> np.ndarray:
    """Apply an hour of slow chemistry [S, H, W]: SO2 and NOx form fine particles, NOx in sunlight forms Ox."""
    co, so2, nox, ox, fine, coarse = tracers
    sun, damp = fields.sun[0], (fields.rh[0] / 100) ** 3
    warmth = np.exp((fields.temp[0] - 288.0) / 15.0)
    sulfate = so2 * (1 - np.exp(-(0.01 + 0.05 * damp)))
    nitrate = nox * (1 - np.exp(-(0.015 + 0.16 * sun)))
    made = 14.0 * sun * warmth * nox / (nox + 8.0)
    # half of the nitric acid from a loss of NOx ends up in particles; 1 ppb of nitrate is about 2.5 ug m-3
    particles = fine + 1.5 * sulfate + 0.5 * 2.5 * nitrate
    return np.stack([co, so2 - sulfate, nox - nitrate, np.maximum(ox - nitrate, 0.0) + made, particles, coarse])


def remove(tracers: np.ndarray, fields: WeatherFields) -> np.ndarray:
    """Apply an hour of exchange with the air above, dry deposition and washout by rain: [S, H, W]."""
    rate = DEPOSITION_M_S[:, None, None] / LAYER_M * HOUR_S + WASHOUT_PER_MM[:, None, None] * fields.rain[0]
    above = INFLOW[:, None, None]
    tracers = above + (tracers - above) * np.exp(-1 / EXCHANGE_HOURS)
    return tracers * np.exp(-rate)


def near_ground(tracers: np.ndarray, fields: WeatherFields) -> np.ndarray:
    """Return pollutants at the ground from the means of the layer: [6, H, W] in the order of POLLUTANTS, ug m-3.

    In calm nights emissions stay near the ground. NO2 follows from the balance NO + O3 <-> NO2 + light, fast against an
    hour (Leighton 1961, Photochemistry of Air Pollution): y^2 - (NOx + Ox + J/k) y + NOx Ox = 0.
    """
    co, so2, nox, ox, fine, coarse = tracers
    night = 1 - np.minimum(fields.sun[0] / 0.3, 1.0)
    low = 1 + 0.7 * night * np.exp(-np.hypot(fields.u[0], fields.v[0]) / 5.0)
    balance = 18.0 * fields.sun[0]
    nox = nox * low
    total = nox + ox + balance
    no2 = 2 * nox * ox / (total + np.sqrt(np.maximum(total**2 - 4 * nox * ox, 0.0)))
    o3 = np.maximum(ox - no2, 0.0)
    ground = {
        "pm25": fine * low,
        "pm10": (fine + coarse) * low,
        "so2": so2 * low,
        "no2": no2 * NO2_UG_PER_PPB,
        "co": co * low,
        "o3": o3 * O3_UG_PER_PPB,
    }
    return np.stack([ground[name] for name in POLLUTANTS])
