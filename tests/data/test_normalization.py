"""Compare constants with plain numpy in float64."""

import numpy as np
import pytest
import torch

from topoflow.data.normalization import Normalization, compute_normalization, configured_normalization
from topoflow.data.source import open_source
from topoflow.errors import ConfigError, DataError
from topoflow.tools.prepare.packing import PackOptions, pack

NAMES = ("u", "co", "elevation", "lat2d", "hour_sin", "available")
TRAIN = np.r_[3:20, 30:44]


@pytest.fixture
def fields(make_fields):
    dataset = make_fields(hours=60)
    dataset["co"] = dataset.co * 1e-3 + 101325  # a mean far above the spread
    dataset.co.attrs["units"] = "ug m-3"
    return dataset


def normalization_of(dataset, write_store, path, in_memory=True, names=NAMES):
    write_store(dataset, path / "data_2019.zarr")
    return compute_normalization(open_source(str(path), names, in_memory), names, TRAIN)


@pytest.mark.parametrize("hours_of_block", [1, 7, 1000])
def test_constants_are_those_of_the_training_hours(fields, write_store, tmp_path, monkeypatch, hours_of_block):
    monkeypatch.setattr("topoflow.data.normalization.BLOCK_BYTES", hours_of_block * 4 * 24)
    found = normalization_of(fields, write_store, tmp_path)
    for name in ("u", "co"):
        values = fields[name].values[TRAIN].astype(np.float64)
        assert found.mean[name] == pytest.approx(np.nanmean(values), rel=1e-12)
        assert found.std[name] == pytest.approx(np.nanstd(values), rel=1e-9)
    for name, values in (("elevation", fields.elevation.values), ("lat2d", np.repeat(fields.lat.values, 6))):
        assert found.mean[name] == pytest.approx(values.astype(np.float64).mean(), rel=1e-6)
        assert found.std[name] == pytest.approx(values.astype(np.float64).std(), rel=1e-6)
    for name in ("hour_sin", "available"):
        assert (found.mean[name], found.std[name]) == (0, 1)


def test_hours_outside_the_training_split_do_not_count(fields, write_store, tmp_path):
    before = normalization_of(fields, write_store, tmp_path / "before")
    others = np.setdiff1d(np.arange(60), TRAIN)
    fields.u[others] = 1e6
    assert normalization_of(fields, write_store, tmp_path / "after") == before


def test_in_memory_or_not_gives_the_same_bits(fields, write_store, tmp_path):
    lazy = normalization_of(fields, write_store, tmp_path / "lazy", in_memory=False)
    held = normalization_of(fields, write_store, tmp_path / "held", in_memory=True)
    assert lazy == held
    assert lazy.fingerprint == held.fingerprint


def ways_to_hold(dataset, write_store, path):
    """Return the same data as Zarr, NetCDF, in memory and packed."""
    write_store(dataset, path / "zarr" / "data_2019.zarr")
    write_store(dataset, path / "netcdf" / "data_2019.nc", "netcdf")
    pack(str(path / "zarr"), path / "packed", PackOptions(), progress=False)
    return {
        "zarr": open_source(str(path / "zarr"), NAMES, in_memory=False),
        "netcdf": open_source(str(path / "netcdf"), NAMES, in_memory=False),
        "memory": open_source(str(path / "zarr"), NAMES, in_memory=True),
        "packed": open_source(str(path / "packed"), NAMES, in_memory=False),
        "packed, in memory": open_source(str(path / "packed"), NAMES, in_memory=True),
    }


@pytest.mark.parametrize("hours", [np.arange(60), TRAIN, np.r_[0:24, 36:48], np.arange(24, 48)])
def test_every_format_gives_the_same_bits(fields, write_store, tmp_path, hours):
    sources = ways_to_hold(fields, write_store, tmp_path)
    found = {way: compute_normalization(source, NAMES, hours).fingerprint for way, source in sources.items()}
    assert len(set(found.values())) == 1, found


def test_of_packed_data_only_partial_days_are_read(fields, write_store, tmp_path, monkeypatch):
    source = ways_to_hold(fields, write_store, tmp_path)["packed"]
    read = []
    monkeypatch.setattr(
        source, "read", lambda name, indices: read.append(list(indices)) or type(source).read(source, name, indices)
    )
    compute_normalization(source, NAMES, np.arange(60))
    assert read == []
    compute_normalization(source, NAMES, np.r_[0:24, 30:60])
    assert all(set(range(30, 48)) <= set(hours) and not {*range(24)} & set(hours) for hours in read)
    assert len(read) == 2


def test_variables_that_cannot_be_normalized_are_named(fields, write_store, tmp_path):
    constant, empty, flat = fields.copy(deep=True), fields.copy(deep=True), fields.copy(deep=True)
    constant.u[TRAIN] = np.float32(0.1)
    empty.co[TRAIN] = np.nan
    flat.elevation[:] = 0.0
    for label, dataset, message in (
        ("constant", constant, "'u' is 0.1 throughout"),
        ("empty", empty, "'co' has no value"),
        ("flat", flat, "'elevation' is 0 throughout"),
    ):
        with pytest.raises(DataError, match=message):
            normalization_of(dataset, write_store, tmp_path / label)


def test_normalize_and_back():
    constants = Normalization({"co": 200.0}, {"co": 100.0})
    for values in (np.array([200, 300, 50], np.float32), torch.tensor([200.0, 300.0, 50.0])):
        normalized = constants.normalize("co", values)
        assert normalized.dtype == values.dtype
        assert normalized.tolist() == [0.0, 1.0, -1.5]
        assert constants.denormalize("co", normalized).tolist() == [200.0, 300.0, 50.0]


def test_dictionary_form_is_exact(fields, write_store, tmp_path):
    found = normalization_of(fields, write_store, tmp_path)
    again = Normalization.from_dict(found.to_dict())
    assert again == found
    assert again.fingerprint == found.fingerprint
    found.mean["u"] = np.nextafter(found.mean["u"], 1e9).item()
    assert again.fingerprint != found.fingerprint


def test_constants_from_the_config():
    given = {"u": (0.0, 10.0), "co": (200.0, 100.0), "temp": (273.15, 30.0)}
    found = configured_normalization(given, ("u", "co", "hour_cos"))
    assert found.to_dict() == {"u": [0, 10], "co": [200, 100], "hour_cos": [0, 1]}
    with pytest.raises(ConfigError, match=r"data.normalization: no constants for o3, elevation"):
        configured_normalization(given, ("u", "o3", "elevation", "hour_sin"))
    with pytest.raises(ConfigError, match=r"data.normalization: wind: expected names"):
        configured_normalization(given | {"wind": (0, 1)}, ("u",))
    with pytest.raises(ConfigError, match=r"data.normalization: hour_sin: expected names"):
        configured_normalization(given | {"hour_sin": (0, 1)}, ("u",))
