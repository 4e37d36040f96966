"""Variables of files: found under the names of archives, converted, derived, or refused with the line to write."""

import numpy as np
import pytest
import xarray as xr

from topoflow.tools.prepare.findings import Findings
from topoflow.tools.prepare.recipe import Source
from topoflow.tools.prepare.variables import Reader, describe

DIMS = ("time", "y", "x")


def field(value: float, units=None, dims=DIMS, **attributes) -> xr.DataArray:
    values = np.full((3, 2, 2)[: len(dims)], value)
    return xr.DataArray(values, dims=dims, attrs=attributes | ({} if units is None else {"units": units}))


def described(variables, findings: Findings | None = None, **source) -> dict[str, Reader]:
    return describe(xr.Dataset(variables), Source("x.nc", **source), findings or Findings(), "x.nc")


def value_of(variables, ours: str, **source) -> float:
    """The value that a file of constant fields gives for `ours`."""
    dataset, findings = xr.Dataset(variables), Findings()
    readers = describe(dataset, Source("x.nc", **source), findings, "x.nc")
    assert not findings.open(), [finding.line() for finding in findings.open()]
    reader = readers[ours]
    values = reader.convert({need: dataset[need].values for need in reader.needs})
    assert values.dtype == np.float32
    assert values.shape == (3, 2, 2)
    return float(values[0, 0, 0])


def decision(variables, **source):
    """The one finding that must be settled."""
    findings = Findings()
    readers = described(variables, findings, **source)
    [found] = findings.open()
    return readers, found


@pytest.mark.parametrize(
    ("theirs", "units", "ours"),
    [
        ("u10", "m s**-1", "u"), ("V10", "m s-1", "v"), ("t2m", "K", "temp"), ("T2", "K", "temp"), ("t", "K", "temp"),
        ("SFC_TMP", "C", "temp"), ("sp", "Pa", "psfc"), ("PRES", "hPa", "psfc"), ("pm2p5", "kg m**-3", "pm25"),
        ("pm2p5_conc", "\u00b5g/m3", "pm25"), ("PM2_5_DRY", "ug m^-3", "pm25"), ("PM25_TOT", "ug m-3", "pm25"),
        ("SURF_ug_PM25_rh50", "ug/m3", "pm25"), ("88101", "Micrograms/cubic meter (LC)", "pm25"),
        ("PM2.5", "ug/m3", "pm25"), ("PM10", "ug/m3", "pm10"), ("o3_conc", "ug m-3", "o3"), ("NO", "ug m-3", "no"),
        ("CO", "mg/m3", "co"), ("PBLH", "m", "blh"), ("HGT", "m", "elevation"), ("relativehumidity", "%", "rh"),
        ("pm25 [ug/m3]", "ug/m3", "pm25"),
    ],
)  # fmt: skip
def test_names_of_archives(theirs, units, ours):
    assert list(described({theirs: field(1.0, units)})) == [ours]


@pytest.mark.parametrize(
    ("standard_name", "ours"),
    [("eastward_wind", "u"), ("mass_concentration_of_pm2p5_ambient_aerosol_particles_in_air", "pm25"),
     ("surface_air_pressure", "psfc"), ("surface_altitude", "elevation")],
)  # fmt: skip
def test_standard_names(standard_name, ours):
    units = {"u": "m s-1", "pm25": "ug m-3", "psfc": "Pa", "elevation": "m"}[ours]
    assert list(described({"var1": field(1.0, units, standard_name=standard_name)})) == [ours]


@pytest.mark.parametrize(
    ("theirs", "units"),
    [
        ("No", None),
        ("U", "m s-1"),
        ("T", "K"),
        ("z", "m"),
        ("hgt", "m2"),
        ("SWDOWN", "W m-2"),
        ("pm25_24h", "ug m-3"),
    ],
)
def test_names_of_other_things(theirs, units):
    """Row numbers, WRF's fields on model levels, vertical coordinates and daily means are not ours."""
    findings = Findings()
    assert described({theirs: field(1.0, units)}, findings) == {}
    assert not findings.open()


def test_a_coordinate_of_a_dimension_is_no_variable():
    levels = xr.DataArray([10.0], dims="height", attrs={"units": "m"})
    assert described({"height": levels, "pm25": field(1.0, "ug m-3")}).keys() == {"pm25"}


