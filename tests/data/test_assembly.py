"""From a data section to data sets."""

import tracemalloc

import numpy as np
import pytest

from tests.support.prepared import write_prepared
from topoflow.data.assembly import open_forecast_data
from topoflow.errors import ConfigError, DataError

NAMES = ("u", "v", "pm25", "co", "elevation", "population")


@pytest.fixture
def folder(make_fields, tmp_path):
    dataset = make_fields(names=("u", "v", "pm25", "co", "o3"), hours=96)
    return write_prepared(dataset.isel(time=np.r_[:60, 61:96]), tmp_path / "data")


SPLITS = {
    "train": (("2019-01-01", "2019-01-02"),),
    "validation": (("2019-01-03", "2019-01-03"),),
    "test": (("2019-01-04", "2019-01-04"),),
}


def test_from_config_to_samples(folder, make_config, make_fields):
    data = open_forecast_data(make_config(folder, **SPLITS, availability=True), with_wind=True, with_terrain=True)
    assert {split: len(index.starts) for split, index in data.splits.items()} == {
        "train": 45, "validation": 24 - 3 - 4, "test": 21,
    }  # fmt: skip
    normalization = data.build_normalization()
    train = data.dataset("train", normalization)
    assert len(train) == 90
    assert train.input_names == data.input_names == ("u", "v", "pm25", "co", "elevation", "population", "available")
    assert train.target_names == data.target_names == ("pm25", "co")
    assert data.dataset("test", normalization).sample_identity(1) == "2019-01-04T00+3h"
    values = make_fields(names=("u", "v", "pm25", "co", "o3"), hours=96).co.values[:48].astype(np.float64)
    assert normalization.mean["co"] == pytest.approx(np.nanmean(values), rel=1e-9)
    assert "wind_ms" in train[0]
    lines = data.summary()
    assert any(
        "validation: 17 start times, 34 samples; 3 starts skipped because their windows cross a gap" in line
        for line in lines
    )
    assert any("4 x 6 cells, latitude 20 to 50, longitude 80 to 130, 24 cells in the mask" in line for line in lines)


def test_joint_samples_are_starts(folder, make_config):
    data = open_forecast_data(make_config(folder, **SPLITS), with_wind=True, with_terrain=True, joint=True)
    dataset = data.dataset("train", data.build_normalization())
    assert len(dataset) == data.num_samples("train") == 45
    assert any("validation: 17 start times, 17 samples" in line for line in data.summary())


@pytest.mark.parametrize(
    ("test", "relation"),
    [
        (
            (("2019-01-05", "2019-01-06"),),
            "forward: all of it is after the training split, which ends at 2019-01-04T23",
        ),
        ((("2019-01-01", "2019-01-01"),), "backward: all of it is before the training split"),
        ((("2019-01-01", "2019-01-01"), ("2019-01-05", "2019-01-05")), "interleaved: the training split has times"),
        ((("2019-01-03", "2019-01-03"),), "interleaved: "),
    ],
)
def test_where_a_split_lies_in_time_is_said(make_fields, make_config, tmp_path, test, relation):
    train = (("2019-01-02", "2019-01-02"), ("2019-01-04", "2019-01-04"))
    path = write_prepared(make_fields(hours=24 * 6), tmp_path / "data")
    data = open_forecast_data(make_config(path, train=train, test=test), with_wind=True, with_terrain=True)
    assert data.relation_to_training("test").startswith(relation)
    assert data.relation_to_training("train") == "the training split itself"


def test_only_what_is_needed_counts(folder, make_config):
    config = make_config(folder, variables=("co", "lat2d"), targets=("pm25",))
    data = open_forecast_data(config, with_wind=False, with_terrain=False)
    assert set(data.contents.hashes) == {"co", "pm25"}
    assert "elevation" not in data.contents.fixed
    assert set(data.splits) == {"train"}
    with_physics = open_forecast_data(config, with_wind=True, with_terrain=True)
    assert set(with_physics.contents.hashes) == {"co", "pm25", "u", "v"}
    assert "elevation" in with_physics.contents.fixed
    assert set(with_physics.build_normalization().mean) == {"co", "lat2d", "pm25"}


