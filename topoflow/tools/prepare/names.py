"""The variables that are known by name: units, possible ranges, and what archives call them."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import xarray as xr

from topoflow.data.variables import VARIABLES


@dataclass(frozen=True)
class Known:
    """A variable or auxiliary quantity.

    unit: ours. low, high: no value in the atmosphere near the ground lies outside. molar_mass: g/mol of a gas
    (IUPAC 2021 atomic weights). standard_names: CF standard names. names: in archives, compared in lower case.
    """

    unit: str
    low: float
    high: float
    standard_names: tuple[str, ...]
    names: tuple[str, ...]
    molar_mass: float | None = None

    @property
    def is_concentration(self) -> bool:
        """Whether it is a mass per volume of air."""
        return self.unit == "ug m-3"


def _pollutant(species: str, high: float, names: str, molar_mass: float | None = None) -> Known:
    standard = tuple(f"{form}_of_{species}_in_air" for form in ("mass_concentration", "mass_fraction", "mole_fraction"))
    return Known("ug m-3", -50.0, high, standard, tuple(names.split()), molar_mass)


# Names: CAMS ADS (ads.atmosphere.copernicus.eu; *_conc: European analyses), EAC4 and ERA5 short names
# (codes.ecmwf.int/grib/param-db), WRF-Chem Registry.EM_CHEM, CMAQ (github.com/USEPA/CMAQ, COMBINE output), EMEP
# (github.com/metno/emep-ctm), AQS parameter codes (aqs.epa.gov/aqsweb/documents/codetables), EEA pollutant notations
# (dd.eionet.europa.eu/vocabulary/aq/pollutant), OpenAQ parameters (docs.openaq.org), CNEMC (quotsoft.net/air), RAMA
# (aire.cdmx.gob.mx), UCI data set 501, CAQRA (doi.org/10.11922/sciencedb.00053).
# Ranges: WMO extremes (wmo.asu.edu) for weather; hourly concentrations beyond the highest reported ones.
KNOWN: dict[str, Known] = {
    "u": Known("m s-1", -120.0, 120.0, ("eastward_wind", "x_wind"), ("u10", "10u", "10m_u_component_of_wind", "u10m")),
    "v": Known("m s-1", -120.0, 120.0, ("northward_wind", "y_wind"), ("v10", "10v", "10m_v_component_of_wind", "v10m")),
    "temp": Known("K", 180.0, 335.0, ("air_temperature",), ("t2m", "2t", "t2", "2m_temperature", "62101")),
    "rh": Known("%", -1.0, 130.0, ("relative_humidity",), ("rh2m", "r2", "62201")),
    "psfc": Known(
        "Pa", 30000.0, 110000.0, ("surface_air_pressure", "air_pressure"), ("sp", "surface_pressure", "pres", "64101")
    ),
    "pm25": _pollutant(
        "pm2p5_ambient_aerosol_particles",
        10000.0,
        "pm2p5 pm2p5_conc pm2_5_dry pm25_tot surf_ug_pm25_rh50 surf_ug_pm25 88101 88502 pm2.5 pm2_5 pm25_tot_avg",
    ),
    "pm10": _pollutant("pm10_ambient_aerosol_particles", 20000.0, "pm10_conc surf_ug_pm10 81102 pm10_tot pm10_avg"),
    "so2": _pollutant("sulfur_dioxide", 5000.0, "so2_conc surf_ug_so2 surf_ppb_so2 42401 sulphur_dioxide", 64.064),
    "no2": _pollutant("nitrogen_dioxide", 3000.0, "no2_conc surf_ug_no2 surf_ppb_no2 42602 nitrogen_dioxide", 46.006),
    "co": _pollutant("carbon_monoxide", 200000.0, "co_conc surf_ug_co surf_ppb_co 42101 carbon_monoxide", 28.010),
    "o3": _pollutant("ozone", 2000.0, "go3 o3_conc surf_ug_o3 surf_ppb_o3 44201 ozone", 47.998),
    "no": _pollutant("nitrogen_monoxide", 5000.0, "no_conc surf_ug_no 42601 nitrogen_monoxide", 30.006),
    "nh3": _pollutant("ammonia", 5000.0, "nh3_conc surf_ug_nh3 42604 ammonia", 17.031),
    "blh": Known("m", 0.0, 12000.0, ("atmosphere_boundary_layer_thickness",), ("blh", "pblh", "pbl")),
    "tp": Known("m", -1e-4, 2.0, ("lwe_thickness_of_precipitation_amount",), ("tp", "total_precipitation")),
    "ssrd": Known("J m-2", -1e4, 3e7, ("surface_downwelling_shortwave_flux_in_air",), ("ssrd", "swdown")),
    "aod550": Known(
        "1",
        -0.1,
        20.0,
        ("atmosphere_optical_thickness_due_to_ambient_aerosol_particles",),
        ("aod550", "total_aerosol_optical_depth_550nm"),
    ),
    "elevation": Known(
        "m",
        -500.0,
        9000.0,
        ("surface_altitude", "height_above_mean_sea_level", "altitude"),
        ("hgt", "hgt_m", "topo", "orog", "height", "terrain", "altitude"),
    ),
    "population": Known("1", 0.0, 1e8, (), ("population", "pop", "population_count")),
    "wind_speed": Known("m s-1", 0.0, 120.0, ("wind_speed",), ("wspm", "ws", "wsp", "windspeed", "61101", "61103")),
    "wind_direction": Known(
        "degree", 0.0, 360.0, ("wind_from_direction",), ("wd", "wdir", "wdr", "winddirection", "61102", "61104")
    ),
    "dew_point": Known(
        "K", 150.0, 320.0, ("dew_point_temperature",), ("d2m", "2d", "2m_dewpoint_temperature", "dewp", "dew_point")
    ),
    "geopotential": Known("m2 s-2", -5000.0, 90000.0, ("geopotential", "surface_geopotential"), ("z", "geopotential")),
}

AUXILIARY = ("wind_speed", "wind_direction", "dew_point", "geopotential")
"""Quantities that others are computed from; they are not written."""

_PLAIN_WEATHER = {"temp": ("tmp", "t"), "psfc": ("ps",)}
"""Short names that mean something else in other files: matched only where their unit fits too."""


def find_names(dataset: xr.Dataset, given: Mapping[str, str], fits) -> dict[str, list[str]]:
    """Return {our name: names in the file that may be it}, the recipe's `given` first and alone.

    fits: (our name, name in the file) -> whether its unit can be ours, or is not stated.
    """
    taken = set(given.values())
    found: dict[str, list[str]] = {ours: [theirs] for ours, theirs in given.items() if theirs in dataset.variables}
    for ours, known in KNOWN.items():
        if ours in given:
            continue
        others = [name for name in dataset.variables if str(name) not in taken and dataset[name].dims]
        for match in (_by_our_name, _by_standard_name, _by_archive_name):
            names = [str(name) for name in others if match(dataset, name, ours, known) and fits(ours, str(name))]
            if names:
                found[ours] = names
                break
    return found


def _by_our_name(dataset: xr.Dataset, name: Hashable, ours: str, known: Known) -> bool:
    return _plain(name) == ours


def _by_standard_name(dataset: xr.Dataset, name: Hashable, ours: str, known: Known) -> bool:
    return str(dataset[name].attrs.get("standard_name", "")) in known.standard_names


def _by_archive_name(dataset: xr.Dataset, name: Hashable, ours: str, known: Known) -> bool:
    return _plain(name) in known.names or _plain(name) in _PLAIN_WEATHER.get(ours, ())


def _plain(name: Hashable) -> str:
    return str(name).strip().lower()


def is_known_static(name: str) -> bool:
    """Return whether a variable does not change in time."""
    return name in VARIABLES and VARIABLES[name].kind == "static"
