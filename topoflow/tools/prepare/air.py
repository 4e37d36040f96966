"""Formulas of air: concentrations from mixing ratios, humidity and wind. All in SI units but where it says so."""

import numpy as np

GAS_CONSTANT = 8.314462618
"""J/(mol K), CODATA 2018."""
DRY_AIR_MOLAR_MASS = 28.9647
"""g/mol, US Standard Atmosphere 1976."""
STANDARD_PRESSURE_PA = 101325.0
GRAVITY = 9.80665
"""m s-2, standard gravity."""
_VAPOUR_TO_DRY_AIR = 18.015 / DRY_AIR_MOLAR_MASS


def concentration(ratio: np.ndarray, molar_mass: float, kelvin, pascal) -> np.ndarray:
    """Return ug m-3 of a gas with `ratio` mol/mol and `molar_mass` g/mol (ideal gas).

    For a mass ratio, kg per kg of air, give the molar mass of dry air.
    """
    return ratio * molar_mass * 1e6 * pascal / (GAS_CONSTANT * kelvin)


def vapour_pressure(dew_point: np.ndarray) -> np.ndarray:
    """Return the pressure of vapour, Pa, that is saturated over water at `dew_point` K (Bolton 1980, equation 10)."""
    celsius = dew_point - 273.15
    return 611.2 * np.exp(17.67 * celsius / (celsius + 243.5))


def humidity_from_dew_point(kelvin: np.ndarray, dew_point: np.ndarray) -> np.ndarray:
    """Return relative humidity over water in %."""
    return 100 * vapour_pressure(dew_point) / vapour_pressure(kelvin)


def humidity_from_vapour_ratio(kelvin: np.ndarray, pascal: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """Return relative humidity over water in %. ratio: kg of vapour per kg of dry air."""
    return 100 * pascal * ratio / (_VAPOUR_TO_DRY_AIR + ratio) / vapour_pressure(kelvin)


def wind_from_direction(speed: np.ndarray, degrees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return eastward and northward wind. degrees: where the wind comes from, clockwise from north."""
    return -speed * np.sin(np.deg2rad(degrees)), -speed * np.cos(np.deg2rad(degrees))
