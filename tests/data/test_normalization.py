"""Compare constants with plain numpy in float64."""

import numpy as np
import pytest
import torch

from tests.support.prepared import write_prepared
from topoflow.data.normalization import Normalization, compute_normalization, configured_normalization
from topoflow.data.prepared.reader import PreparedData, index_prepared
from topoflow.errors import ConfigError, DataError

NAMES = ("u", "co", "elevation", "lat2d", "hour_sin", "available")
TRAIN = np.r_[3:20, 30:44]


@pytest.fixture
def fields(make_fields):
    dataset = make_fields(hours=60)
    dataset["co"] = dataset.co * 1e-3 + 101325  # a mean far above the spread
    dataset.co.attrs["units"] = "ug m-3"
    return dataset


def open_prepared(dataset, path):
    return PreparedData(index_prepared(str(write_prepared(dataset, path))))


def normalization_of(dataset, path):
    return compute_normalization(open_prepared(dataset, path), NAMES, TRAIN)


@pytest.mark.parametrize("hours_of_block", [1, 7, 1000])
def test_constants_are_those_of_the_training_hours(fields, tmp_path, monkeypatch, hours_of_block):
    monkeypatch.setattr("topoflow.data.normalization._BLOCK_BYTES", hours_of_block * 4 * 24)
    found = normalization_of(fields, tmp_path / "data")
    for name in ("u", "co"):
        values = fields[name].values[TRAIN].astype(np.float64)
        assert found.mean[name] == pytest.approx(np.nanmean(values), rel=1e-12)
        assert found.std[name] == pytest.approx(np.nanstd(values), rel=1e-9)
    for name, values in (("elevation", fields.elevation.values), ("lat2d", np.repeat(fields.lat.values, 6))):
        assert found.mean[name] == pytest.approx(values.astype(np.float64).mean(), rel=1e-6)
        assert found.std[name] == pytest.approx(values.astype(np.float64).std(), rel=1e-6)
    for name in ("hour_sin", "available"):
        assert (found.mean[name], found.std[name]) == (0, 1)


def test_hours_outside_the_training_split_do_not_count(fields, tmp_path):
    before = normalization_of(fields, tmp_path / "before")
    others = np.setdiff1d(np.arange(60), TRAIN)
    fields.u[others] = 1e6
    assert normalization_of(fields, tmp_path / "after") == before


@pytest.mark.parametrize("hours", [np.arange(60), TRAIN, np.r_[0:24, 36:48], np.arange(24, 48)])
def test_known_moments_of_days_give_the_bits_of_reading_them(fields, tmp_path, monkeypatch, hours):
    known, read = open_prepared(fields, tmp_path / "known"), open_prepared(fields, tmp_path / "read")
    monkeypatch.setattr(read, "moments_of_day", lambda name, piece: None)
    found, expected = (compute_normalization(source, NAMES, hours) for source in (known, read))
    assert found.fingerprint == expected.fingerprint


def test_only_partial_days_are_read(fields, tmp_path, monkeypatch):
    source = open_prepared(fields, tmp_path / "data")
    read = []
    monkeypatch.setattr(
        source, "read", lambda name, indices: read.append(list(indices)) or type(source).read(source, name, indices)
    )
    compute_normalization(source, NAMES, np.arange(60))
    assert read == []
    compute_normalization(source, NAMES, np.r_[0:24, 30:60])
    assert all(set(range(30, 48)) <= set(hours) and not {*range(24)} & set(hours) for hours in read)
    assert len(read) == 2


def test_variables_that_cannot_be_normalized_are_named(fields, tmp_path):
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
            normalization_of(dataset, tmp_path / label)


def test_normalize_and_back():
    constants = Normalization({"co": 200.0}, {"co": 100.0})
    for values in (np.array([200, 300, 50], np.float32), torch.tensor([200.0, 300.0, 50.0])):
        normalized = constants.normalize("co", values)
        assert normalized.dtype == values.dtype
        assert normalized.tolist() == [0.0, 1.0, -1.5]
        assert constants.denormalize("co", normalized).tolist() == [200.0, 300.0, 50.0]


def test_dictionary_form_is_exact(fields, tmp_path):
    found = normalization_of(fields, tmp_path / "data")
    again = Normalization.from_dict(found.to_dict())
    assert again == found
    assert again.fingerprint == found.fingerprint
    other = Normalization({**found.mean, "u": np.nextafter(found.mean["u"], 1e9).item()}, found.std)
    assert other.fingerprint != found.fingerprint


def test_constants_from_the_config():
    given = {"u": (0.0, 10.0), "co": (200.0, 100.0), "temp": (273.15, 30.0)}
    found = configured_normalization(given, ("u", "co", "hour_cos"))
    assert found.to_dict() == {"u": [0, 10], "co": [200, 100], "hour_cos": [0, 1]}
    with pytest.raises(ConfigError, match=r"data.normalization: no constants for o3, elevation"):
        configured_normalization(given, ("u", "o3", "elevation", "hour_sin"))
    with pytest.raises(ConfigError, match=r"data.normalization: wind: expected names"):
        configured_normalization(given | {"wind": (0, 1)}, ("u",))
    with pytest.raises(ConfigError, match=r"data.normalization: hour_sin: expected names"):
        configured_normalization(given | {"hour_sin": (0, 2)}, ("u",))
    own = configured_normalization(
        {name: tuple(pair) for name, pair in found.to_dict().items()}, ("u", "co", "hour_cos")
    )
    assert own == found  # the constants of a checkpoint