def test_names_of_the_recipe_come_first():
    variables = {"pm25": field(1.0, "ug m-3"), "PM25_HOURLY": field(2.0, "mg m-3")}
    assert value_of(variables, "pm25", names={"pm25": "PM25_HOURLY"}) == 2000.0


def test_a_name_of_the_recipe_that_the_file_lacks_is_noted():
    findings = Findings()
    described({"pm25": field(1.0, "ug m-3")}, findings, names={"o3": "ozon"})
    assert [(f.severity, f.variable) for f in findings.sorted()] == [("note", "ozon")]


def test_a_further_variable_keeps_its_unit():
    reader = described({"E_NO": field(3.0, "mol km-2 hr-1")}, names={"emission": "E_NO"})["emission"]
    assert (reader.unit, reader.needs) == ("mol km-2 hr-1", ("E_NO",))


def test_two_names_for_one_variable():
    readers, found = decision({"88101": field(1.0, "ug/m3"), "88502": field(1.0, "ug/m3")})
    assert readers == {}
    assert "88101, 88502" in found.found
    assert found.settle == 'names: {pm25: "88101"}'


def test_without_unit():
    readers, found = decision({"pm25": field(1.0)})
    assert readers == {}
    assert (found.severity, found.settle) == ("decision", "units: {pm25: ug m-3}")
    assert value_of({"pm25": field(1.0)}, "pm25", units={"pm25": "mg m-3"}) == 1000.0


def test_our_name_with_the_unit_of_another_thing_is_noted():
    findings = Findings()
    assert described({"no2": field(1.0, "kg m-2 s-1")}, findings) == {}
    assert "cannot become ug m-3" in findings.sorted()[0].found


def test_text_is_an_error():
    texts = xr.DataArray(np.full((3, 2, 2), "a", dtype=object), dims=DIMS)
    assert decision({"pm25": texts})[1].severity == "error"


def test_linear_conversions():
    assert value_of({"t2m": field(68.0, "Degrees Fahrenheit")}, "temp") == pytest.approx(293.15)
    assert value_of({"sp": field(1013.25, "hPa")}, "psfc") == pytest.approx(101325)
    assert value_of({"rh": field(0.5, 1)}, "rh") == pytest.approx(50)
    assert value_of({"pm2p5": field(2.5e-8, "kg m**-3")}, "pm25") == pytest.approx(25)


# Guidance of the European Commission on the units of the Air Quality Directives: ug m-3 per ppb at 20 degC, 1013 hPa
@pytest.mark.parametrize(("gas", "per_ppb"), [("o3", 1.9957), ("no2", 1.9125), ("so2", 2.6609), ("co", 1.1642)])
def test_ppb_at_the_conditions_of_the_eu(gas, per_ppb):
    """Equal to 1.2 per mille, which is what the rounding in the published factors leaves."""
    assert value_of({gas: field(10.0, "ppb")}, gas, ratio="20 degC") == pytest.approx(10 * per_ppb, rel=1.2e-3)


# molar volume 24.45 l/mol at 25 degC and 1 atm (NIOSH Pocket Guide, conversion formula)
@pytest.mark.parametrize(("gas", "molar_mass"), [("o3", 48.0), ("no2", 46.0), ("so2", 64.1), ("co", 28.0)])
def test_ppm_at_the_conditions_of_the_epa(gas, molar_mass):
    found = value_of({gas: field(1.0, "Parts per million")}, gas, ratio="25 degC")
    assert found == pytest.approx(1000 * molar_mass / 24.45, rel=2e-3)


def test_ppb_with_the_air_of_the_file():
    variables = {"o3": field(50.0, "ppbV"), "T2": field(0.0, "degC"), "PSFC": field(800.0, "hPa")}
    at_zero = 50e-9 * 48.0 / 22.414e-3 * 1e6 * (800 / 1013.25)  # molar volume at 0 degC and 1 atm
    assert value_of(variables, "o3") == pytest.approx(at_zero, rel=1e-3)


@pytest.mark.parametrize("units", ["kg kg**-1", "kg/kg", "g g-1"])
def test_mass_ratio_is_a_share_of_the_air(units):
    """Dry air at 15 degC and 1013.25 hPa weighs 1.225 kg m-3 (International Standard Atmosphere)."""
    air = {"t2m": field(288.15, "K"), "sp": field(101325.0, "Pa")}
    assert value_of({"go3": field(1e-7, units), **air}, "o3") == pytest.approx(122.5, rel=1e-4)
    named = field(1e-7, "1", standard_name="mass_fraction_of_ozone_in_air")
    assert value_of({"var1": named, **air}, "o3") == pytest.approx(122.5, rel=1e-4)
    assert value_of({"pm2p5": field(1e-7, units), **air}, "pm25") == pytest.approx(122.5, rel=1e-4)


