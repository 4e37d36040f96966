"""The recipes that are shipped: they are read, say where the data are, and files as described need no decision."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from topoflow.tools.prepare.findings import Findings
from topoflow.tools.prepare.recipe import read_recipe
from topoflow.tools.prepare.variables import describe

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"


def file_of(**units: str | None) -> xr.Dataset:
    """A file with one hour of each variable."""
    return xr.Dataset(
        {
            name: (("t0", "y", "x"), np.ones((1, 2, 2)), {} if unit is None else {"units": unit})
            for name, unit in units.items()
        }
    )


WEATHER = {"u", "v", "temp", "rh", "psfc"}
GASES = {"so2", "no2", "co", "o3"}
FILES = {
    "cams_era5": [
        (
            file_of(u10="m s**-1", v10="m s**-1", t2m="K", d2m="K", sp="Pa", blh="m", number="1"),
            {*WEATHER, "blh"},
        ),
        (
            file_of(
                pm2p5="kg m**-3", pm10="kg m**-3", sp="Pa", t="K", co="kg kg**-1", no2="kg kg**-1", so2="kg kg**-1",
                go3="kg kg**-1",
            ),
            {"pm25", "pm10", "temp", "psfc", *GASES},
        ),
    ],
    "wrfchem": [
        (
            file_of(
                XLAT="degree_north", XLONG="degree_east", HGT="m", COSALPHA="", SINALPHA="", U10="m s-1", V10="m s-1",
                T2="K", Q2="kg kg-1", PSFC="Pa", PBLH="m", PM2_5_DRY="ug m^-3", PM10="ug m^-3", o3="ppmv", no2="ppmv",
                so2="ppmv", co="ppmv",
            ),
            {*WEATHER, *GASES, "pm25", "pm10", "blh", "elevation"},
        ),
    ],
    "caqra": [
        (
            file_of(
                lat2d="degrees_north", lon2d="degrees_east", u="m/s", v="m/s", temp="K", rh="%", psfc="Pa", co="mg/m3",
                **dict.fromkeys(("pm25", "pm10", "so2", "no2", "o3"), "ug/m3"),
            ),
            {*WEATHER, *GASES, "pm25", "pm10"},
        ),
    ],
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_read_and_says_where_the_data_are(path):
    assert read_recipe(path).sources
    head = path.read_text(encoding="utf-8").split("sources:")[0]
    assert "http" in head or "doi.org" in head


@pytest.mark.parametrize("name", FILES)
def test_files_as_described_need_no_decision(name):
    sources = read_recipe(RECIPES / f"{name}.yaml").sources
    for source, (dataset, expected) in zip(sources, FILES[name], strict=True):
        findings = Findings()
        readers = describe(dataset, source, findings, name)
        assert [finding.line() for finding in findings.sorted()] == []
        assert readers.keys() == expected
