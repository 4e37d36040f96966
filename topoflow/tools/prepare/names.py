"""The variables that are known by name: units, possible ranges, and what archives call them."""

import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import xarray as xr


@dataclass(frozen=True)
class Known:
    """A variable or auxiliary quantity.

    unit: ours. low, high: no value in the atmosphere near the ground lies outside. molar_mass: g/mol of a gas.
    standard_names: CF standard names. names: in archives, compared in lower case; exact: compared as they are.
    least_top: the largest value of a file with data in the right unit is above this.
    other_units: what files hold whose stated unit is wrong, the most different first.
    """

    unit: str
    low: float
    high: float
    standard_names: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()
    molar_mass: float | None = None
    least_top: float | None = None
    other_units: tuple[str, ...] = ()

    @property
    def is_concentration(self) -> bool:
        """Whether it is a mass per volume of air."""
        return self.unit == "ug m-3"


def _concentration(
    species: tuple[str, ...], high: float, *names: str, molar_mass: float | None = None, least_top: float = 1e-4
) -> Known:
    forms = ("mass_concentration", "mass_fraction", "mole_fraction")
    standard = tuple(f"{form}_of_{one}_in_air" for form in forms for one in species)
    return Known(
        "ug m-3", -50.0, high, standard, names, molar_mass=molar_mass, least_top=least_top,
        other_units=("kg m-3", "mg m-3"),
    )  # fmt: skip


def _particles(size: str) -> tuple[str, ...]:
    return tuple(f"{size}_{kind}_particles" for kind in ("ambient_aerosol", "dry_aerosol"))


# Names: CF standard names (cfconventions.org), CAMS European analyses (*_conc; ads.atmosphere.copernicus.eu), EAC4 and
# ERA5 (codes.ecmwf.int/grib/param-db), WRF-Chem (Registry.EM_COMMON and registry.chem, github.com/wrf-model/WRF), CMAQ
# COMBINE (github.com/USEPA/CMAQ, SpecDef files), EMEP (github.com/metno/emep-ctm), AQS parameter codes and names
# (aqs.epa.gov/aqsweb/documents/codetables/parameters.html), EEA pollutant numbers and notations
# (dd.eionet.europa.eu/vocabulary/aq/pollutant), OpenAQ (docs.openaq.org), CNEMC (quotsoft.net/air), RAMA
# (aire.cdmx.gob.mx), Beijing (UCI data set 501), CAQRA (doi.org/10.11922/sciencedb.00053, which has our names).
# Molar masses: IUPAC standard atomic weights 2021, abridged. Ranges: WMO records (wmo.asu.edu) for weather; for
# concentrations more than the highest hourly ones that were published.
KNOWN: dict[str, Known] = {
    "u": Known("m s-1", -120.0, 120.0, ("eastward_wind",), ("u10", "10u", "10m_u_component_of_wind", "u10m")),
    "v": Known("m s-1", -120.0, 120.0, ("northward_wind",), ("v10", "10v", "10m_v_component_of_wind", "v10m")),
    "temp": Known(
        "K", 180.0, 335.0, ("air_temperature",),
        ("t2m", "2t", "t2", "2m_temperature", "temperature", "tmp", "sfc_tmp", "62101", "outdoor temperature"), ("t",),
        other_units=("degC", "degF"),
    ),
    "rh": Known(
        "%", -1.0, 130.0, ("relative_humidity",),
        ("rh2m", "r2", "62201", "relativehumidity", "relative humidity", "relative_humidity"),
        least_top=2.0, other_units=("1",),
    ),
    "psfc": Known(
        "Pa", 30000.0, 110000.0, ("surface_air_pressure", "air_pressure"),
        ("sp", "surface_pressure", "pres", "ps", "pba", "64101", "barometric pressure", "pressure"),
        other_units=("kPa", "hPa"),
    ),
    "pm25": _concentration(
        _particles("pm2p5"), 10000.0, "pm2p5", "pm2p5_conc", "pm2.5", "pm2_5", "pm2_5_dry", "pm25_tot", "pm25_tot_avg",
        "surf_ug_pm25", "surf_ug_pm25_rh50", "88101", "88502", "pm2.5 - local conditions", "6001",
        "acceptable pm2.5 aqi & speciation mass",
    ),
    "pm10": _concentration(
        _particles("pm10"), 20000.0, "pm10_conc", "pm10_tot", "pm10_avg", "surf_ug_pm10", "surf_ug_pm10_rh50", "81102",
        "85101", "pm10 total 0-10um stp", "pm10 - lc", "5",
    ),
    "so2": _concentration(
        ("sulfur_dioxide",), 5000.0, "so2_conc", "surf_ug_so2", "surf_ppb_so2", "42401", "sulfur dioxide",
        "sulfur_dioxide", "sulphur_dioxide", "1", molar_mass=64.058,
    ),
    "no2": _concentration(
        ("nitrogen_dioxide",), 3000.0, "no2_conc", "surf_ug_no2", "surf_ppb_no2", "42602", "nitrogen dioxide (no2)",
        "nitrogen_dioxide", "8", molar_mass=46.005,
    ),
    "co": _concentration(
        ("carbon_monoxide",), 200000.0, "co_conc", "surf_ug_co", "surf_ppb_co", "42101", "carbon monoxide",
        "carbon_monoxide", "10", molar_mass=28.010, least_top=20.0,
    ),
    "o3": _concentration(
        ("ozone",), 2000.0, "go3", "o3_conc", "surf_ug_o3", "surf_ppb_o3", "44201", "ozone", "7", molar_mass=47.997,
    ),
    "no": _concentration(
        ("nitrogen_monoxide",), 5000.0, "no_conc", "surf_ug_no", "surf_ppb_no", "42601", "nitric oxide (no)",
        "nitrogen_monoxide", "38", molar_mass=30.006,
    ),
    "nh3": _concentration(
        ("ammonia",), 5000.0, "nh3_conc", "surf_ug_nh3", "surf_ppb_nh3", "42604", "ammonia", "35", molar_mass=17.031,
    ),
    "blh": Known(
        "m", 0.0, 12000.0, ("atmosphere_boundary_layer_thickness",), ("pblh", "pbl", "boundary_layer_height", "hmix"),
        least_top=20.0, other_units=("km",),
    ),
    "tp": Known(
        "m", -1e-4, 2.0, ("lwe_thickness_of_precipitation_amount",), ("total_precipitation",), other_units=("mm",)
    ),
    "ssrd": Known(
        "J m-2", -1e4, 5e7, ("integral_wrt_time_of_surface_downwelling_shortwave_flux_in_air",),
        ("surface_solar_radiation_downwards",),
    ),
    "aod550": Known(
        "1", -0.1, 20.0, ("atmosphere_optical_thickness_due_to_ambient_aerosol_particles",),
        ("total_aerosol_optical_depth_550nm",),
    ),
    "elevation": Known(
        "m", -500.0, 9000.0, ("surface_altitude", "height_above_mean_sea_level", "altitude"),
        ("hgt", "hgt_m", "topo", "orog", "height", "terrain", "altitude"), other_units=("km",),
    ),
    "population": Known("1", 0.0, 1e8, (), ("pop", "population_count")),
    "wind_speed": Known(
        "m s-1", 0.0, 120.0, ("wind_speed",),
        ("wspm", "ws", "wsp", "windspeed", "wspd10", "ws_10m", "61101", "61103", "wind speed - scalar",
         "wind speed - resultant"),
    ),
    "wind_direction": Known(
        "degree", 0.0, 360.0, ("wind_from_direction",),
        ("wd", "wdir", "wdr", "winddirection", "wdir10", "61102", "61104", "wind direction - scalar",
         "wind direction - resultant"),
    ),
    "dew_point": Known(
        "K", 150.0, 320.0, ("dew_point_temperature",), ("d2m", "2d", "2m_dewpoint_temperature", "dewp", "td2", "62103"),
    ),
    "specific_humidity": Known("kg kg-1", -1e-3, 0.06, ("specific_humidity",), ("q2m", "2sh", "sh2"), ("q",)),
    "vapour_ratio": Known("kg kg-1", -1e-3, 0.06, ("humidity_mixing_ratio",), ("q2",)),
    "geopotential": Known("m2 s-2", -5000.0, 90000.0, ("geopotential", "surface_geopotential"), (), ("z",)),
}  # fmt: skip

