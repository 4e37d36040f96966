"""Prepared data sets for tests: of arrays that a test chose, or of the demo world."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from topoflow.tools.demo.world import make_demo_data
from topoflow.tools.prepare.command import load_recipe, prepare
from topoflow.tools.prepare.writing import write


def prepare_world(
    folder: Path,
    days: int,
    grid: tuple[int, int] = (8, 12),
    seed: int = 0,
    mask: np.ndarray | None = None,
    forecasts: Path | None = None,
) -> Path:
    """Simulate the demo world, prepare it as `folder`, and return that; `forecasts`: folder of those of its weather."""
    raw = folder.with_name(f"{folder.name}-raw")
    issued = None if forecasts is None else forecasts.with_name(f"{forecasts.name}-raw")
    make_demo_data(raw, days=days, grid=grid, seed=seed, progress=False, forecasts=issued)
    if forecasts is not None:
        assert prepare(load_recipe([f"{issued}/recipe.yaml"]), forecasts, progress=False).is_decided
    recipe = load_recipe([str(raw)])
    if mask is not None:
        np.save(raw.with_suffix(".npy"), mask)
        recipe = dataclasses.replace(recipe, mask=str(raw.with_suffix(".npy")))
    assert prepare(recipe, folder, progress=False).is_decided
    return folder


@dataclass
class _Fields:
    """The variables over (time, lat, lon) of a Dataset, as `prepare` hands them to its writer."""

    dataset: xr.Dataset
    step_hours: int

    def __post_init__(self):
        dynamic = [str(name) for name, values in self.dataset.data_vars.items() if "time" in values.dims]
        self.units: Mapping[str, str] = {name: self.dataset[name].attrs["units"] for name in dynamic}
        self.times = self.dataset.time.values.astype("datetime64[h]")
        self.shape = (self.dataset.sizes["lat"], self.dataset.sizes["lon"])
        self.is_decided = True

    def fields(self, positions: np.ndarray) -> np.ndarray:
        return np.stack([self.dataset[name].values[positions] for name in self.units], axis=1).astype(np.float32)

    def days(self, pieces: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, int]]]:
        for piece in pieces:
            yield piece, self.fields(piece), {}

    def file_states(self, first: int, stop: int) -> list[str]:
        return [str(self.times[position]) for position in range(first, stop)]

    def seen(self) -> list:
        return []

    def recall(self, seen: list) -> None:
        pass

    def finish(self) -> None:
        pass


def write_prepared(
    dataset: xr.Dataset, folder: Path, dtype: str = "float32", mask: np.ndarray | None = None, step_hours: int = 1
) -> Path:
    """Write a Dataset over time, lat (north first) and lon, with units, as prepared data; return `folder`."""
    lat2d, lon2d = np.meshgrid(dataset.lat.values, dataset.lon.values, indexing="ij")
    statics = {"lat2d": lat2d, "lon2d": lon2d}
    statics |= {
        str(name): values.values.astype(np.float32)
        for name, values in dataset.data_vars.items()
        if values.dims == ("lat", "lon")
    }
    if mask is not None:
        statics["mask"] = mask
    write(_Fields(dataset, step_hours), statics, {"dtype": dtype}, lambda before: {}, folder, progress=False)
    return folder
