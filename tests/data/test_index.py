"""The index that one process makes of the files and another reads with."""

import multiprocessing
import pickle
import shutil

import numpy as np
import pytest

from topoflow.data.source import index_source, open_indexed, open_source
from topoflow.errors import DataError

NAMES = ("u", "v", "pm25", "co", "elevation", "population")
KINDS = ("zarr2", "zarr2-plain", "zarr3", "zarr3-plain", "netcdf")


def read_all(indices):
    """Return every field of every index, and its fingerprint as seen by this process."""
    sources = [open_indexed(index, in_memory=False) for index in indices]
    return [({n: s.read(n, slice(None)) for n in s.dynamic}, s.compute_fingerprint(), s.fingerprint) for s in sources]


def test_another_process_reads_the_same_with_an_index_that_it_is_sent(make_fields, write_store, tmp_path):
    indices = []
    for kind in KINDS:
        path = tmp_path / kind / ("data_2019.nc" if kind == "netcdf" else "data_2019.zarr")
        indices.append(index_source(str(write_store(make_fields(), path, kind)), NAMES))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        read = pool.apply(read_all, (indices,))
    for (fields, seen, fingerprint), kind in zip(read, KINDS, strict=True):
        assert seen == fingerprint == indices[0].fingerprint, kind
        for name, values in fields.items():
            np.testing.assert_array_equal(values, make_fields()[name].values)


def test_an_index_holds_each_static_field_once(make_fields, write_store, tmp_path):
    shape = (60, 80)
    paths = [tmp_path / "data" / f"data_{year}.zarr" for year in (2018, 2019)]
    for path in paths:
        write_store(make_fields(start=f"{path.stem[-4:]}-01-01", hours=3, shape=shape), path)
    index = index_source(str(tmp_path / "data"), NAMES)
    of_grid = len(pickle.dumps(index.grid))
    assert of_grid > 2 * 60 * 80 * (8 + 4)  # coordinates and static fields
    assert len(pickle.dumps(index)) < of_grid + 40_000


def test_the_fingerprint_is_of_what_this_process_sees(make_fields, write_store, tmp_path):
    path = write_store(make_fields(), tmp_path / "data_2019.zarr")
    index = index_source(str(path), NAMES)
    shutil.rmtree(path)
    write_store(make_fields(seed=5), path)
    for in_memory in (True, False):
        source = open_indexed(index, in_memory)
        assert source.fingerprint == index.fingerprint
        assert source.compute_fingerprint() == open_source(str(path), NAMES).fingerprint != index.fingerprint


@pytest.mark.parametrize("kind", ["zarr3", "netcdf"])
def test_a_store_that_is_not_here_is_refused_and_not_read_as_missing_values(make_fields, write_store, tmp_path, kind):
    path = write_store(make_fields(), tmp_path / f"data_2019.{'nc' if kind == 'netcdf' else 'zarr'}", kind)
    index = index_source(str(path), NAMES)
    path.rename(tmp_path / "elsewhere")
    source = open_indexed(index, in_memory=False)
    with pytest.raises(DataError, match=f"{path} does not exist on this machine"):
        source.read("u", [0])
    with pytest.raises(DataError, match=f"{path} does not exist on this machine"):
        source.snapshot(("u",), 0)
