"""The fingerprint of a data set: the same for the same data in any place and format."""

import os
import shutil

import numpy as np
import pytest

from topoflow.data.source import open_source

NAMES = ("u", "v", "pm25", "co", "elevation", "population")
KINDS = ("zarr2", "zarr2-plain", "zarr3", "zarr3-plain", "netcdf")


def suffix(kind):
    return ".nc" if kind == "netcdf" else ".zarr"


def fingerprint(path, names=NAMES, **options):
    return open_source(str(path), names, **options).fingerprint


def test_fingerprint_is_of_the_data_not_of_the_files(make_fields, write_store, tmp_path):
    dataset = make_fields()
    prints = {fingerprint(write_store(dataset, tmp_path / kind / f"any{suffix(kind)}", kind)) for kind in KINDS}
    path = write_store(dataset.transpose("lon", "time", "lat"), tmp_path / "moved.zarr")
    shutil.copytree(path, tmp_path / "copy.zarr")
    os.utime(tmp_path / "copy.zarr", (0, 0))
    prints |= {fingerprint(path), fingerprint(tmp_path / "copy.zarr", NAMES[::-1], in_memory=False)}
    parts = tmp_path / "parts"
    for part in range(2):
        write_store(dataset.isel(time=slice(24 * part, 24 * part + 24)), parts / f"data_201{part}.zarr")
    prints.add(fingerprint(parts))
    assert len(prints) == 1
    assert len(prints.pop()) == 64


def nudge(name, at):
    def change(dataset):
        dataset = dataset.copy(deep=True)
        dataset[name][at] = 7.0
        return dataset

    return change


@pytest.mark.parametrize(
    "change",
    [
        nudge("co", (0, 0, 0)),
        nudge("co", (24, 1, 2)),
        nudge("u", (47, 3, 5)),
        nudge("elevation", (2, 2)),
        nudge("population", (2, 2)),
        lambda d: d.assign_coords(lat=d.lat + 0.01),
        lambda d: d.assign_coords(time=d.time + np.timedelta64(1, "h")),
        lambda d: d.isel(time=slice(0, 47)),
        lambda d: d.assign(u=d.v, v=d.u),
    ],
)
def test_fingerprint_tells_data_apart(make_fields, write_store, tmp_path, change):
    first = fingerprint(write_store(make_fields(), tmp_path / "first.zarr"))
    assert fingerprint(write_store(change(make_fields()), tmp_path / "second.zarr")) != first