def test_constants_of_the_config_must_cover_inputs_and_targets(folder, make_config):
    constants = {"co": (200.0, 100.0), "pm25": (25.0, 15.0)}
    names = {"variables": ("co", "hour_sin"), "targets": ("pm25",)}
    data = open_forecast_data(make_config(folder, **names, normalization=constants), False, False)
    assert data.build_normalization().to_dict() == {"co": [200, 100], "hour_sin": [0, 1], "pm25": [25, 15]}
    data = open_forecast_data(
        make_config(folder, variables=("co",), targets=("o3",), normalization=constants), False, False
    )
    with pytest.raises(ConfigError, match=r"no constants for o3"):
        data.build_normalization()


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"variables": ("co", "pm2.5")}, DataError, "data.variables: .* has no variable 'pm2.5' .nearest: pm25"),
        ({"targets": ("elevation",)}, ConfigError, "data.targets: 'elevation'"),
        ({"variables": ("co", "temp")}, DataError, "no variable 'temp'"),
        ({"train": (2018,)}, DataError, "data.train: 2018 is not in the data"),
        ({"test": (("2019-01-02", "2019-01-04"),)}, ConfigError, "data.train: .* overlaps data.test: "),
        ({"lead_times_hours": (12, 48)}, DataError, r"data.train: no window from \+0 h to \+48 h"),
        ({"hours": {"u": (0, 72)}}, DataError, r"data.train: no window from \+0 h to \+72 h"),
        ({"hours": {"co": (-72,)}}, DataError, r"data.train: no window from -72 h to \+3 h"),
        ({"hours": {"elevation": (0, 1)}}, ConfigError, "data.hours: 'elevation' does not change in time"),
        ({"targets": ("hour_sin",)}, ConfigError, "data.targets: 'hour_sin'"),
        ({"variables": ("co", "available")}, ConfigError, "'available'.*data.availability"),
        ({"variables": ("co", "mask")}, DataError, "no variable 'mask'"),
        ({"variables": ("elevation", "hour_sin"), "availability": True}, ConfigError, "data.availability: true"),
    ],
)
def test_refusals(folder, make_config, changes, kind, message):
    with pytest.raises(kind, match=message):
        open_forecast_data(make_config(folder, **{**SPLITS, **changes}), with_wind=True, with_terrain=True)


def test_without_wind_or_terrain_in_the_data_a_model_that_needs_them_is_refused(make_fields, make_config, tmp_path):
    folder = write_prepared(make_fields(names=("u", "co")).drop_vars("elevation"), tmp_path / "data")
    config = make_config(folder, variables=("u", "co"), targets=("co",))
    assert open_forecast_data(config, with_wind=False, with_terrain=False).input_names == ("u", "co")
    for priors, name in (((True, False), "v"), ((False, True), "elevation")):
        with pytest.raises(DataError, match=f"model: .* has no variable '{name}'"):
            open_forecast_data(config, *priors)


@pytest.mark.parametrize(
    ("changes", "key"), [({"lead_times_hours": (6, 10)}, "lead_times_hours"), ({"hours": {"u": (0, 4)}}, "hours.u")]
)
def test_hours_that_are_no_multiples_of_the_step_are_refused(make_fields, make_config, tmp_path, changes, key):
    folder = write_prepared(make_fields(step_hours=3), tmp_path / "data", step_hours=3)
    with pytest.raises(ConfigError, match=f"data.{key}: .*expected multiples of 3, the step of the data"):
        open_forecast_data(make_config(folder, **{"lead_times_hours": (6,), **changes}), False, False)


def test_long_data_take_only_a_few_bytes_per_hour_in_memory(make_fields, make_config, tmp_path):
    def held(hours):
        path = write_prepared(make_fields(hours=hours, shape=(2, 2)), tmp_path / str(hours))
        config = make_config(path, normalization=dict.fromkeys(NAMES, (0.0, 1.0)), train=(2019,))
        open_forecast_data(config, True, True)  # exclude what is created once per process
        tracemalloc.start()
        data = open_forecast_data(config, True, True)
        dataset = data.dataset("train", data.build_normalization())
        dataset[hours]
        bytes_held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return bytes_held

    # times and starts, 8 bytes each; the hashes and moments of the days, about 2 kB a day
    assert (held(8000) - held(2000)) / 6000 < 130
