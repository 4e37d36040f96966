"""The table of known variables."""

from cf_units import Unit

from topoflow.data.variables import POLLUTANTS, UNNORMALIZED, VARIABLES, known_or_plain


def test_the_table_is_consistent():
    assert all(VARIABLES[name].kind == "dynamic" and VARIABLES[name].unit == "ug m-3" for name in POLLUTANTS)
    assert all(VARIABLES[name].kind == "computed" for name in UNNORMALIZED)
    for variable in VARIABLES.values():
        assert Unit(variable.unit).convert(1.0, variable.display_unit) == variable.display_scale


def test_a_further_variable_is_shown_as_it_is():
    blh = known_or_plain("blh", "m")
    assert (blh.long_name, blh.display_unit, blh.display_scale) == ("blh", "m", 1.0)
    assert known_or_plain("co", "ug m-3") is VARIABLES["co"]
