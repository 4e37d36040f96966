"""The cache of normalization constants: found again bit for bit, or not at all."""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from topoflow.config import NOTHING
from topoflow.config_io import alters_of
from topoflow.data.assembly import open_forecast_data
from topoflow.tools.prepare.packing import PackOptions, pack


@pytest.fixture
def folder(make_fields, write_store, tmp_path):
    write_store(make_fields(hours=72), tmp_path / "data" / "data_2019.zarr")
    return tmp_path / "data"


@pytest.fixture
def open_counted(make_config, tmp_path):
    """Open data from disk; return them with the list of names that `read` is called with."""

    def opened(path, **changes):
        options = {"in_memory": False, "cache": str(tmp_path / "cache"), **changes}
        data = open_forecast_data(make_config(path, **options), True, True)
        read, reads = data.source.read, []
        data.source.read = lambda name, indices: reads.append(name) or read(name, indices)
        return data, reads

    return opened


def entries(tmp_path):
    return list((tmp_path / "cache").glob("*.json"))


def test_the_data_are_read_once_for_all_runs(folder, open_counted, tmp_path):
    data, reads = open_counted(folder)
    first = data.build_normalization()
    assert sorted(reads) == ["co", "pm25", "u", "v"]  # each variable once
    data, reads = open_counted(folder)
    assert data.build_normalization() == first
    assert reads == []
    assert len(entries(tmp_path)) == 1


@pytest.mark.parametrize(
    "changes", [{"train": (("2019-01-01", "2019-01-02"),)}, {"variables": ("u", "pm25", "co", "elevation")}]
)
def test_other_hours_or_names_are_another_entry(folder, open_counted, tmp_path, changes):
    open_counted(folder)[0].build_normalization()
    data, reads = open_counted(folder, **changes)
    data.build_normalization()
    assert reads
    assert len(entries(tmp_path)) == 2


@pytest.mark.parametrize("kind", ["zarr2", "zarr3", "netcdf"])
def test_files_that_were_written_again_are_read_again(make_fields, write_store, open_counted, tmp_path, kind):
    path = tmp_path / "data" / f"data_2019.{'nc' if kind == 'netcdf' else 'zarr'}"
    dataset = make_fields(hours=72)
    write_store(dataset, path, kind)
    data, _ = open_counted(path.parent)
    first = data.build_normalization()
    data.source.close()
    dataset.u[5] += 3  # an hour that the fingerprint does not cover
    path.unlink() if kind == "netcdf" else shutil.rmtree(path)
    write_store(dataset, path, kind)
    data, reads = open_counted(path.parent)
    assert data.build_normalization() != first
    assert reads


def test_a_touched_chunk_folder_is_enough(folder, open_counted):
    open_counted(folder)[0].build_normalization()
    os.utime(folder / "data_2019.zarr" / "u" / "c", (1, 1))
    data, reads = open_counted(folder)
    data.build_normalization()
    assert reads


@pytest.mark.parametrize("harm", ["{", "[]", "{}", '{"pairs": 3, "fingerprint": ""}', "a digit", "binary"])
def test_a_damaged_entry_counts_as_missing(folder, open_counted, tmp_path, harm):
    first = open_counted(folder)[0].build_normalization()
    (entry,) = entries(tmp_path)
    if harm == "a digit":
        content = json.loads(entry.read_text())
        mean = content["pairs"]["u"][0]
        content["pairs"]["u"][0] = mean.replace(mean[8], "7" if mean[8] != "7" else "8", 1)
        entry.write_text(json.dumps(content))
    elif harm == "binary":
        entry.write_bytes(bytes(range(256)))
    else:
        entry.write_text(harm)
    data, reads = open_counted(folder)
    assert data.build_normalization() == first
    assert reads
    data, reads = open_counted(folder)  # and it was replaced
    assert data.build_normalization() == first
    assert not reads


def test_a_cache_that_cannot_be_written_is_a_warning(folder, open_counted, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        data, _ = open_counted(folder, cache=str(tmp_path / "file" / "cache"))
        data.build_normalization()
    assert "data.cache: " in caplog.text
    assert len(caplog.records) == 1


def test_the_default_is_in_the_home_of_the_user(folder, open_counted, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    open_counted(folder, cache=None)[0].build_normalization()
    assert len(list((tmp_path / "home" / ".cache" / "topoflow").iterdir())) == 1

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    open_counted(folder, cache=None)[0].build_normalization()


def test_packed_data_need_no_cache(folder, open_counted, tmp_path):
    pack(str(folder), tmp_path / "packed", PackOptions(), progress=False)
    plain, _ = open_counted(folder)
    packed, reads = open_counted(tmp_path / "packed")
    assert packed.build_normalization() == plain.build_normalization()
    assert reads == []
    assert len(entries(tmp_path)) == 1


def test_the_cache_may_change_on_resume():
    assert alters_of("data.cache") == NOTHING


def test_the_same_hours_of_other_data_are_another_entry(folder, make_fields, write_store, open_counted, tmp_path):
    first = open_counted(folder)[0].build_normalization()
    write_store(make_fields(hours=72, seed=9), tmp_path / "other" / "data_2019.zarr")
    other = open_counted(tmp_path / "other")[0].build_normalization()
    assert other != first
    assert not np.isnan(list(other.mean.values())).any()
