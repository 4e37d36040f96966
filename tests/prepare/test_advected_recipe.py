"""The recipe's `advect`: what it writes is what training would compute from the wind of every hour."""

import dataclasses

import numpy as np
import pytest

from tests.support.small_data import HOURS, damage_of, read, run, small_fields
from topoflow.config import DataConfig
from topoflow.data.assembly import open_forecast_data
from topoflow.data.prepared.reader import PreparedData, index_prepared
from topoflow.errors import ConfigError, DataError
from topoflow.tools.prepare.recipe import Advect, read_recipe, recipe_text

LEADS = (3, 6)
ADVECT = Advect(("co", "elevation"), LEADS)
NAMES = [f"{name}_advected+{lead}h" for name in ("co", "elevation") for lead in LEADS]
CONSTANTS = {"u": (0.0, 4.0), "v": (0.0, 4.0), "co": (900.0, 90.0), "elevation": (900.0, 500.0)}


@pytest.fixture
def raw(tmp_path):
    fields = small_fields()
    fields["v"] = (fields.u[::-1].dims, fields.u.values[::-1].copy(), {"units": "m s-1"})
    (tmp_path / "raw").mkdir()
    fields.to_netcdf(tmp_path / "raw" / "fields.nc")
    return tmp_path / "raw"


def samples(folder, **changes):
    every_hour = tuple(range(7))
    given = {"variables": ("u", "v", "co", "elevation"), "hours": {"u": every_hour, "v": every_hour}, "threads": 0}
    given |= {"train": (("2018-12-30T00", "2019-01-02"),), "targets": ("co",), "lead_times_hours": LEADS}
    given |= {"advect": ("elevation", "co"), "normalization": CONSTANTS, "availability": True}
    opened = open_forecast_data(DataConfig(str(folder), **{**given, **changes}), False, False)
    return opened.dataset("train", opened.build_normalization()), opened


def test_training_reads_what_it_would_compute_from_every_hour(raw, tmp_path):
    run(raw, tmp_path / "plain")
    run(raw, tmp_path / "advected", advect=ADVECT)
    assert PreparedData(index_prepared(str(tmp_path / "advected"))).dynamic[-4:] == (*NAMES,)
    assert damage_of(tmp_path / "advected") == []
    (computed, of_plain), (prepared, of_advected) = samples(tmp_path / "plain"), samples(tmp_path / "advected")
    assert prepared.input_names == computed.input_names
    for i in (0, 60, len(computed) - 1):
        np.testing.assert_allclose(prepared[i]["x"], computed[i]["x"], rtol=1e-6, atol=1e-6)
    rows = [computed.input_names.index(name) for name in NAMES]
    assert np.abs(computed[60]["x"].numpy()[rows]).min(axis=(1, 2)).max() > 0
    # without hours ahead, too: the paths are known
    no_hours, _ = samples(tmp_path / "advected", hours={})
    np.testing.assert_array_equal(no_hours[60]["x"].numpy()[-5:], prepared[60]["x"].numpy()[-5:])
    # what is read is part of what identifies the data
    assert {*of_advected.contents.hashes} - {*of_plain.contents.hashes} == {*NAMES}


def test_hours_whose_path_leaves_the_data_or_crosses_a_gap_are_missing(raw, tmp_path):
    run(raw, tmp_path / "advected", advect=ADVECT)
    for name in NAMES:
        values = read(tmp_path / "advected", name)
        assert len(values) >= HOURS - 3
        assert np.isnan(values[-6:]).all()
        assert not np.isnan(values[30]).any()


def test_data_that_are_appended_are_refused_because_the_last_hours_change(raw, tmp_path):
    fields = small_fields()
    fields["v"] = fields.u
    fields.isel(time=slice(0, 100)).to_netcdf(raw / "fields.nc")
    run(raw, tmp_path / "advected", advect=ADVECT)
    fields.isel(time=slice(100, None)).to_netcdf(raw / "more.nc")
    with pytest.raises(DataError, match=r"co_advected\+3h.*expected the same, or another folder"):
        run(raw, tmp_path / "advected", advect=ADVECT)
    with pytest.raises(ConfigError, match=r"variables: .*prepared with .*co_advected\+3h"):
        run(raw, tmp_path / "advected")


def test_a_recipe_holds_it(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("sources: [{path: a.nc}]\nadvect: {tracers: [co, elevation], leads: [3, 6]}\n")
    assert read_recipe(path).advect == ADVECT
    assert "advect:\n  tracers:\n  - co" in recipe_text(read_recipe(path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tracers": ("o3",)}, "advect: o3: not in the data, which have co, elevation"),
        ({"leads": (6, 3)}, r"advect: leads: \[6, 3\]: expected increasing multiples of 1 hours"),
        ({"leads": ()}, "expected increasing"),
    ],
)
def test_what_cannot_be_made_is_refused(raw, tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        run(raw, tmp_path / "advected", advect=dataclasses.replace(ADVECT, **changes))