def test_a_ratio_without_conditions():
    readers, found = decision({"o3": field(1.0, "ppb")})
    assert readers == {}
    assert "mixing ratio" in found.found
    assert found.settle == "ratio: 20 degC"


@pytest.mark.parametrize("units", ["1", "%", "degree"])
def test_a_ratio_of_what_to_what(units):
    assert "divided by what" in decision({"o3": field(1.0, units)}, ratio="20 degC")[1].found


def test_particles_have_no_ratio_by_volume():
    assert decision({"pm25": field(1.0, "ppb")}, ratio="20 degC")[1].settle == "units: {pm25: ug m-3}"


@pytest.mark.parametrize(
    ("degrees", "u", "v"), [(0.0, 0.0, -5.0), (90.0, -5.0, 0.0), (180.0, 0.0, 5.0), (270.0, 5.0, 0.0)]
)
def test_wind_blows_from_its_direction(degrees, u, v):
    variables = {"WSPM": field(5.0, "m/s"), "wd": field(degrees, "degrees")}
    assert value_of(variables, "u") == pytest.approx(u, abs=1e-5)
    assert value_of(variables, "v") == pytest.approx(v, abs=1e-5)


def test_wind_of_a_mark_of_missing_values_is_infinite():
    variables = {"ws": field(5.0, "m/s"), "wd": field(-999.0, "degrees")}
    assert np.isinf(value_of(variables, "u"))
    variables["wd"][:] = np.nan
    assert np.isnan(value_of(variables, "u"))


def test_wind_of_wrf_is_turned():
    """Columns that lean 30 degrees: a wind along the rows of 10 m/s is (10 cos, 10 sin) of that angle."""
    turn = np.deg2rad(30)
    variables = {
        "U10": field(10.0, "m s-1"), "V10": field(0.0, "m s-1"),
        "COSALPHA": field(np.cos(turn), ""), "SINALPHA": field(np.sin(turn), ""),
    }  # fmt: skip
    assert value_of(variables, "u") == pytest.approx(10 * np.cos(turn))
    assert value_of(variables, "v") == pytest.approx(10 * np.sin(turn))


def test_humidity():
    """Vapour pressure at 10 degC is 1228.0 Pa and at 20 degC 2339.2 Pa (IAPWS-95)."""
    air = {"t2m": field(20.0, "degC"), "sp": field(1013.25, "hPa")}
    expected = 100 * 1228.0 / 2339.2
    assert value_of({"d2m": field(10.0, "degC"), **air}, "rh") == pytest.approx(expected, rel=2e-3)
    ratio = 0.62198 * 1228.0 / (101325 - 1228.0)
    assert value_of({"Q2": field(ratio, "kg kg-1"), **air}, "rh") == pytest.approx(expected, rel=2e-3)
    assert value_of({"q": field(ratio / (1 + ratio), "kg kg-1"), **air}, "rh") == pytest.approx(expected, rel=2e-3)


def test_humidity_of_the_file_comes_first():
    variables = {"rh": field(40.0, "%"), "t2m": field(293.0, "K"), "d2m": field(290.0, "K")}
    assert value_of(variables, "rh") == 40.0


def test_height_from_geopotential():
    assert value_of({"z": field(9806.65, "m**2 s**-2")}, "elevation") == pytest.approx(1000.0)


def test_valid_range_is_unpacked():
    variable = field(1.0, "ug m-3", valid_range=np.array([0, 5000], np.int16))
    variable[0, 0] = [600.0, 500.0]
    variable.encoding = {"dtype": np.dtype("int16"), "scale_factor": 0.1, "add_offset": 0.0}
    reader = describe(xr.Dataset({"pm25": variable}), Source("x.nc"), findings := Findings(), "x.nc")["pm25"]
    values = reader.convert({"pm25": variable.values})
    assert np.isnan(values[0, 0, 0])
    assert values[0, 0, 1] == 500.0
    assert "0 to 500 valid" in findings.sorted()[0].found


def test_valid_min_alone():
    variable = field(-0.5, "mg m-3", valid_min=0.0)
    assert np.isnan(value_of({"co": variable}, "co"))
