"""Units, by cf-units (UDUNITS-2), and the spellings of archives that it does not know."""

import functools
import re
import warnings

from topoflow.errors import DataError

SPELLINGS = {
    # EPA AQS, hourly files (aqs.epa.gov/aqsweb/documents/codetables/units.html); LC: at local conditions
    "micrograms/cubic meter (lc)": "ug m-3",
    "micrograms/cubic meter (25 c)": "ug m-3",
    "milligrams/cubic meter (25 c)": "mg m-3",
    "parts per billion": "1e-9",
    "parts per million": "1e-6",
    "degrees fahrenheit": "degF",
    "degrees centigrade": "degC",
    "knots": "knot",
    "percent relative humidity": "%",
    "degrees compass": "degree",
    "millibars": "hPa",
    "meters/second": "m s-1",
    # ECMWF, CAMS and ERA5 (codes.ecmwf.int/grib/param-db)
    "(0 - 1)": "1",
    "~": "1",
    "m of water equivalent": "m",
    "gpm": "m",
    # OpenAQ, CMAQ, WRF-Chem, RAMA
    "ppb": "1e-9",
    "ppbv": "1e-9",
    "ppm": "1e-6",
    "ppmv": "1e-6",
    "pptv": "1e-12",
    "ug/kg-dryair": "ug kg-1",
    "mug m-3": "ug m-3",
    # words and symbols without a meaning of their own in UDUNITS; "C" is the coulomb there
    "c": "degC",
    "deg c": "degC",
    "deg k": "K",
    "mcg/m3": "ug m-3",
    "people": "1",
    "persons": "1",
    "person": "1",
    "inhabitants": "1",
    "cell": "1",
    "number": "1",
    "dimensionless": "1",
    "fraction": "1",
    "pct": "%",
    "percent": "%",
}
"""Exact spellings, in lower case, and what they mean."""

_CUBIC = re.compile(r"\bcubic (\w+)", re.IGNORECASE)


def conversion(unit: str, target: str) -> tuple[float, float]:
    """Return (factor, offset): a value in `unit` times factor plus offset is the value in `target`.

    Raises:
        DataError: `unit` is not understood, or measures something else.
    """
    have, want = _parse(unit), _parse(target)
    if have is None or want is None:
        raise DataError(f"unit {(unit if have is None else target)!r} is not understood")
    if not have.is_convertible(want):
        raise DataError(f"unit {unit!r} cannot be converted to {target!r}")
    zero, one = (float(have.convert(value, want)) for value in (0.0, 1.0))
    # twelve digits: what the products of powers of ten are meant to be
    return float(f"{one - zero:.12g}"), float(f"{zero:.12g}")


def is_convertible(unit: str, target: str) -> bool:
    """Return whether `unit` is understood and measures the same as `target`."""
    try:
        conversion(unit, target)
    except DataError:
        return False
    return True


@functools.lru_cache(maxsize=1000)
def _parse(text: str):
    import cf_units

    text = " ".join(str(text).replace("\u2212", "-").replace("\u00a0", " ").split())
    text = SPELLINGS.get(text.lower(), text)
    if not text:
        return None
    spelled = _CUBIC.sub(r"\1^3", text)
    spelled = re.sub(r"\s*\bper\b\s*", "/", spelled, flags=re.IGNORECASE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for candidate in dict.fromkeys((text, spelled, spelled.lower())):
            try:
                unit = cf_units.Unit(candidate)
            except ValueError:
                continue
            if not unit.is_unknown() and not unit.is_no_unit():
                return unit
    return None
