"""Weather of the demo world: travelling disturbances that turn the wind over days, sunlight, effect of height."""

from dataclasses import dataclass

import numpy as np

from topoflow.tools.demo.geography import Geography

TURN_HOURS = 132.0
"""Time of a full turn of the wind under a disturbance of typical strength."""
WAVE_M = 1.6e6
"""Wavelength of the disturbances."""
VIGOUR_HOURS, HASTE_HOURS = 96.0, 72.0
"""Memory of the red noise in the strength and in the pace of the disturbances."""
ERROR_HOURS = 150.0
"""Time in which forecasts of both lose their skill."""
GRAVITY, GAS_CONSTANT, LAPSE_K_PER_M = 9.80665, 287.05, 6.5e-3
"""m s-2; J kg-1 K-1 of dry air; lapse rate of the standard atmosphere (ISO 2533)."""


@dataclass(frozen=True)
class Weather:
    """Large-scale weather of each hour; `weather_fields` turns it into fields."""

    times: np.ndarray
    """datetime64[h] [T], local solar time."""
    vigour: np.ndarray
    """Red noise from which the strength follows [T]."""
    haste: np.ndarray
    """Red noise from which the pace of the disturbance follows, with its strength [T]."""
    strength: np.ndarray
    """Strength of the disturbance relative to the typical one [T]."""
    phase: np.ndarray
    """Phase of the disturbance at the west edge, radians, rising with time [T]."""
    steering_ms: np.ndarray
    """Large-scale wind, eastward and northward [T, 2]."""


@dataclass(frozen=True)
class WeatherFields:
    """Fields at some hours, each [n, H, W]."""

    u: np.ndarray
    v: np.ndarray
    temp: np.ndarray
    rh: np.ndarray
    psfc: np.ndarray
    rain: np.ndarray
    """Rain rate in mm per hour."""
    sun: np.ndarray
    """Sunlight at the ground, 1 under a clear sky with the sun overhead."""


def red_noise(hours: int, memory_hours: float, generator: np.random.Generator, series: int = 1) -> np.ndarray:
    """Return Gaussian noise of variance 1 whose correlation falls to 1/e in `memory_hours`: [hours, series]."""
    keep = float(np.exp(-1 / memory_hours))
    kicks = generator.standard_normal((hours, series)) * np.sqrt(1 - keep**2)
    noise = np.empty((hours, series))
    state = generator.standard_normal(series)
    for hour in range(hours):
        state = keep * state + kicks[hour]
        noise[hour] = state
    return noise


def draw_weather(times: np.ndarray, generator: np.random.Generator) -> Weather:
    """Draw a history of the large-scale weather over `times` [T].

    The wind turns with the phase of the disturbance, faster in strong ones, at a rate that also varies at random. So
    the next two days can be predicted from the present fields, later ones less and less.
    """
    hours = len(times)
    vigour, haste = red_noise(hours, VIGOUR_HOURS, generator)[:, 0], red_noise(hours, HASTE_HOURS, generator)[:, 0]
    return _weather(times, vigour, haste, generator.uniform(0, 2 * np.pi))


def _weather(times: np.ndarray, vigour: np.ndarray, haste: np.ndarray, phase: float) -> Weather:
    """The weather of a disturbance whose strength and pace vary as two series of red noise, from a phase on."""
    strength = np.exp(0.4 * vigour)
    pace = (0.55 + 0.45 * strength) * (1 + 0.15 * haste)
    phases = phase + np.cumsum(2 * np.pi / TURN_HOURS * pace)
    speed = 3.2 * strength
    steering = np.stack([0.5 + speed * np.cos(phases), 0.9 * speed * np.sin(phases)], axis=1)
    return Weather(times, vigour, haste, strength, phases, steering)


def forecast_weather(weather: Weather, issue: int, hours: int, generator: np.random.Generator) -> Weather:
    """Draw a forecast of `weather` for its hours from `issue` on, at most `hours`.

    It begins as the weather is; strength and pace then follow it with a correlation that falls to 1/e in ERROR_HOURS,
    and errors of the phase add up: the wind's correlation is 0.97, 0.92, 0.84 and 0.73 after 1, 2, 3 and 4 days.
    """
    ahead = slice(issue, issue + hours)
    r = np.exp(-np.arange(len(weather.times[ahead])) / ERROR_HOURS)
    others = (red_noise(len(r), memory, generator)[:, 0] for memory in (VIGOUR_HOURS, HASTE_HOURS))
    series = zip((weather.vigour[ahead], weather.haste[ahead]), others, strict=True)
    vigour, haste = (r * truth + np.sqrt(1 - r**2) * other for truth, other in series)
    phase = float(weather.phase[issue - 1])
    return _weather(weather.times[ahead], vigour, haste, phase)