AUXILIARY = ("wind_speed", "wind_direction", "dew_point", "specific_humidity", "vapour_ratio", "geopotential")
"""Quantities that others are computed from; they are not written."""

_UNIT_IN_NAME = re.compile(r" \[[^]]*\]$")


def find_names(
    dataset: xr.Dataset, given: Mapping[str, str], fits: Callable[[str, str], bool]
) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    """Return {our name: names in the file that may be it}, the recipe's `given` first and alone, and what fits not.

    Of our name, CF standard name and an archive's name, the first that occurs counts.

    Args:
        dataset: names as in the file.
        given: {our name: name in the file}.
        fits: (our name, name in the file) -> whether its unit can be ours, or is not stated.

    Returns:
        The names, and (our name, name in the file) of variables with our name and the unit of something else.
    """
    taken = set(given.values())
    found: dict[str, list[str]] = {ours: [theirs] for ours, theirs in given.items() if theirs in dataset.variables}
    others = [str(n) for n in dataset.variables if n not in taken and n not in dataset.dims and dataset[n].dims]
    misfits = []
    for ours, known in KNOWN.items():
        if ours in given:
            continue
        for match in (_is_our_name, _is_standard_name, _is_archive_name):
            having = [name for name in others if match(dataset, name, ours, known)]
            names = [name for name in having if fits(ours, name)]
            if match is _is_our_name:
                misfits += [(ours, name) for name in having if name not in names]
            if names:
                found[ours] = names
                break
    return found, misfits


def _is_our_name(dataset: xr.Dataset, name: Hashable, ours: str, known: Known) -> bool:
    # WRF's U and V are on model levels, and No numbers the rows of tables
    plain = _UNIT_IN_NAME.sub("", str(name).strip())
    if len(ours) == 1:
        return plain == ours
    return plain in (ours, ours.upper()) if len(ours) == 2 else plain.lower() == ours


def _is_standard_name(dataset: xr.Dataset, name: Hashable, ours: str, known: Known) -> bool:
    return str(dataset[name].attrs.get("standard_name", "")).strip() in known.standard_names


def _is_archive_name(dataset: xr.Dataset, name: Hashable, ours: str, known: Known) -> bool:
    plain = _UNIT_IN_NAME.sub("", str(name).strip())
    return plain.lower() in known.names or plain in known.exact
