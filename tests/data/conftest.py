"""Small prepared data sets."""

import numpy as np
import pytest
import xarray as xr

from topoflow.config import DataConfig

UNITS = {
    "u": "m s-1", "v": "m s-1", "temp": "K", "rh": "%", "psfc": "Pa", "pm25": "ug m-3", "pm10": "ug m-3",
    "so2": "ug m-3", "no2": "ug m-3", "co": "ug m-3", "o3": "ug m-3", "elevation": "m", "population": "1",
}  # fmt: skip


def _make_fields(names=("u", "v", "pm25", "co"), start="2019-01-01", hours=48, shape=(4, 6), seed=0, step_hours=1):
    """Return a Dataset with random fields (10 % NaN), elevation and population on a regular grid, north first."""
    rng = np.random.default_rng(seed)
    coords = {
        "time": np.datetime64(start, "ns") + np.arange(hours) * np.timedelta64(step_hours, "h"),
        "lat": np.linspace(50, 20, shape[0]),
        "lon": np.linspace(80, 130, shape[1]),
    }
    dataset = xr.Dataset(coords=coords)
    for name in names:
        values = (10 * rng.standard_normal((hours, *shape)) + 50).astype(np.float32)
        values[rng.random(values.shape) < 0.1] = np.nan
        dataset[name] = (("time", "lat", "lon"), values, {"units": UNITS[name]})
    static = np.random.default_rng(99)
    for name in ("elevation", "population"):
        dataset[name] = (("lat", "lon"), static.uniform(0, 3000, shape).astype(np.float32), {"units": UNITS[name]})
    return dataset


def _make_config(path, **changes):
    """Return a data section over the fields of `make_fields`."""
    defaults = {
        "train": (("2019-01-01", "2019-01-01"),),
        "variables": ("u", "v", "pm25", "co", "elevation", "population"),
        "targets": ("pm25", "co"),
        "lead_times_hours": (1, 3),
        "threads": 0,
    }
    return DataConfig(path=str(path), **{**defaults, **changes})


@pytest.fixture
def make_fields():
    return _make_fields


@pytest.fixture
def make_config():
    return _make_config
