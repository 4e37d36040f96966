"""More data of the same kind: times are added to prepared data, and the past does not change."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.support.prepared import write_prepared
from tests.support.small_data import contents, damage_of, data_of, run, states
from topoflow.data.prepared.reader import PreparedData, index_prepared
from topoflow.errors import ConfigError, DataError
from topoflow.tools.prepare.recipe import GridSpec, Rules


def test_years_are_appended_and_the_others_stay(files, fields, tmp_path):
    run(files, tmp_path / "whole")
    for first, then in (("2018", "2019"), ("2019", "2018")):
        output = tmp_path / f"from {first}"
        (files / f"{then}.nc").rename(tmp_path / "later.nc")
        run(files, output)
        before = states(output)
        (tmp_path / "later.nc").rename(files / f"{then}.nc")
        run(files, output)
        after = states(output)
        for name in (f"fields_{first}.npy", f"days_{first}.json", "static.npz"):
            assert after[name] == before[name]
        assert data_of(output) == data_of(tmp_path / "whole")
        run(files, output)
        (files / f"{first}.nc").rename(tmp_path / "gone.nc")  # a year that is prepared may be gone from the files
        run(files, output)
        assert states(output) == after
        (tmp_path / "gone.nc").rename(files / f"{first}.nc")
        assert damage_of(output) == []


def test_hours_are_appended_to_a_year_and_the_other_year_of_the_same_file_stays(fields, tmp_path):
    fields.to_netcdf(tmp_path / "all.nc")
    run(tmp_path / "all.nc", tmp_path / "whole")
    fields.isel(time=slice(0, 100)).to_netcdf(tmp_path / "all.nc")
    run(tmp_path / "all.nc", tmp_path / "out")
    before, mapped = states(tmp_path / "out"), PreparedData(index_prepared(str(tmp_path / "out")))
    late = mapped.at(("u", "co"), 99).copy()
    fields.to_netcdf(tmp_path / "all.nc")
    run(tmp_path / "all.nc", tmp_path / "out")
    assert states(tmp_path / "out")["fields_2018.npy"] == before["fields_2018.npy"]
    assert data_of(tmp_path / "out") == data_of(tmp_path / "whole")
    assert len(list((tmp_path / "out").glob("fields_*"))) == 2
    np.testing.assert_array_equal(mapped.at(("u", "co"), 99), late)  # by a run that reads the old year


def test_files_that_were_only_touched_change_no_data(files, tmp_path):
    run(files, tmp_path / "out")
    before = states(tmp_path / "out")
    os.utime(files / "2018.nc")
    run(files, tmp_path / "out")
    now = states(tmp_path / "out")
    assert {name for name in now if now[name] != before[name]} == {"manifest.json", "report.json", "report.txt"}
    run(files, tmp_path / "out")
    assert states(tmp_path / "out") == now


def test_a_changed_past_is_refused_and_nothing_is_damaged(files, fields, tmp_path):
    run(files, tmp_path / "out")
    before = contents(tmp_path / "out")
    early = fields.isel(time=fields["time.year"] == 2018).copy(deep=True)
    early["co"][41, 2, 3] = 1.0
    early.to_netcdf(files / "2018.nc")
    with pytest.raises(DataError, match=r"out: 2018-12-31T01 was prepared with values that differ .*\(co\): expected"):
        run(files, tmp_path / "out")
    early.isel(time=slice(3, None)).to_netcdf(files / "2018.nc")
    with pytest.raises(DataError, match="2018-12-29T05 was prepared, but the files no longer have it"):
        run(files, tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "dtype: float16: .* was prepared with float32"),
        ({"grid": GridSpec(shape=(2, 3))}, "grid: 2x3 area: .* was prepared with 4x6 area"),
        ({"variables": ("co",)}, "variables: co ug m-3: .* was prepared with u m s-1"),
        ({"rules": Rules(drop=("co > 1e6",))}, "rules.drop: co > 1e6: "),
    ],
)
def test_data_are_appended_only_with_the_same_settings(files, tmp_path, changes, message):
    run(files, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        run(files, tmp_path / "out", **changes)
    assert contents(tmp_path / "out") == before
    assert not list(tmp_path.glob(".*"))


def test_another_region_and_other_terrain_are_not_appended(fields, tmp_path):
    write_prepared(fields, tmp_path / "out")
    write_prepared(fields.drop_vars("elevation"), tmp_path / "flat")
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match="'lat2d' differs from the prepared one"):
        write_prepared(fields.assign_coords(lat=fields.lat - 1), tmp_path / "out")
    with pytest.raises(DataError, match="'elevation' differs from the prepared one"):
        write_prepared(fields.assign(elevation=fields.elevation + 1), tmp_path / "out")
    with pytest.raises(DataError, match="flat: was prepared without 'elevation'"):
        write_prepared(fields, tmp_path / "flat")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["fields_2018.npy", "days_2018.json", "static.npz", "manifest.json"])
def test_nothing_is_appended_to_damaged_data(files, tmp_path, name):
    (files / "2019.nc").rename(tmp_path / "2019.nc")
    run(files, tmp_path / "out")
    (tmp_path / "2019.nc").rename(files / "2019.nc")
    (tmp_path / "out" / name).write_bytes((tmp_path / "out" / name).read_bytes()[:-5])
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=name):
        run(files, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_data_of_a_newer_version_are_refused_and_not_touched(fields, tmp_path):
    write_prepared(fields, tmp_path / "out")
    manifest = tmp_path / "out/manifest.json"
    manifest.write_text(manifest.read_text().replace("prepared data 1", "prepared data 9"))
    (tmp_path / "out/fields_2020.npy").touch()
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=r"manifest\.json: has the format 'topoflow prepared data 9'"):
        write_prepared(fields, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_the_manifest_keeps_the_hash_of_every_file_and_earlier_recipes(files, tmp_path):
    run(files / "2018.nc", tmp_path / "out")
    run(files / "2019.nc", tmp_path / "out", rules=Rules(longest_gap="3d"))
    provenance = json.loads((tmp_path / "out/manifest.json").read_text())["provenance"]
    assert [file["path"] for file in provenance["files"]] == [str(files / f"{year}.nc") for year in (2018, 2019)]
    for file in provenance["files"]:
        content = Path(file["path"]).read_bytes()
        assert (file["size"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert "longest_gap: 3d" in provenance["recipe"]
    assert ["2018.nc" in recipe for recipe in provenance["earlier_recipes"]] == [True]
