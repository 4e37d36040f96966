"""Known variables and the spellings of units."""

import pytest

from topoflow.data.variables import POLLUTANTS, UNNORMALIZED, VARIABLES, check_names, same_unit, unit_conversion
from topoflow.errors import ConfigError, DataError


@pytest.mark.parametrize(
    "text",
    ["ug m-3", "ug/m3", "ug/m^3", "ug m^-3", "ug m**-3", "ug.m-3", "\u00b5g/m\u00b3", "\u03bcg m\u207b\u00b3",
     "micrograms per cubic metre", "Micrograms/m**3", "1e-9 kg m-3", "m-3 ug", "  ug/m3 "],
)  # fmt: skip
def test_spellings_of_micrograms_per_cubic_metre(text):
    assert same_unit(text, "ug m-3")
    assert unit_conversion(text, "ug m-3") == (1.0, 0.0)


@pytest.mark.parametrize(
    "text", ["mg m-3", "kg m-3", "ug m-2", "ug", "ug m3", "ppb", "", "K", "2 ug m-3", "Ug m-3", "ug//m3"]
)
def test_what_is_not_micrograms_per_cubic_metre(text):
    assert not same_unit(text, "ug m-3")


@pytest.mark.parametrize(
    ("unit", "target", "value", "expected"),
    [
        ("mg/m3", "ug m-3", 1.5, 1500.0),
        ("kg m**-3", "ug m-3", 2e-9, 2.0),
        ("ng m-3", "ug m-3", 500.0, 0.5),
        ("degC", "K", 20.0, 293.15),
        ("K", "degC", 273.15, 0.0),
        ("\u2103", "K", 0.0, 273.15),
        ("hPa", "Pa", 1013.25, 101325.0),
        ("mbar", "Pa", 1.0, 100.0),
        ("km/h", "m s-1", 36.0, 10.0),
        ("m s**-1", "m s-1", 3.0, 3.0),
        ("1", "%", 0.5, 50.0),
        ("percent", "%", 7.0, 7.0),
        ("km", "m", 1.2, 1200.0),
        ("people", "1", 4.0, 4.0),
        ("cm s-1", "m s-1", 250.0, 2.5),
    ],
)
def test_conversion_of_values(unit, target, value, expected):
    scale, offset = unit_conversion(unit, target)
    assert value * scale + offset == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_units_of_different_things_are_refused_by_name():
    with pytest.raises(DataError, match="'m s-1' cannot be converted to 'K'"):
        unit_conversion("m s-1", "K")
    with pytest.raises(DataError, match="'ppb' is not understood"):
        unit_conversion("ppb", "ug m-3")


def test_the_table_is_consistent():
    assert all(VARIABLES[name].kind == "dynamic" and VARIABLES[name].unit == "ug m-3" for name in POLLUTANTS)
    assert all(VARIABLES[name].kind == "computed" for name in UNNORMALIZED)
    co = VARIABLES["co"]
    assert unit_conversion(co.unit, co.display_unit) == (co.display_scale, 0.0)
    others = [variable for variable in VARIABLES.values() if variable.name != "co"]
    assert all(variable.display_unit == variable.unit and variable.display_scale == 1 for variable in others)


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (("u", "pm2.5"), ("o3",), "data.variables: 'pm2.5' is not a variable .nearest: pm25"),
        (("u",), ("ozone",), "data.targets: 'ozone'"),
        (("u",), ("elevation",), "data.targets: 'elevation' is static"),
        (("u",), ("hour_sin",), "data.targets: 'hour_sin' is computed"),
        (("u", "available"), ("o3",), "data.variables: 'available'.*data.availability"),
    ],
)
def test_names_that_are_not_allowed_there(inputs, targets, message):
    with pytest.raises(ConfigError, match=message):
        check_names(inputs, targets)
