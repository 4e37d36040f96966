"""Channels of data.advect in samples, compared with the functions of topoflow.physics.advection called by hand."""

import numpy as np
import pytest

from tests.data.test_base_samples import Linear
from tests.support.prepared import write_prepared
from topoflow.data.assembly import open_forecast_data
from topoflow.data.channels import input_names, window_hours
from topoflow.data.dataset import ForecastDataset
from topoflow.data.loader import BatchLoader
from topoflow.data.normalization import Normalization
from topoflow.errors import ConfigError
from topoflow.physics.advection import IndexSpace, interpolate, trace_back

VARIABLES = ("u", "v", "pm25", "co", "population", "lat2d", "hour_sin")
HOURS = {"u": (-3, 0, 4, 12), "v": (12, 0, 6, 4)}
LEADS, CHANGES = (6, 12), ("pm25", "co")
ADVECT = ("population", "co", "pm25")
ADVECTED = tuple(f"{name}_advected+{lead}h" for name in ADVECT for lead in LEADS)


@pytest.fixture
def fields(make_fields):
    fields = make_fields(hours=60, shape=(5, 6))
    fields["u"] *= 0.2
    fields["v"] -= 48
    return fields


@pytest.fixture
def build(make_config, tmp_path):
    """Return a data set of the whole training split over given fields, and its config."""

    def build(fields, base=None, **changes):
        folder = write_prepared(fields, tmp_path / "data")
        data = {"variables": VARIABLES, "hours": HOURS, "lead_times_hours": LEADS, "targets": ("co", "pm25")}
        config = make_config(
            folder, train=(("2019-01-01", "2019-01-02"),), **{**data, "advect": ADVECT, "availability": True, **changes}
        )
        opened = open_forecast_data(config, with_wind=False, with_terrain=False)
        constants = opened.build_normalization()
        normalization = Normalization(constants.mean, constants.std, base)
        return ForecastDataset(opened.source, normalization, opened.splits["train"].starts, config, with_wind=False)

    return build


def advected(dataset, i=0):
    """Return {channel name: [H, W]} of the advected channels of a sample."""
    x = dataset[i]["x"].numpy()
    return {name: x[row] for row, name in enumerate(dataset.input_names) if "advected" in name}


def filled(field):
    return np.where(np.isnan(field), np.nanmean(field, dtype=np.float64), field).astype(np.float32)


def test_the_channels_follow_the_variables_and_widen_no_window(make_config, tmp_path):
    given = {"variables": VARIABLES, "hours": HOURS, "lead_times_hours": LEADS, "availability": True}
    config = make_config(tmp_path, **given, advect=ADVECT)
    assert input_names(config) == (*input_names(make_config(tmp_path, **given))[:-1], *ADVECTED, "available")
    assert window_hours(config) == (-3, 12)


def test_each_channel_is_what_the_functions_give_by_hand(build, fields):
    dataset = build(fields)
    start, _, _ = dataset.positions(8)
    wind = [[filled(fields[name].values[start + hour]) for name in ("u", "v")] for hour in (0, 4, 12)]
    space = IndexSpace(fields.lat.values, fields.lon.values)
    population = fields.population.values[None]
    positions, means = trace_back(space, LEADS, (0, 4, 12), np.array(wind), population)
    assert np.ptp(positions[0] - np.arange(6)) > 0.5  # the air does move
    present = np.stack([fields[name].values[start] for name in ("co", "pm25")])
    values = [*means, *interpolate(space, present, positions)]
    found, constants = advected(dataset, 8), dataset.normalization
    for name, of_leads in zip(ADVECT, values, strict=True):
        for lead, value in zip(LEADS, of_leads, strict=True):
            expected = np.nan_to_num((value - constants.mean[name]) / constants.std[name])
            channel = f"{name}_advected+{lead}h"
            np.testing.assert_allclose(found[channel], expected, rtol=1e-4, atol=1e-5, err_msg=channel)


def test_other_channels_stay_as_they_are(build, fields):
    x, plain = build(fields)[5]["x"], build(fields, advect=())[5]["x"]
    n = len(plain) - 1
    np.testing.assert_array_equal(x[:n], plain[:n])
    np.testing.assert_array_equal(x[-1], plain[-1])  # available


def test_without_wind_they_are_the_present_fields_to_the_bit(build, fields):
    fields["u"] *= 0
    fields["v"] *= 0
    dataset = build(fields, normalization={name: (50.0, 7.0) for name in VARIABLES if name != "hour_sin"})
    x = dataset[6]["x"].numpy()
    for channel, values in advected(dataset, 6).items():
        np.testing.assert_array_equal(values, x[dataset.input_names.index(channel.split("_")[0])], err_msg=channel)


def test_targets_are_carried_as_anomalies_where_the_other_inputs_are(build, fields):
    fields["u"] *= 0
    fields["v"] *= 0
    base = Linear()
    base.lead_times_hours, base.known = np.array(LEADS, np.float32), np.ones((5, 6), bool)
    base.usual = lambda time: np.full((2, 5, 6), 40, np.float32)
    base.usual_at_places = lambda times, places: np.full((len(times), len(places)), 40, np.float32)
    constants = {name: (50.0, 7.0) for name in VARIABLES if name != "hour_sin"}
    dataset = build(fields, base, anomalies=True, normalization=constants)
    x, found = dataset[9]["x"].numpy(), advected(dataset, 9)
    for name in ("co", "pm25", "population"):
        np.testing.assert_array_equal(found[f"{name}_advected+12h"], x[dataset.input_names.index(name)])
    assert np.isnan(fields.pm25.values[dataset.positions(9)[0]]).any()  # so gaps were filled: not 0
    assert (found["pm25_advected+6h"] != 0).all()


def test_a_channel_depends_on_no_batch_and_no_thread(build, fields):
    dataset = build(fields)
    batches = [[0, 1, 7], [7, 20, 3, 2], [5], [20, 5, 0]] * 5
    for threads in (0, 3):
        for indices, batch in zip(batches, BatchLoader(dataset, batches, threads), strict=True):
            for row, i in enumerate(indices):
                np.testing.assert_array_equal(batch["x"][row], dataset[i]["x"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hours": {}}, r"hours \[0\]: expected 0 to 12, .* data.hours={u: \[0, 12\], v: \[0, 12\]}"),
        ({"hours": {"u": (0, 6), "v": (0, 6)}}, r"\[0, 6\]: expected 0 to 12"),
        ({"hours": {"u": (6, 12), "v": (6, 12)}}, r"\[6, 12\]: expected 0 to 12"),
        ({"hours": {"u": (0, 12)}}, r"\[0\]: expected 0 to 12"),
        ({"hours": {}, "advect": ("u", "v")}, r"\[0\]: expected 0 to 12"),
        ({"variables": ("pm25", "co"), "hours": {}, "advect": ("pm25",)}, r"\[\]: expected 0 to 12"),
        ({"advect": ("hour_sin",)}, "'hour_sin' is computed: expected variables of the data"),
        ({"advect": ("o3",)}, r"\['o3'\] is not usable: expected names of data.variables"),
        ({"advect": ("co", "co")}, "none twice"),
    ],
)
def test_what_cannot_be_advected_is_refused(build, fields, changes, words):
    with pytest.raises(ConfigError, match=f"data.advect.*{words}"):
        build(fields, **changes)
