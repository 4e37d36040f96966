"""Input channels of the network: a variable at an hour relative to the start of the forecast, or carried to it."""

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from topoflow.config import DataConfig
from topoflow.data.prepared.reader import PreparedData
from topoflow.data.variables import VARIABLES
from topoflow.errors import ConfigError, DataError

COMPUTED = tuple(name for name, variable in VARIABLES.items() if variable.kind == "computed")
"""Variables that are made from the clock, the coordinates or the other inputs."""


@dataclass(frozen=True)
class Channel:
    """`variable` at so many `hours` after the start (before it, if negative). Of fields that do not change, 0.

    advected: what the wind carries from the start to that hour, see `data.advect`.
    """

    variable: str
    hours: int = 0
    advected: bool = False

    @property
    def name(self) -> str:
        """As in `u`, `u+12h`, `pm25-24h`, `pm25_advected+12h`."""
        if self.advected:
            return f"{self.variable}_advected{self.hours:+d}h"
        return f"{self.variable}{self.hours:+d}h" if self.hours else self.variable


def input_channels(config: DataConfig) -> tuple[Channel, ...]:
    """Return the network's inputs, in order.

    data.variables at the hours of data.hours, those of data.advect at the lead times, and `available`, if configured.
    """
    channels = [Channel(name, hours) for name in config.variables for hours in config.hours.get(name, (0,))]
    channels += [Channel(name, hours, advected=True) for name in config.advect for hours in config.lead_times_hours]
    return (*channels, *([Channel("available")] if config.availability else ()))


def input_names(config: DataConfig) -> tuple[str, ...]:
    """Return the names of the network's input channels, in order."""
    return tuple(channel.name for channel in input_channels(config))


def window_hours(config: DataConfig) -> tuple[int, int]:
    """Return the first and last hour, relative to the start, that a sample reads: (<= 0, >= the longest lead).

    Inputs after the start do not count where data.forecast has them.
    """
    has_forecasts = config.forecast is not None
    hours = [channel.hours for channel in input_channels(config) if channel.hours <= 0 or not has_forecasts]
    return min(0, *hours), max(*hours, *config.lead_times_hours)


def hours_ahead(config: DataConfig) -> dict[str, list[int]]:
    """Return the hours after the start of each variable that is an input there; advected channels follow its wind."""
    ahead = {name: [hour for hour in hours if hour > 0] for name, hours in config.hours.items()}
    return {name: hours for name, hours in ahead.items() if hours}


def wind_hours(channels: Sequence[Channel]) -> tuple[int, ...]:
    """Return the hours from the start on, increasing, at which both u and v are inputs: the wind of data.advect."""
    given = {(channel.variable, channel.hours) for channel in channels if not channel.advected and channel.hours >= 0}
    return tuple(sorted(hours for name, hours in given if name == "u" and ("v", hours) in given))


def needs_paths(config: DataConfig, held: Collection[str]) -> bool:
    """Return whether channels of data.advect are not among the prepared variables `held`, or are anomalies."""
    anomalies = config.targets if config.anomalies else ()
    advected = [channel for channel in input_channels(config) if channel.advected]
    return any(channel.name not in held or channel.variable in anomalies for channel in advected)


def check_channels(config: DataConfig, data: PreparedData, needed: Sequence[str]) -> None:
    """Check that `data` have what the config asks for.

    Args:
        needed: further variables that must be there, such as wind and terrain.

    Raises:
        ConfigError: a name cannot be used where it stands, or hours are no multiples of the data's step.
        DataError: a variable is not in the data.
    """
    held = (*data.dynamic, *data.static_fields)
    for key, names in (("data.variables", config.variables), ("data.targets", config.targets), ("model", needed)):
        for name in names:
            if name == "available":
                raise ConfigError(f"{key}: 'available' cannot be listed here: set data.availability=true to add it")
            if name == "mask" or (name not in held and name not in COMPUTED):
                usable = sorted({*held, *COMPUTED} - {"mask", "available"})
                near = difflib.get_close_matches(name, usable, n=1, cutoff=0.6)
                hint = f" (nearest: {near[0]})" if near else ""
                has = ", ".join(sorted(set(held) - {"mask", "lat2d", "lon2d"}))
                raise DataError(f"{key}: {data.folder} has no variable {name!r}{hint}: it has {has}")
    for name in config.targets:
        if name not in data.dynamic:
            raise ConfigError(f"data.targets: {name!r} does not change in time: expected variables that do")
    for name in config.advect:
        if name not in held:
            raise ConfigError(f"data.advect: {name!r} is computed: expected variables of the data")
    hours, longest = wind_hours(input_channels(config)), max(config.lead_times_hours)
    if needs_paths(config, data.dynamic) and not (len(hours) > 1 and hours[0] == 0 and hours[-1] >= longest):
        raise ConfigError(
            f"data.advect: both u and v are inputs at the hours {list(hours)}: expected 0 to {longest}, the longest "
            f"lead time, as in data.hours={{u: [0, {longest}], v: [0, {longest}]}}"
        )
    for name in config.hours:
        if name not in data.dynamic:
            raise ConfigError(f"data.hours: {name!r} does not change in time: expected variables that do")
    if config.availability and not set(config.variables) & set(data.dynamic):
        raise ConfigError("data.availability: true: expected a variable that changes in time in data.variables")
    step = data.step_hours
    asked = {"data.lead_times_hours": config.lead_times_hours}
    asked |= {f"data.hours.{name}": hours for name, hours in config.hours.items()}
    for key, hours in asked.items():
        if any(hour % step for hour in hours):
            raise ConfigError(f"{key}: {list(hours)}: expected multiples of {step}, the step of the data in hours")
