"""Units, by cf-units (UDUNITS-2), and the spellings of archives that it does not know."""

import functools
import math
import re
import unicodedata
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
    # GEOS-Chem
    "mol mol-1 dry": "mol mol-1",
    # OpenAQ, CMAQ, WRF-Chem, RAMA
    "ppb": "1e-9",
    "ppbv": "1e-9",
    "ppm": "1e-6",
    "ppmv": "1e-6",
    "pptv": "1e-12",
    "ug/kg-dryair": "ug kg-1",
    "mug m-3": "ug m-3",
    # symbols that mean something else in UDUNITS: coulomb, farad, millibarn, milliphot
    "c": "degC",
    "f": "degF",
    "mb": "hPa",
    "mph": "mile hour-1",
    # words and symbols that UDUNITS lacks; it reads "degrees Celsius" as the product of an angle and a temperature
    "deg": "degree",
    "deg c": "degC",
    "deg. c": "degC",
    "degree c": "degC",
    "degrees c": "degC",
    "degree celsius": "degC",
    "degrees celsius": "degC",
    "deg k": "K",
    "degree kelvin": "K",
    "degrees kelvin": "K",
    "deg f": "degF",
    "degree fahrenheit": "degF",
    "mcg/m3": "ug m-3",
    "mcg m-3": "ug m-3",
    "mug/m3": "ug m-3",
    "ug/m3": "ug m-3",
    "ug/cu.m": "ug m-3",
    "0-1": "1",
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

_SUPERSCRIPT = re.compile("[\u207a\u207b]?[\u00b2\u00b3\u00b9\u2070\u2074-\u2079]+")
_CUBIC = re.compile(r"\bcubic (\w+)", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z]{4,}")


def conversion(unit: str, target: str) -> tuple[float, float]:
    """Return (factor, offset): a value in `unit` times factor plus offset is the value in `target`.

    Raises:
        DataError: `unit` is not understood, measures something else, or has no such factor (a logarithm).
    """
    have, want = _parse(unit), _parse(target)
    if have is None or want is None:
        raise DataError(f"unit {(unit if have is None else target)!r} is not understood")
    import cf_units

    with cf_units.suppress_errors():
        if not have.is_convertible(want):
            raise DataError(f"unit {unit!r} cannot be converted to {target!r}")
        zero, one, hundred = (float(have.convert(value, want)) for value in (0.0, 1.0, 100.0))
    if not math.isclose(hundred - zero, 100 * (one - zero), rel_tol=1e-6):
        raise DataError(f"unit {unit!r} cannot be converted to {target!r} by a factor: it is a logarithm")
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
    """The cf_units.Unit that `text` spells; None where it is not understood."""
    import cf_units

    text = " ".join(_plain(str(text)).split())
    text = SPELLINGS.get(text.lower(), text)
    if not text or not text.isprintable():
        return None
    spelled = _CUBIC.sub(r"\1^3", text)
    spelled = re.sub(r"\s*\bper\b\s*", "/", spelled, flags=re.IGNORECASE)
    # words may be capitalized; symbols are told by case (mg and Mg, Pa and PA)
    lowered = _WORD.sub(lambda match: match[0].lower(), spelled)
    with warnings.catch_warnings(), cf_units.suppress_errors():
        warnings.simplefilter("ignore")
        for candidate in dict.fromkeys((text, spelled, lowered)):
            try:
                unit = cf_units.Unit(candidate)
            except ValueError:
                continue
            if not (unit.is_unknown() or unit.is_no_unit() or unit.is_time_reference()):
                return unit
    return None


def _plain(text: str) -> str:
    """Text with plain digits, letters and signs for the typographic ones; powers are marked by ^."""
    text = _SUPERSCRIPT.sub(lambda match: "^" + match[0], text.rstrip("\0"))
    # NFKC turns the micro sign into a Greek mu, which UDUNITS knows too; U+2212 is the minus sign
    return unicodedata.normalize("NFKC", text).replace("\u2212", "-").replace("\u00b7", ".")
