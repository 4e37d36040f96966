"""Build the data sets that the data section of the config describes."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from topoflow.config import DataConfig
from topoflow.data.channels import check_channels, hours_ahead, input_channels, input_names, window_hours
from topoflow.data.contents import Contents, contents_of
from topoflow.data.dataset import ForecastDataset
from topoflow.data.forecast_error import WeatherErrors
from topoflow.data.grid import Grid
from topoflow.data.moments import day_pieces
from topoflow.data.normalization import Normalization, compute_normalization, configured_normalization
from topoflow.data.prepared.reader import PreparedData, PreparedIndex, index_prepared
from topoflow.data.splits import StartIndex, check_disjoint, split_starts, split_times
from topoflow.data.weather_forecasts import OLDEST_HOURS, WeatherForecasts
from topoflow.errors import ConfigError, DataError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class ForecastData:
    """An opened data set with the starts of each configured split. Built by `open_forecast_data`."""

    config: DataConfig
    source: PreparedData
    splits: dict[str, StartIndex]
    """By name, those of train, validation and test that the config gives ranges for."""
    with_wind: bool
    needed: tuple[str, ...]
    """Variables that the physical priors need."""
    joint: bool = False
    """Whether a sample has the targets of all lead times."""
    forecasts: WeatherForecasts | None = None
    """The weather after the start; None: that of `source`."""

    @property
    def grid(self) -> Grid:
        """The grid of the data."""
        return self.source.grid

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the network's input channels, in order."""
        return input_names(self.config)

    @property
    def target_names(self) -> tuple[str, ...]:
        """Names of the forecast variables, in order."""
        return self.config.targets

    @property
    def prepared_advected(self) -> tuple[str, ...]:
        """Names of the channels of data.advect that `prepare` has made."""
        advected = [channel.name for channel in input_channels(self.config) if channel.advected]
        return tuple(name for name in advected if name in self.source.dynamic)

    @functools.cached_property
    def contents(self) -> Contents:
        """What the hours of `splits` hold, as far as the run reads it."""
        names = (*self.config.variables, *self.config.targets, *self.needed, *self.prepared_advected)
        hours = np.unique(np.concatenate([np.empty(0, np.int64), *(self.times(split) for split in self.splits)]))
        found = contents_of(self.source, names, hours)
        if self.forecasts is None:
            return found
        forecasts = self.forecasts.contents(day_pieces(self.source.times, hours))
        return replace(found, hashes={**found.hashes, **forecasts})

    def times(self, split: str) -> np.ndarray:
        """Return the positions of a split's hours in source.times."""
        ranges, step_hours = getattr(self.config, split), self.source.step_hours
        return split_times(self.source.times, ranges, step_hours, key=f"data.{split}")

    def relation_to_training(self, split: str) -> str:
        """Return, in words, where in time a split lies as seen from the training split."""
        times = self.source.times
        trained, scored = times[self.times("train")], times[self.times(split)]
        if split == "train":
            return "the training split itself"
        if scored[0] > trained[-1]:
            return f"forward: all of it is after the training split, which ends at {trained[-1]}"
        if scored[-1] < trained[0]:
            return f"backward: all of it is before the training split, which begins at {trained[0]}"
        return "interleaved: the training split has times before and after it, so that a climatology interpolates"

    def starts(self, split: str) -> StartIndex:
        """Return where a forecast of a split can start, one of `splits` or another."""
        if split in self.splits:
            return self.splits[split]
        return find_starts(self.config, self.source, split, self.forecasts)

    def build_normalization(self, on_progress: Callable[[], None] = lambda: None) -> Normalization:
        """From the constants of data.normalization, or computed over the training split.

        The moments of whole days are known; the hours of other days are read. on_progress is called now and then.
        """
        channels = input_channels(self.config)
        names = tuple(dict.fromkeys((*(channel.variable for channel in channels), *self.target_names)))
        if self.config.normalization != "train":
            return configured_normalization(self.config.normalization, names, self.source.units)
        return compute_normalization(self.source, names, self.times("train"), on_progress)

    def dataset(
        self,
        split: str,
        normalization: Normalization,
        errors: WeatherErrors | None = None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> ForecastDataset:
        """The samples of a split that the config gives ranges for, one of `splits` or another.

        errors: of the weather after the start. on_progress is called now and then.
        """
        return ForecastDataset(
            self.source,
            normalization,
            self.starts(split).starts,
            self.config,
            self.with_wind,
            joint=self.joint,
            in_training=split == "train",
            ahead=errors or self.forecasts,
            on_progress=on_progress,
        )

    def num_samples(self, split: str) -> int:
        """Return the length of the `dataset` of a split."""
        return len(self.splits[split].starts) * (1 if self.joint else len(self.config.lead_times_hours))

    def summary(self) -> list[str]:
        """Return lines for the log: extent, grid, and splits with the starts that were lost to gaps."""
        lines = [
            f"data: {self.source.describe()}",
            f"grid: {self.grid.describe()}, {int(self.source.mask.sum())} cells in the mask",
        ]
        if self.forecasts is not None:
            lines.append(f"weather after the start: forecasts of {self.forecasts.issued.describe()}")
        for split, index in self.splits.items():
            line = f"{split}: {len(index.starts)} start times, {self.num_samples(split)} samples"
            if index.dropped_for_gaps:
                line += f"; {index.dropped_for_gaps} starts skipped because their windows cross a gap in time"
            if index.without_forecast:
                line += f"; {index.without_forecast} starts skipped for which data.forecast has no forecast"
            lines.append(line)
        return lines


def find_starts(
    config: DataConfig, source: PreparedData, split: str, forecasts: WeatherForecasts | None = None
) -> StartIndex:
    """Return where a forecast of a split can start; raises as `split_starts` does, and if no weather is forecast."""
    window, ranges = window_hours(config), getattr(config, split)
    index = split_starts(source.times, ranges, window, source.step_hours, key=f"data.{split}")
    if forecasts is None:
        return index
    kept = index.starts[forecasts.cover(index.starts)]
    if len(kept) == 0:
        times = forecasts.issued.times
        raise DataError(
            f"data.forecast: {config.forecast} has no forecast for any start of data.{split}: its forecasts were "
            f"issued from {times[0]} to {times[-1]}, and are used up to {OLDEST_HOURS} h after they are there"
        )
    return StartIndex(kept, index.dropped_for_gaps, len(index.starts) - len(kept))


def open_forecast_data(
    config: DataConfig,
    with_wind: bool,
    with_terrain: bool,
    joint: bool = False,
    index: PreparedIndex | None = None,
    forecast_index: PreparedIndex | None = None,
    only: Sequence[str] = SPLITS,
) -> ForecastData:
    """Open the data of a config.

    Args:
        with_wind, with_terrain: whether the model uses the wind field and the terrain height.
        joint: whether it forecasts all lead times at once.
        index, forecast_index: of data.path and data.forecast, if this or another process has made them.
        only: the splits to find starts for.

    Raises:
        ConfigError, DataError, MissingPath: naming the key or file.
    """
    check_disjoint(**{split: getattr(config, split) for split in SPLITS})
    source = PreparedData(index_prepared(config.path) if index is None else index)
    needed = (*(("u", "v") if with_wind else ()), *(("elevation",) if with_terrain else ()))
    check_channels(config, source, needed)
    forecasts = None
    if config.forecast is not None:
        if forecast_index is None:
            forecast_index = index_prepared(config.forecast, "data.forecast")
        issued, hours = PreparedData(forecast_index), hours_ahead(config)
        forecasts = WeatherForecasts(issued, source, hours, config.forecast_delay_hours)
        made = [channel.name for channel in input_channels(config) if channel.advected]
        if set(made) & set(source.dynamic):
            raise ConfigError(
                f"data.forecast: {config.path} holds {made[0]}, made with the wind of the data: expected data prepared "
                "without advect"
            )
    splits = {split: find_starts(config, source, split, forecasts) for split in only if getattr(config, split)}
    return ForecastData(config, source, splits, with_wind, needed, joint, forecasts)
