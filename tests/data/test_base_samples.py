"""Samples of a run with a base: targets are differences from its forecast, and inputs may be anomalies."""

import numpy as np
import pytest
import torch
import xarray as xr

from tests.support.prepared import write_prepared
from topoflow.config import DataConfig
from topoflow.data.anomalies import PresentAnomalies
from topoflow.data.dataset import ForecastDataset
from topoflow.data.normalization import Normalization
from topoflow.data.prepared.reader import PreparedData, index_prepared
from topoflow.errors import ConfigError
from topoflow.physics.climatology import ANNUAL_TERMS
from topoflow.physics.persistence import DampedPersistence

HOURS, SHAPE, LEADS = 60, (2, 3), (6, 12)
TARGETS = ("o3", "pm25")
NAMES = ("pm25", "u", "o3")  # as they lie in the data
CONSTANTS = Normalization(dict.fromkeys((*NAMES, "available"), 7.0), dict.fromkeys((*NAMES, "available"), 3.0))


class Linear:
    """A base that anybody can compute: usual values grow by the hour, and half of the anomaly lasts a lead."""

    deviation = np.array([4.0, 5.0])
    known = np.ones(SHAPE, bool)
    lead_times_hours = np.array(LEADS, np.float32)

    def usual(self, time):
        return np.stack([np.full(SHAPE, level + hours_of(time)) for level in (100, 50)]).astype(np.float32)

    def usual_at_places(self, times, places):
        return np.array([self.usual(time).ravel()[places] for time in times]).reshape(len(times), len(places))

    def forecasts_from(self, source, targets, starts, in_training, on_progress):
        self.times = source.times
        return self

    def forecast(self, start, lead, anomaly):
        target = self.times[start] + np.timedelta64(LEADS[lead], "h")
        return self.usual(target) + np.float32(0.5 ** (lead + 1)) * anomaly

    def arrays(self):
        return {}


def hours_of(time):
    return int((time - np.datetime64("2019-03-01T00", "h")) / np.timedelta64(1, "h"))


@pytest.fixture
def fields():
    rng = np.random.default_rng(4)
    coords = {
        "time": np.datetime64("2019-03-01", "ns") + np.arange(HOURS) * np.timedelta64(1, "h"),
        "lat": [40.0, 39.0],
        "lon": [100.0, 101.0, 102.0],
    }
    dataset = xr.Dataset(coords=coords)
    for name in NAMES:
        values = rng.uniform(20, 200, (HOURS, *SHAPE)).astype(np.float32)
        values[rng.random(values.shape) < 0.3] = np.nan
        dataset[name] = (("time", "lat", "lon"), values, {"units": "m s-1" if name == "u" else "ug m-3"})
    dataset.o3[20:40, 0, 0] = np.nan  # longer than a present value is replaced
    return dataset


@pytest.fixture
def build(fields, tmp_path):
    folder = write_prepared(fields, tmp_path / "data")

    def build_dataset(starts, joint=False, **changes):
        settings = {"train": (2019,), "variables": NAMES, "targets": TARGETS, "lead_times_hours": LEADS, **changes}
        config = DataConfig(path=str(folder), **settings)
        normalization = Normalization(CONSTANTS.mean, CONSTANTS.std, Linear())
        data = PreparedData(index_prepared(str(folder)))
        return ForecastDataset(data, normalization, np.array(starts), config, with_wind=False, joint=joint)

    return build_dataset


def present_anomaly(fields, name, start, cell):
    """The anomaly at the start or, where it is missing, the mean over those of the 12 hours before, or 0."""
    level = {"o3": 100, "pm25": 50}[name]
    anomalies = fields[name].values[:, *cell].astype(np.float64) - level - np.arange(HOURS)
    if not np.isnan(anomalies[start]):
        return anomalies[start]
    recent = anomalies[max(0, start - 12) : start]
    return np.nanmean(recent) if np.isfinite(recent).any() else 0.0


@pytest.mark.parametrize("start", [0, 5, 35, 39])
def test_targets_are_differences_from_the_base(build, fields, start):
    dataset = build([start])
    for k, lead in enumerate(LEADS):
        sample = dataset[k]
        for t, name in enumerate(TARGETS):
            level = (100, 50)[t] + start + lead
            for cell in np.ndindex(SHAPE):
                observed = float(fields[name].values[start + lead][cell])
                assert sample["valid"][t][cell] == (not np.isnan(observed))
                base = level + 0.5 ** (k + 1) * present_anomaly(fields, name, start, cell)
                expected = 0.0 if np.isnan(observed) else (observed - base) / (4.0, 5.0)[t]
                assert sample["y"][t][cell].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("start", "hours"), [(0, 0), (30, 12), (43, 4), (41, 3), (50, 11)])
