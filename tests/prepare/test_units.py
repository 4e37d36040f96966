"""Units: spellings of archives are understood as they mean, and all else is refused by name."""

import pytest
from scipy import constants

from topoflow.errors import DataError
from topoflow.tools.prepare.units import conversion, is_convertible

MICROGRAMS = (
    "ug m-3", "ug/m3", "ug/m^3", "ug m^-3", "ug m**-3", "ug.m-3", "UG/M3", "\u00b5g/m\u00b3", "\u03bcg/m\u00b3",
    "\u03bcg m\u207b\u00b3", "ug m\u22123", "ug\u00b7m-3", "micrograms m-3", "micrograms per cubic metre",
    "Micrograms/cubic meter (LC)", "Micrograms/cubic meter (25 C)", "1e-9 kg m-3", "10\u207b\u2079 kg m\u207b\u00b3",
    "mcg/m3", "mug m-3", "ug m-3\0", " ug  m-3 ",
)  # fmt: skip


@pytest.mark.parametrize("unit", MICROGRAMS)
def test_spellings_of_micrograms(unit):
    assert conversion(unit, "ug m-3") == (1.0, 0.0)


@pytest.mark.parametrize(
    ("unit", "target", "factor"),
    [
        ("kg m**-3", "ug m-3", 1e9),
        ("mg/m\u00b3", "ug m-3", 1e3),
        ("Milligrams/cubic meter (25 C)", "ug m-3", 1e3),
        ("ng m-3", "ug m-3", 1e-3),
        ("Mg m-3", "ug m-3", 1e12),
        ("Parts per billion", "1", 1e-9),
        ("ppbV", "1", 1e-9),
        ("ppmv", "1", 1e-6),
        ("nmol/mol", "1", 1e-9),
        ("ug/kg-dryair", "kg kg-1", 1e-9),
        ("kg kg**-1", "kg kg-1", 1.0),
        ("(0 - 1)", "%", 100.0),
        (1, "%", 100.0),
        ("Percent relative humidity", "%", 1.0),
        ("Knots", "m s-1", constants.knot),
        ("kt", "m s-1", constants.knot),
        ("mph", "m s-1", constants.mph),
        ("km/h", "m s-1", constants.kmh),
        ("mb", "Pa", constants.bar / 1000),
        ("atm", "Pa", constants.atm),
        ("Degrees Compass", "degree", 1.0),
        ("radian", "degree", 1 / constants.degree),
        ("m**2 s**-2", "m2 s-2", 1.0),
    ],
)
def test_factors(unit, target, factor):
    found, offset = conversion(unit, target)
    assert found == pytest.approx(factor, rel=1e-8)
    assert offset == 0.0


@pytest.mark.parametrize(
    "unit",
    ["C", "\u00b0C", "\u2103", "degC", "deg C", "deg_C", "celsius", "Celsius", "degree_C", "degrees_celsius",
     "Degrees Celsius", "degree celsius", "degrees C", "Degrees Centigrade"],
)  # fmt: skip
def test_degrees_celsius(unit):
    factor, offset = conversion(unit, "K")
    assert factor * 21.5 + offset == pytest.approx(constants.convert_temperature(21.5, "Celsius", "Kelvin"))


@pytest.mark.parametrize("unit", ["Degrees Fahrenheit", "degF", "F", "\u00b0F"])
def test_degrees_fahrenheit(unit):
    factor, offset = conversion(unit, "K")
    assert factor * 70 + offset == pytest.approx(constants.convert_temperature(70, "Fahrenheit", "Kelvin"))


@pytest.mark.parametrize("unit", ["K", "Kelvin", "degK", "degrees Kelvin", "Degrees Kelvin"])
def test_kelvin(unit):
    assert conversion(unit, "K") == (1.0, 0.0)


@pytest.mark.parametrize(
    "unit",
    ["", " ", "\0", "ug\0m-3", "unknown", "no_unit", "micro", "ppbC", "ugS/m3", "ugm-3", "MG/M3", "HPA", "per",
     "hours since 2019-01-01", "\u00e9", "(((", "x" * 5000],
)  # fmt: skip
def test_what_is_not_understood(unit, capfd):
    """Nothing is guessed, and the C library prints nothing."""
    with pytest.raises(DataError, match="is not understood"):
        conversion(unit, unit)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("unit", "target"),
    [("K", "ug m-3"), ("ppb", "ug m-3"), ("ug C m-3", "ug m-3"), ("kg m-2", "m"), ("W m-2", "J m-2")],
)
def test_what_measures_another_thing(unit, target):
    assert not is_convertible(unit, target)
    with pytest.raises(DataError, match="cannot be converted to"):
        conversion(unit, target)


def test_a_logarithm_has_no_factor(capfd):
    with pytest.raises(DataError, match="logarithm"):
        conversion("lg(re 1 mW)", "W")
    assert capfd.readouterr().err == ""
