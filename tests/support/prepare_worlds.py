"""Small gridded data sets for the tests of `topoflow prepare`, and what it makes of them."""

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import yaml

from topoflow.data.prepared.reader import PreparedData, index_prepared
from topoflow.tools.prepare.command import Prepared, prepare
from topoflow.tools.prepare.recipe import read_recipe


def gridded(hours: int = 48, shape: tuple[int, int] = (8, 8), **units: str) -> xr.Dataset:
    """Return noise around 40, south first; units: {name: unit}, by default pm25 in ug m-3."""
    draw = np.random.default_rng(0)
    time = np.datetime64("2019-01-01", "ns") + np.arange(hours) * np.timedelta64(1, "h")
    lat, lon = np.linspace(30.0, 37.0, shape[0]), np.linspace(110.0, 117.0, shape[1])
    coords = {"lat": ("lat", lat, {"units": "degrees_north"}), "lon": ("lon", lon, {"units": "degrees_east"})}
    dataset = xr.Dataset(coords={"time": time, **coords})
    for name, unit in (units or {"pm25": "ug m-3"}).items():
        values = 40 + 5 * draw.standard_normal((hours, *shape))
        dataset[name] = (("time", "lat", "lon"), values.astype("f4"), {"units": unit})
    return dataset


def prepare_recipe(folder: Path, recipe: dict[str, Any]) -> tuple[Prepared, PreparedData | None]:
    """Write a recipe and prepare it in folder/out; return what was done, and the data where all was decided."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    done = prepare(read_recipe(path), folder / "out", progress=False)
    return done, PreparedData(index_prepared(str(folder / "out"))) if done.is_decided else None


def prepare_paths(folder: Path, *paths: str, **recipe: Any) -> tuple[Prepared, PreparedData | None]:
    """Prepare files of `folder` with the further keys of a recipe."""
    return prepare_recipe(folder, {"sources": [{"path": list(paths)}], **recipe})