def test_a_missing_present_value_is_the_mean_anomaly_of_the_hours_before(fields, tmp_path, start, hours):
    """Over a seasonal climatology, in float64; nine hours are missing after position 38."""
    fields = fields.isel(time=[*range(39), *range(48, HOURS)])
    data = PreparedData(index_prepared(str(write_prepared(fields, tmp_path / "data"))))
    rng = np.random.default_rng(3)
    terms = rng.standard_normal((len(TARGETS), 24 + ANNUAL_TERMS, *SHAPE)).astype(np.float32)
    arrays = {"hourly": 50 + terms[:, :24], "annual": terms[:, 24:], "slope": np.ones((len(TARGETS), 2, *SHAPE))}
    arrays |= {"filled": np.zeros_like(terms), "squares": np.ones((len(TARGETS), 2)), "lead_times_hours": LEADS}
    base = DampedPersistence.from_arrays(arrays)
    found = PresentAnomalies(data, TARGETS, base).at(start)
    values = np.stack([fields[name].values for name in TARGETS], axis=1).astype(np.float64)
    usual = np.stack([base.climatology.hourly[:, hour % 24] for hour in fields.time.dt.hour.values])
    angle = 2 * np.pi * ((fields.time - np.datetime64("2019-01-01")) / np.timedelta64(1, "D")).values / 365.25
    turn = 2 * np.pi * fields.time.dt.hour.values / 24
    of_day = [1 + 0 * turn, np.cos(turn), np.sin(turn), np.cos(2 * turn), np.sin(2 * turn)]
    of_year = [np.cos(angle), np.sin(angle), np.cos(2 * angle), np.sin(2 * angle)]
    factors = np.stack([year * day for year in of_year for day in of_day], axis=1)
    anomalies = values - usual - np.einsum("nk,tkyx->ntyx", factors, base.climatology.annual.astype(np.float64))
    recent = anomalies[start - hours : start]
    count = np.isfinite(recent).sum(axis=0)
    expected = np.where(np.isnan(anomalies[start]), np.nansum(recent, axis=0) / np.maximum(count, 1), anomalies[start])
    assert np.isnan(anomalies[start]).any()
    assert found == pytest.approx(expected, abs=2e-4)


def test_inputs_are_normalized_as_ever_unless_anomalies_are_asked_for(build, fields):
    x = build([39])[0]["x"].numpy()
    assert x == pytest.approx(np.nan_to_num((np.stack([fields[n].values[39] for n in NAMES]) - 7) / 3), abs=1e-5)


def test_inputs_as_anomalies(build, fields):
    dataset = build([39], anomalies=True, availability=True, hours={"pm25": (-24, 0), "u": (0, 6)})
    assert dataset.input_names == ("pm25-24h", "pm25", "u", "u+6h", "o3", "available")
    x = dataset[0]["x"].numpy()
    earlier = (fields.pm25.values[15] - 50 - 15) / 5
    assert x[0] == pytest.approx(np.nan_to_num(earlier), abs=1e-4)
    for row, name, deviation in ((1, "pm25", 5), (4, "o3", 4)):
        expected = [present_anomaly(fields, name, 39, cell) / deviation for cell in np.ndindex(SHAPE)]
        assert x[row].ravel() == pytest.approx(expected, abs=1e-4)
    for row, hour in ((2, 39), (3, 45)):  # weather is no anomaly
        assert x[row] == pytest.approx(np.nan_to_num((fields.u.values[hour] - 7) / 3), abs=1e-5)
    read = [fields.pm25.values[15], *(fields[name].values[39] for name in NAMES), fields.u.values[45]]
    assert x[5] == pytest.approx(1 - np.isnan(read).mean(axis=0), abs=1e-6)


def test_denormalized_targets_are_the_observations(build, fields):
    dataset = build([3, 30])
    batch = dataset.batch(range(4)) | {"mean": build([0]).batch(range(2))["y"].repeat(2, 1, 1, 1)}
    dataset.fill(range(4), batch)
    values = dataset.denormalize(batch["y"].double().numpy(), batch["mean"].double().numpy())
    for i in range(4):
        _, target, _ = dataset.positions(i)
        observed = np.stack([fields[name].values[target] for name in TARGETS])
        assert np.where(batch["valid"][i], values[i], np.nan) == pytest.approx(observed, rel=1e-5, nan_ok=True)


def test_a_joint_sample_has_the_base_of_each_lead(build):
    batches = []
    for joint, indices in ((False, range(4)), (True, range(2))):
        dataset = build([3, 30], joint=joint)
        batch = dataset.batch(indices)
        batch["mean"] = torch.empty_like(batch["y"])
        dataset.fill(indices, batch)
        batches.append(batch)
    for name in ("mean", "y", "valid"):
        assert torch.equal(batches[1][name].flatten(0, 1), batches[0][name]), name


def test_other_lead_times_than_those_of_the_base_are_refused(build):
    with pytest.raises(ConfigError, match=r"lead_times_hours: \[6, 24\]: expected \[6, 12\], those of the base"):
        build([3], lead_times_hours=(6, 24))
