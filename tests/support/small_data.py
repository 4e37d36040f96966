"""A few days of small fields in files, prepared, and what is compared of the result."""

import dataclasses
import json

import numpy as np
import xarray as xr

from topoflow.data.prepared.reader import PreparedData, index_prepared
from topoflow.tools.prepare.command import prepare
from topoflow.tools.prepare.recipe import recipe_of_paths
from topoflow.tools.prepare.verification import verify

UNITS = {"u": "m s-1", "psfc": "Pa", "pm25": "ug m-3", "co": "ug m-3"}
MEAN_AND_SPREAD = {"u": (0.0, 4.0), "psfc": (90000.0, 500.0), "pm25": (60.0, 9.0), "co": (900.0, 90.0)}
HOURS = 150


def small_fields():
    """Fields from the end of 2018 to the beginning of 2019, with a gap and a cell without values."""
    draw = np.random.default_rng(0)
    time = np.datetime64("2018-12-29T05", "ns") + np.arange(HOURS) * np.timedelta64(1, "h")
    lat = ("lat", np.linspace(36.0, 30.0, 4), {"units": "degrees_north"})
    lon = ("lon", np.linspace(110.0, 115.0, 6), {"units": "degrees_east"})
    dataset = xr.Dataset(coords={"time": time, "lat": lat, "lon": lon})
    for name, unit in UNITS.items():
        values = draw.normal(*MEAN_AND_SPREAD[name], (HOURS, 4, 6)).astype("f4")
        values[40, 1, 2] = np.nan
        dataset[name] = (("time", "lat", "lon"), values, {"units": unit})
    dataset["elevation"] = (("lat", "lon"), draw.uniform(1, 2000, (4, 6)).astype("f4"), {"units": "m"})
    return dataset.isel(time=np.r_[:20, 23:HOURS])


def run(source, output, **changes):
    done = prepare(dataclasses.replace(recipe_of_paths([str(source)]), **changes), output, progress=False)
    assert done.is_decided, done.lines


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def data_of(folder):
    """All that must be the same for the same data, however they came there: not the provenance, nor names of files."""
    found = {}
    manifest = json.loads((folder / "manifest.json").read_text())
    for year in manifest["years"]:
        found[year["year"]] = [(folder / year[key]["name"]).read_bytes() for key in ("array", "days")]
        for key in ("array", "days", "source_files"):
            del year[key]
    del manifest["provenance"], manifest["manifest_sha256"]
    return found, manifest, (folder / "static.npz").read_bytes()


def states(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def read(folder, name):
    data = PreparedData(index_prepared(str(folder)))
    return data.read(name, slice(None))


def damage_of(folder):
    return verify(folder, progress=False)[1]


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def change(files, fields):
    changed = fields.isel(time=fields["time.year"] == 2018).copy(deep=True)
    changed["u"] += 1
    changed.to_netcdf(files / "next.nc")
    (files / "next.nc").rename(files / "2018.nc")
