import hashlib
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import yaml

from topoflow.data.prepared.reader import PreparedData, index_prepared
from topoflow.data.variables import POLLUTANTS
from topoflow.errors import ConfigError
from topoflow.tools.demo import world as demo_world
from topoflow.tools.demo.geography import Geography, build_flow, build_geography
from topoflow.tools.demo.transport import advect, diffuse
from topoflow.tools.demo.weather import WeatherFields, draw_weather, forecast_weather
from topoflow.tools.demo.world import TRACERS, build_world, make_demo_data, near_ground, react, remove
from topoflow.tools.prepare.command import load_recipe, prepare

CELL_M = (24e3, 28e3)
DAY_S = 86400.0


@pytest.fixture(scope="module")
def geography() -> Geography:
    return build_geography((24, 32), np.random.default_rng(5))


def closed_flow(depth: np.ndarray, speed_ms: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return a random flow without divergence that crosses no edge."""
    rows, columns = depth.shape
    psi = np.zeros((rows + 1, columns + 1))
    psi[1:-1, 1:-1] = np.random.default_rng(seed).normal(size=(rows - 1, columns - 1))
    flow_x, flow_y = np.diff(psi, axis=0) / CELL_M[1], -np.diff(psi, axis=1) / CELL_M[0]
    scale = speed_ms / max(np.abs(flow_x).max(), np.abs(flow_y).max())
    return flow_x * scale, flow_y * scale


def random_blobs(shape: tuple[int, int]) -> np.ndarray:
    """Return three tracers, zero in most cells, with sharp edges."""
    generator = np.random.default_rng(1)
    return np.where(generator.random((3, *shape)) < 0.2, generator.uniform(0, 100, (3, *shape)), 0.0)


def test_advection_and_diffusion_conserve_mass_over_uneven_terrain(geography):
    depth, tracers = geography.depth, random_blobs((24, 32))
    flow_x, flow_y = closed_flow(depth, 3.0)
    before = (tracers * depth).sum(axis=(1, 2))
    carried = advect(tracers, depth, flow_x, flow_y, np.zeros(3), CELL_M, DAY_S)
    mixed = diffuse(carried, depth, 2e4, CELL_M, DAY_S)
    assert np.abs(carried - tracers).max() > 10
    assert np.abs(mixed - carried).max() > 1
    np.testing.assert_allclose((carried * depth).sum(axis=(1, 2)), before, rtol=1e-12)
    np.testing.assert_allclose((mixed * depth).sum(axis=(1, 2)), before, rtol=1e-12)


def test_no_value_leaves_the_initial_range(geography):
    tracers = random_blobs((24, 32))
    carried = advect(
        tracers, geography.depth, 5 * geography.flow_x[0], 5 * geography.flow_y[0], np.zeros(3), CELL_M, DAY_S / 4
    )
    mixed = diffuse(tracers, geography.depth, 2e5, CELL_M, DAY_S / 4)
    for result in (carried, mixed):
        assert result.min() >= 0.0
        assert result.max() <= tracers.max() * (1 + 1e-12)


def test_uniform_air_stays_uniform(geography):
    even = np.full((2, 24, 32), 7.0)
    steering = np.array([3.0, -2.0])
    flow_x, flow_y = (np.einsum("k,kij->ij", steering, flow) for flow in (geography.flow_x, geography.flow_y))
    cell_m = (geography.dx_m, geography.dy_m)
    carried = advect(even, geography.depth, flow_x, flow_y, np.full(2, 7.0), cell_m, DAY_S)
    np.testing.assert_allclose(carried, 7.0, rtol=1e-11)
    np.testing.assert_allclose(diffuse(even, geography.depth, 1e5, cell_m, DAY_S), 7.0, rtol=1e-12)


def gaussian(shape: tuple[int, int], row: float, column: float, width: float) -> np.ndarray:
    rows, columns = np.meshgrid(np.arange(shape[0]), np.arange(shape[1]), indexing="ij")
    return np.exp(-0.5 * ((rows - row) ** 2 + (columns - column) ** 2) / width**2)[None]


def test_a_plume_over_flat_ground_moves_with_the_wind():
    shape, depth = (60, 64), np.ones((60, 64))
    flow_x, flow_y = np.full((60, 65), 4.0), np.full((61, 64), -3.0)
    seconds = 20 * CELL_M[0] / 4.0  # 20 cells east
    south = 3.0 * seconds / CELL_M[1]
    start, expected = gaussian(shape, 40, 20, 5.0), gaussian(shape, 40 - south, 40, 5.0)
    carried = advect(start, depth, flow_x, flow_y, np.zeros(1), CELL_M, seconds)
    rows, columns = np.meshgrid(*(np.arange(size) for size in shape), indexing="ij")
    for axis, place in ((rows, 40 - south), (columns, 40)):
        assert (axis * carried[0]).sum() / carried.sum() == pytest.approx(place, abs=0.05)
    assert np.abs(carried - expected).max() < 0.07  # first-order upwind: 0.3
    assert np.abs(start - expected).max() > 0.85


def test_diffusion_widens_a_plume_by_twice_diffusivity_times_time():
    shape = (60, 60)
    mixed = diffuse(gaussian(shape, 30, 30, 2.0), np.ones(shape), 5e3, CELL_M, DAY_S)[0]
    for axis, spacing in ((0, CELL_M[1]), (1, CELL_M[0])):
        profile, place = mixed.sum(axis=1 - axis), (np.arange(60) - 30) * spacing
        variance = (profile * place**2).sum() / profile.sum()
        assert variance == pytest.approx((2.0 * spacing) ** 2 + 2 * 5e3 * DAY_S, rel=1e-3)


def test_flow_has_no_divergence_and_obeys_its_drag_law(geography):
    dx, dy, depth = geography.dx_m, geography.dy_m, geography.depth
    for flow_x, flow_y in zip(geography.flow_x, geography.flow_y, strict=True):
        divergence = np.diff(flow_x, axis=1) * dy + np.diff(flow_y, axis=0) * dx
        assert np.abs(divergence).max() < 1e-10 * dx
        # wind / depth = flow / depth**2 is a gradient: its circulation around an inner corner vanishes
        force_x = flow_x[:, 1:-1] / np.minimum(depth[:, 1:], depth[:, :-1]) ** 2
        force_y = flow_y[1:-1] / np.minimum(depth[1:], depth[:-1]) ** 2
        circulation = np.diff(force_y, axis=1) * dy - np.diff(force_x, axis=0) * dx
        assert np.abs(circulation).max() < 1e-6 * np.abs(force_x).max() * dx


def test_wind_is_uniform_over_flat_ground_and_bends_around_a_hill():
    flat_x, flat_y = build_flow(np.ones((12, 16)), *CELL_M)
    np.testing.assert_allclose(flat_x, np.array([1.0, 0.0])[:, None, None] * np.ones((2, 12, 17)), atol=1e-9)
    np.testing.assert_allclose(flat_y, np.array([0.0, 1.0])[:, None, None] * np.ones((2, 13, 16)), atol=1e-9)
    depth = np.ones((13, 17))
    depth[5:8, 7:10] = 0.15
    flow_x, flow_y = build_flow(depth, *CELL_M)
    assert np.abs(flow_x[0, 6, 7:11]).max() < 0.2  # little passes over the hill
    assert flow_x[0, 3, 8] > 1.1  # more passes around it
    assert flow_y[0, 10, 6] > 0.1  # north of the axis it turns north before the hill, south of it south
    np.testing.assert_allclose(flow_y[0], -flow_y[0, ::-1], atol=1e-7)


def test_terrain_blocks_tracers():
    passed = {}
    for name, lowest in (("plain", 1.0), ("ridge", 0.12)):
        depth = np.ones((20, 30))
        depth[3:17, 14:16] = lowest
        flow_x, flow_y = build_flow(depth, *CELL_M)
        tracers = np.zeros((1, 20, 30))
        for _ in range(24):
            tracers[0, 10, 9] += 1.0
            tracers = advect(tracers, depth, 4 * flow_x[0], 4 * flow_y[0], np.zeros(1), CELL_M, 3600.0)
            tracers = diffuse(tracers, depth, 4e3, CELL_M, 3600.0)
        passed[name] = (tracers * depth)[0, 8:13, 16:].sum()  # in the lee of the ridge's middle
    assert passed["plain"] > 5
    assert passed["ridge"] < passed["plain"] / 5


def calm_fields(sun: float, rain: float = 0.0, rh: float = 50.0) -> WeatherFields:
    shape = (1, 2, 3)
    values = {"u": 0.0, "v": 0.0, "temp": 288.0, "rh": rh, "psfc": 1e5, "rain": rain, "sun": sun}
    return WeatherFields(**{name: np.full(shape, value) for name, value in values.items()})


def air(**ppb_or_ug: float) -> np.ndarray:
    return np.stack([np.full((2, 3), ppb_or_ug.get(name, 0.0)) for name in TRACERS])


@pytest.mark.parametrize("sun", [0.4, 0.8])
@pytest.mark.parametrize(("nox", "ox"), [(5.0, 60.0), (80.0, 50.0)])
def test_nitrogen_oxides_and_ozone_are_in_photostationary_balance(sun, nox, ox):
    ground = dict(zip(POLLUTANTS, near_ground(air(nox=nox, ox=ox), calm_fields(sun)), strict=True))
    no2, o3 = ground["no2"] / 1.88, ground["o3"] / 1.96
    np.testing.assert_allclose(no2 + o3, ox)
    np.testing.assert_allclose((nox - no2) * o3, 18.0 * sun * no2)  # k NO O3 = J NO2, J / k = 18 ppb at full sun


def test_at_night_nitric_oxide_consumes_the_ozone():
    ground = dict(zip(POLLUTANTS, near_ground(air(nox=200.0, ox=50.0), calm_fields(0.0)), strict=True))
    np.testing.assert_allclose(ground["o3"], 0.0, atol=1e-9)
    np.testing.assert_allclose(ground["no2"], 50.0 * 1.88)


def test_sunlight_forms_ozone_from_nitrogen_oxides_and_sulphur_turns_into_particles():
    before = air(so2=20.0, nox=20.0, ox=40.0)
    by_day, by_night = react(before, calm_fields(0.7)), react(before, calm_fields(0.0))
    ox, so2, nox, fine = (TRACERS.index(name) for name in ("ox", "so2", "nox", "fine"))
    assert (by_day[ox] > before[ox]).all()
    assert (by_night[ox] < before[ox]).all()
    assert (by_day[nox] < by_night[nox]).all()
    # sulphate has 1.5 times the mass of the SO2 it was, half of the nitrate is particles of 2.5 ug m-3 per ppb
    expected = 1.5 * (before[so2] - by_night[so2]) + 1.25 * (before[nox] - by_night[nox])
    np.testing.assert_allclose(by_night[fine], expected)


def test_rain_washes_particles_out_and_not_carbon_monoxide():
    before = air(co=800.0, fine=80.0, coarse=80.0)
    dry, wet = remove(before, calm_fields(0.3)), remove(before, calm_fields(0.3, rain=2.0))
    np.testing.assert_allclose(wet[TRACERS.index("fine")], dry[TRACERS.index("fine")] * np.exp(-0.25 * 2))
    np.testing.assert_array_equal(wet[TRACERS.index("co")], dry[TRACERS.index("co")])
    assert (dry[TRACERS.index("coarse")] < dry[TRACERS.index("fine")]).all()  # coarse particles settle faster


def test_wind_turns_over_days_through_all_directions_at_a_varying_rate():
    times = np.datetime64("2019-01-01T00", "h") + np.arange(24 * 120) * np.timedelta64(1, "h")
    weather = draw_weather(times, np.random.default_rng(0))
    u, v = weather.steering_ms.T
    assert min((u > 1).mean(), (u < -1).mean(), (v > 1).mean(), (v < -1).mean()) > 0.15
    turns = np.flatnonzero(np.diff(np.floor(weather.phase / (2 * np.pi))))
    days_a_turn = np.diff(turns) / 24
    assert 3 < days_a_turn.mean() < 9
    assert days_a_turn.std() > 0.5
    assert np.hypot(*np.diff(weather.steering_ms, axis=0).T).max() < 4  # m/s per hour


def test_forecasts_begin_as_the_weather_is_and_lose_their_skill_in_days():
    times = np.datetime64("2018-10-01T00", "h") + np.arange(24 * 300) * np.timedelta64(1, "h")
    weather, generator = draw_weather(times, np.random.default_rng(1)), np.random.default_rng(2)
    issues = range(24, len(times) - 97, 12)
    winds = np.array([forecast_weather(weather, issue, 97, generator).steering_ms for issue in issues])
    truth = np.array([weather.steering_ms[issue : issue + 97] for issue in issues])
    np.testing.assert_allclose(winds[:, 0], truth[:, 0], atol=1e-9)
    r = [np.corrcoef(winds[:, hour].ravel(), truth[:, hour].ravel())[0, 1] for hour in (24, 48, 96)]
    assert r == pytest.approx([0.97, 0.92, 0.73], abs=0.03)
    # errors are of the same size as the weather: forecasts do not fade
    assert winds[:, 96].std() == pytest.approx(truth[:, 96].std(), rel=0.1)


def test_forecasts_are_written_by_issue_and_step_and_leave_the_world_as_it_is(tmp_path):
    make_demo_data(tmp_path / "with", days=7, grid=(8, 12), progress=False, forecasts=tmp_path / "issued")
    make_demo_data(tmp_path / "without", days=7, grid=(8, 12), progress=False)
    name = "world_2018.nc"
    assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    world = xr.open_dataset(tmp_path / "with" / name)
    issued = xr.open_dataset(tmp_path / "issued/issued_2018.nc", decode_timedelta=False)
    assert issued.sizes == {"time": 4, "step": 21, "lat": 8, "lon": 12}
    for variable in ("u", "v", "temp", "rh", "psfc"):
        at_issue = world[variable].sel(time=issued.time)
        np.testing.assert_allclose(issued[variable].sel(step=0), at_issue, rtol=1e-5, atol=1e-4)
        ahead = world[variable].sel(time=issued.time[0] + np.timedelta64(120, "h"))
        assert np.abs(issued[variable][0].sel(step=120) - ahead).max() > 0.1


def test_towns_emit_by_the_hour_of_day():
    world = build_world(40, (8, 8), 0)
    hour = (world.weather.times - world.weather.times.astype("datetime64[D]")).astype(int)
    by_hour = np.array([world.activity[hour == h, :-1].mean() for h in range(24)])
    assert by_hour[[8, 18]].min() > 2 * by_hour[[2, 3]].max()


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """Eight days over New Year, 12 x 16 cells."""
    output = tmp_path_factory.mktemp("demo") / "world"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_world, "START", np.datetime64("2018-12-28T00", "h"))
        make_demo_data(output, days=8, grid=(12, 16), seed=3, progress=False)
    return output


def fields(folder: Path) -> dict[str, np.ndarray]:
    years = [xr.open_dataset(file) for file in sorted(folder.glob("world_*.nc"))]
    dynamic = {
        name: np.concatenate([year[name].values for year in years])
        for name in years[0]
        if "time" in years[0][name].dims
    }
    return dynamic | {name: years[0][name].values for name in ("elevation", "population")}


def test_prepare_takes_it_without_a_finding_and_keeps_every_value(demo, tmp_path):
    assert sorted(file.name for file in demo.iterdir()) == ["world_2018.nc", "world_2019.nc"]
    done = prepare(load_recipe([str(demo)]), tmp_path / "data", progress=False)
    assert json.loads((tmp_path / "data" / "report.json").read_text())["findings"] == []
    assert done.is_decided
    data = PreparedData(index_prepared(str(tmp_path / "data")))
    assert (len(data.times), data.step_hours, data.grid.shape) == (8 * 24, 1, (12, 16))
    assert data.static("population").max() > 1e5
    values = fields(demo)
    assert set(data.dynamic) | {"elevation", "population"} == set(values)
    for name in data.dynamic:  # the world runs from south to north
        np.testing.assert_array_equal(data.read(name, slice(None)), values[name][:, ::-1])


def test_values_are_plausible(demo):
    values = fields(demo)
    for name, low, high in (
        ("pm25", 0, 1000), ("pm10", 0, 1500), ("so2", 0, 500), ("no2", 0, 400), ("co", 100, 1e4), ("o3", 0, 300),
        ("temp", 230, 320), ("rh", 5, 100), ("psfc", 6e4, 1.06e5), ("u", -40, 40), ("v", -40, 40),
    ):  # fmt: skip
        assert low <= np.nanmin(values[name]), name
        assert np.nanmax(values[name]) <= high, name
    both = np.isfinite(values["pm25"]) & np.isfinite(values["pm10"])
    assert (values["pm25"][both] <= values["pm10"][both]).all()
    for name in POLLUTANTS:
        assert 0.01 < np.isnan(values[name]).mean() < 0.03
    assert all(np.isfinite(values[name]).all() for name in ("u", "v", "temp", "rh", "psfc"))


def test_temperature_humidity_and_pressure_fall_with_height_and_people_live_low(demo):
    values = fields(demo)
    high, low = values["elevation"] > 1200, values["elevation"] < 300
    assert high.any()
    for name in ("temp", "rh", "psfc"):
        assert values[name][:, high].mean() < values[name][:, low].mean()
    km_up = (values["elevation"][high].mean() - values["elevation"][low].mean()) / 1000
    cooling = values["temp"][:, low].mean() - values["temp"][:, high].mean()
    assert cooling == pytest.approx(6.5 * km_up, abs=1.5)
    assert values["population"][high].max() < 0.05 * values["population"].max()


def test_air_is_worse_in_towns(demo):
    values = fields(demo)
    town = values["population"] > 0.5 * values["population"].max()
    for name in ("pm25", "pm10", "no2", "co"):
        assert np.nanmean(values[name][:, town]) > 1.3 * np.nanmean(values[name])
    assert np.nanmean(values["o3"][:, town]) < np.nanmean(values["o3"])


def test_the_demo_config_asks_for_the_days_that_are_made_by_default():
    path = Path(__file__).parents[2] / "configs" / "demo.yaml"
    config = yaml.safe_load(path.read_text())["data"]
    days = [day for split in ("train", "validation", "test") for range_ in config[split] for day in range_]
    default_days = inspect.signature(make_demo_data).parameters["days"].default
    assert str(min(days)) == str(demo_world.START)[:10]
    assert str(max(days)) == str(demo_world.START + (24 * default_days - 1) * np.timedelta64(1, "h"))[:10]


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    contents = b"".join(str(path.relative_to(folder)).encode() + path.read_bytes() for path in files)
    return hashlib.sha256(contents).hexdigest()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_world(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_demo_data(tmp_path / name, days=1, grid=(8, 8), seed=seed, progress=False)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    first, second = fields(tmp_path / "a"), fields(tmp_path / "c")
    assert all((first[name] != second[name]).any() for name in ("elevation", "u", "pm25"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({"days": 0}, "--days 0"), ({"grid": (8, 7)}, "--grid 8x7"), ({"seed": -1}, "--seed -1")],
)
def test_numbers_that_cannot_be_used_are_refused(tmp_path, arguments, expected):
    with pytest.raises(ConfigError, match=expected):
        make_demo_data(tmp_path / "out", progress=False, **{"days": 1, "grid": (8, 8), "seed": 0} | arguments)
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="already exists"):
        make_demo_data(tmp_path, days=1, grid=(8, 8), seed=0, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
