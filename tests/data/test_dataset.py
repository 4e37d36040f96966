"""Compare samples with xarray's own selection."""

import numpy as np
import pytest
import torch

from tests.support.prepared import write_prepared
from topoflow.data.dataset import ForecastDataset
from topoflow.data.normalization import Normalization
from topoflow.data.prepared.reader import PreparedData, index_prepared

MEAN = {
    "u": 1.0,
    "v": -2.0,
    "pm25": 40.0,
    "co": 55.0,
    "elevation": 1000.0,
    "population": 500.0,
    "lat2d": 32,
    "lon2d": 106,
}
STD = {"u": 5.0, "v": 4.0, "pm25": 9.0, "co": 12.0, "elevation": 700.0, "population": 300.0, "lat2d": 12, "lon2d": 16}
CLOCK = ("hour_sin", "hour_cos", "day_sin", "day_cos")
NORMALIZATION = Normalization(
    {**MEAN, **dict.fromkeys((*CLOCK, "available"), 0.0)}, {**STD, **dict.fromkeys((*CLOCK, "available"), 1.0)}
)
STARTS = np.array([2, 3, 10, 40])
INPUTS = ("co", "lat2d", "elevation", "u", "hour_sin", "day_cos", "population", "lon2d", "hour_cos", "day_sin", "v")


@pytest.fixture
def fields(make_fields):
    dataset = make_fields(hours=48, start="2019-03-01")
    dataset.u[3] = np.nan
    dataset.population[1, 1] = np.nan
    return dataset


@pytest.fixture
def build(fields, make_config, tmp_path):
    def build_dataset(mask=None, with_wind=False, dtype="float32", joint=False, **changes):
        folder = tmp_path / f"data-{len(list(tmp_path.iterdir()))}"
        config = make_config(write_prepared(fields, folder, dtype, mask), **{"variables": INPUTS, **changes})
        data = PreparedData(index_prepared(str(folder)))
        return ForecastDataset(data, NORMALIZATION, STARTS, config, with_wind, joint)

    return build_dataset


def normalized(name, values):
    return (values.astype(np.float64) - MEAN[name]) / STD[name]


def test_inputs_are_at_the_start_and_targets_at_the_lead(build, fields):
    dataset = build()
    assert len(dataset) == 8
    for i in range(len(dataset)):
        sample = dataset[i]
        start, lead = STARTS[i // 2], (1, 3)[i % 2]
        now, then = fields.isel(time=start), fields.isel(time=start + lead)
        clock = now.time.dt
        hour, day = 2 * np.pi * clock.hour.item() / 24, 2 * np.pi * clock.dayofyear.item() / 365.25
        expected = {
            **{name: normalized(name, now[name].values) for name in ("co", "u", "v", "elevation", "population")},
            "lat2d": normalized("lat2d", np.repeat(now.lat.values[:, None], 6, axis=1)),
            "lon2d": normalized("lon2d", np.repeat(now.lon.values[None], 4, axis=0)),
            "hour_sin": np.full((4, 6), np.sin(hour)),
            "hour_cos": np.full((4, 6), np.cos(hour)),
            "day_sin": np.full((4, 6), np.sin(day)),
            "day_cos": np.full((4, 6), np.cos(day)),
        }
        assert dataset.input_names == INPUTS
        for channel, name in zip(sample["x"], INPUTS, strict=True):
            np.testing.assert_allclose(channel, np.nan_to_num(expected[name]), rtol=1e-5, atol=1e-5, err_msg=name)
        for row, name in enumerate(("pm25", "co")):
            truth = normalized(name, then[name].values)
            np.testing.assert_array_equal(sample["valid"][row], ~np.isnan(truth))
            np.testing.assert_allclose(sample["y"][row], np.nan_to_num(truth), rtol=1e-5, atol=1e-5)
        assert sample["lead_time_hours"].item() == lead
        assert sample["index"].item() == i
        assert dataset.sample_identity(i) == f"{str(now.time.values)[:13]}+{lead}h"


def test_types_and_shapes(build):
    sample = build(with_wind=True)[0]
    assert {name: (value.dtype, tuple(value.shape)) for name, value in sample.items()} == {
        "x": (torch.float32, (11, 4, 6)),
        "y": (torch.float32, (2, 4, 6)),
        "valid": (torch.bool, (2, 4, 6)),
        "lead_time_hours": (torch.float32, ()),
        "index": (torch.int64, ()),
        "wind_ms": (torch.float32, (2, 4, 6)),
    }
    assert "wind_ms" not in build()[0]


def test_cells_outside_the_mask_never_count(build):
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:5] = True
    for with_mask, without in ((build(mask=mask)[i], build()[i]) for i in range(8)):
        valid = without["valid"] & torch.from_numpy(mask)
        assert torch.equal(with_mask["valid"], valid)
        assert torch.equal(with_mask["y"], torch.where(valid, without["y"], 0.0))
        assert torch.equal(with_mask["x"], without["x"])


def test_availability_is_the_fraction_of_dynamic_inputs(build, fields):
    dataset = build(availability=True)
    assert dataset.input_names == (*INPUTS, "available")
    for start in range(4):
        present = [
            ~np.isnan(fields[name].values[STARTS[start]]) for name in ("co", "u", "v")
        ]  # not pm25: no input here
        np.testing.assert_allclose(dataset[2 * start]["x"][-1], np.mean(present, axis=0), atol=1e-6)