def weather_fields(weather: Weather, hours: slice, geography: Geography) -> WeatherFields:
    """Return the fields at some hours of `weather`; temperature, vapour and pressure fall with terrain height."""
    times = weather.times[hours]
    hour = ((times - times.astype("datetime64[D]")) / np.timedelta64(1, "h"))[:, None, None]
    day = ((times - times.astype("datetime64[Y]")) / np.timedelta64(24, "h"))[:, None, None]
    east_m = np.arange(len(geography.lon)) * geography.dx_m
    wave = weather.phase[hours, None, None] - 2 * np.pi * east_m / WAVE_M
    strength = weather.strength[hours, None, None]
    height_m = geography.elevation_m
    u, v = geography.wind(weather.steering_ms[hours])

    # rain falls behind the trough, more where air rises over terrain
    rising = np.maximum(_uphill(u, v, geography), 0.0)
    rain = np.maximum(strength * np.cos(wave - 2.4) - 0.75, 0.0) * (1.5 + 25.0 * np.minimum(rising, 0.1))
    cloud = np.clip(0.25 + 0.55 * np.cos(wave - 2.2) * strength, 0.0, 0.9)
    sun = _sun_height(geography.lat[:, None], day, hour) * (1 - 0.7 * cloud)

    # seasonal and daily cycle (warmest in the afternoon, weaker under cloud), and the disturbance's warm sector
    sea_temp = 288.0 - 5.0 * np.cos(2 * np.pi * (day - 20) / 365.25) - 0.5 * (geography.lat[:, None] - geography.lat[0])
    daily = 4.5 * (1 - 0.6 * cloud) * np.cos(2 * np.pi * (hour - 14.5) / 24)
    temp = sea_temp + daily + 4.0 * strength * np.sin(wave + 0.4) - LAPSE_K_PER_M * height_m
    sea_pressure = 101800.0 - 700.0 * strength * np.cos(wave - 1.9)
    # hypsometric equation with the mean temperature of the air column below
    psfc = sea_pressure * np.exp(-GRAVITY * height_m / (GAS_CONSTANT * (temp + LAPSE_K_PER_M * height_m / 2)))
    vapour = 1000.0 * np.exp(-height_m / 1600.0) * (1 + 0.35 * np.cos(wave - 1.8)) * (sea_temp / 288.0) ** 12
    rh = np.clip(100.0 * vapour / saturation_pressure(temp), 8.0, 100.0)
    return WeatherFields(u, v, temp, rh, psfc, rain, np.broadcast_to(sun, u.shape))


def saturation_pressure(temp: np.ndarray) -> np.ndarray:
    """Return the saturation pressure over water in Pa, temp in K (Bolton 1980, Mon. Wea. Rev. 108, 1046, eq. 10)."""
    celsius = temp - 273.15
    return 611.2 * np.exp(17.67 * celsius / (celsius + 243.5))


def _uphill(u: np.ndarray, v: np.ndarray, geography: Geography) -> np.ndarray:
    """Return the vertical wind at the ground in m/s, which follows the slope of the terrain."""
    slope_y, slope_x = np.gradient(geography.elevation_m, geography.dy_m, geography.dx_m)
    return u * slope_x + v * slope_y


def _sun_height(lat: np.ndarray, day: np.ndarray, hour: np.ndarray) -> np.ndarray:
    """Return the sine of the sun's height, 0 at night; declination by Cooper (1969, Solar Energy 12, 333)."""
    declination = np.radians(23.45) * np.sin(2 * np.pi * (284 + day + 1) / 365)
    phi = np.radians(lat)
    turn = 2 * np.pi * (hour - 12) / 24
    return np.maximum(np.sin(phi) * np.sin(declination) + np.cos(phi) * np.cos(declination) * np.cos(turn), 0.0)
