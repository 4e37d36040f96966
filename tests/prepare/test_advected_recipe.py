"""The recipe's `advect`: what it writes is what training would compute from the wind of every hour."""

import dataclasses
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from tests.support.small_data import damage_of, run, small_fields
from topoflow.config import DataConfig
from topoflow.data.assembly import open_forecast_data
from topoflow.data.prepared.reader import PreparedData, index_prepared
from topoflow.errors import ConfigError, DataError
from topoflow.tools.prepare.advected import WithAdvected
from topoflow.tools.prepare.recipe import Advect, read_recipe, recipe_text
from topoflow.tools.prepare.writing import Fields

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


def test_hours_whose_path_leaves_the_data_or_crosses_a_gap_are_missing():
    fields = np.random.default_rng(0).normal(size=(50, 3, 4, 6)).astype(np.float32)
    source = SimpleNamespace(
        times=np.datetime64("2019-01-01T00", "h") + np.r_[:20, 23:53],
        step_hours=1,
        shape=(4, 6),
        units={"u": "m s-1", "v": "m s-1", "co": "ug m-3"},
        fields=lambda positions: fields[positions],
    )
    place = {"lat2d": np.linspace(36, 30, 4), "lon2d": np.linspace(110, 115, 6)}
    further = WithAdvected(cast(Fields, source), place, Advect(("co",), LEADS)).fields(np.arange(50))[:, 3:]
    missing = np.isnan(further)
    assert missing[14:20].all()  # the longest lead is 6 hours
    assert missing[44:].all()
    assert not missing[:14].any()
    assert not missing[20:44].any()


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