def test_wind_is_physical_and_missing_wind_is_the_mean(build, fields):
    dataset = build(with_wind=True, variables=("co",))
    for start in range(4):
        wind = dataset[2 * start]["wind_ms"]
        for row, name in enumerate(("u", "v")):
            values = fields[name].values[STARTS[start]].astype(np.float64)
            mean = 0.0 if np.isnan(values).all() else np.nanmean(values)
            np.testing.assert_allclose(wind[row], np.where(np.isnan(values), mean, values), rtol=1e-6)
    assert torch.count_nonzero(dataset[2]["wind_ms"][0]) == 0  # u has no value at all there


def test_samples_do_not_share_memory(build):
    dataset = build(with_wind=True)
    first = {name: value.clone() for name, value in dataset[0].items()}
    for value in dataset[0].values():
        value.zero_()
    assert all(torch.equal(value, first[name]) for name, value in dataset[0].items())


def test_samples_end_where_the_data_set_ends(build):
    for i in (8, -1):
        with pytest.raises(IndexError):
            build()[i]


def as_it_was(dataset, i):
    """Return a sample computed field by field with plain numpy, as before samples were made in batches."""
    start, lead = STARTS[i // 2], (1, 3)[i % 2]
    source, mean, std = dataset.data, NORMALIZATION.mean, NORMALIZATION.std
    x, missing = [], []
    for name in dataset.input_names:
        if name in ("u", "v", "co", "pm25"):
            field = source.at((name,), start)[0].copy()
            missing.append(np.isnan(field))
            field = (field - np.float32(mean[name])) / np.float32(std[name])
            field[missing[-1]] = 0
        elif name in CLOCK:
            time = source.times[start].astype(object)
            turn = time.hour / 24 if name.startswith("hour") else time.timetuple().tm_yday / 365.25
            value = (np.sin if name.endswith("sin") else np.cos)(2 * np.pi * turn)
            field = np.full(source.grid.shape, value, np.float32)
        elif name == "available":
            field = 1 - np.array(missing).mean(axis=0, dtype=np.float32)
        else:
            field = np.nan_to_num(NORMALIZATION.normalize(name, source.static(name)))
        x.append(field)
    target = source.at(dataset.target_names, start + lead)
    valid = ~np.isnan(target) & source.mask
    constants = [np.array([table[name] for name in dataset.target_names], np.float32) for table in (mean, std)]
    of_mean, of_std = (values[:, None, None] for values in constants)
    y = np.where(valid, (target - of_mean) / of_std, np.float32(0))
    wind = source.at(("u", "v"), start).copy()
    for component in wind:
        absent = np.isnan(component)
        if absent.any():
            component[absent] = component[~absent].mean(dtype=np.float64) if not absent.all() else 0
    return {"x": np.stack(x).astype(np.float32), "y": y, "valid": valid, "wind_ms": wind}


@pytest.mark.parametrize("targets", [("pm25", "co"), ("co", "pm25"), ("u",)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_bits_of_samples_are_those_of_plain_numpy(build, dtype, masked, targets):
    mask = np.random.default_rng(3).random((4, 6)) < 0.6 if masked else None
    dataset = build(mask=mask, with_wind=True, dtype=dtype, availability=True, targets=targets)
    batch = dataset.batch(list(range(8)))
    for i in range(8):
        for name, expected in as_it_was(dataset, i).items():
            assert dataset[i][name].numpy().tobytes() == expected.tobytes(), (i, name)
            assert batch[name][i].numpy().tobytes() == expected.tobytes(), (i, name)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6, 7], [7, 0, 3, 3, 1, 0, 6, 2], [2, 3], [5]])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_a_batch_holds_its_samples_in_any_order(build, order, size):
    dataset, single = build(with_wind=True), build(with_wind=True)
    for first in range(0, len(order), size):
        indices = order[first : first + size]
        batch = dataset.batch(indices)
        expected = torch.utils.data.default_collate([single[i] for i in indices])
        assert batch.keys() == expected.keys()
        for name, values in batch.items():
            assert values.dtype == expected[name].dtype
            assert torch.equal(values, expected[name])
            values.zero_()  # the batch belongs to the caller: later ones do not use it


def test_a_joint_sample_is_a_start_with_all_its_leads(build):
    mask = np.random.default_rng(3).random((4, 6)) < 0.6
    single, joint = build(mask=mask, with_wind=True), build(mask=mask, with_wind=True, joint=True)
    assert (len(single), len(joint)) == (8, 4)
    assert joint.sample_identity(1) == f"{single.sample_identity(2).partition('+')[0]}+1,3h"
    batch, pairs = joint.batch([3, 0]), single.batch([6, 7, 0, 1])
    for name in ("y", "valid", "lead_time_hours"):
        assert torch.equal(batch[name].flatten(0, 1), pairs[name]), name
    for name in ("x", "wind_ms"):
        assert torch.equal(batch[name], pairs[name][::2]), name
    assert batch["index"].tolist() == [3, 0]
    for name, (dtype, shape) in joint.layout.items():
        assert (batch[name].dtype, tuple(batch[name].shape[1:])) == (dtype, shape), name
    for i in (4, -1):
        with pytest.raises(IndexError):
            joint[i]


def test_inputs_of_one_start_are_read_once_for_all_leads(build, monkeypatch):
    dataset, read = build(with_wind=True), []
    at = dataset.data.at
    monkeypatch.setattr(dataset.data, "at", lambda names, i: read.append((names, i)) or at(names, i))
    for indices in ([2, 0, 3, 1], [4, 5, 6, 7]):
        dataset.batch(indices)
    inputs, targets = ([i for names, i in read if ("u" in names) is is_input] for is_input in (True, False))
    assert sorted(inputs) == STARTS.tolist()
    assert len(targets) == 8


def test_torchs_own_loader_takes_it_sample_by_sample(build):
    dataset = build(with_wind=True)
    (batch,) = torch.utils.data.DataLoader(dataset, batch_size=8)
    expected = dataset.batch(list(range(8)))
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
