"""Build the data sets that the data section of the config describes."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from topoflow.config import DataConfig
from topoflow.data.cache import NormalizationCache
from topoflow.data.dataset import ForecastDataset, input_names
from topoflow.data.fields import FieldSource
from topoflow.data.grid import Grid, load_mask
from topoflow.data.normalization import Normalization, compute_normalization, configured_normalization
from topoflow.data.packed.reader import PackedIndex
from topoflow.data.source import SourceIndex, index_source, open_indexed
from topoflow.data.splits import StartIndex, check_disjoint, split_starts, split_times
from topoflow.data.variables import check_names

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class DataIndex:
    """Everything found in the files except the fields; it can be sent to another process.

    mask: bool [H, W], the cells that count.
    """

    source: SourceIndex | PackedIndex
    mask: np.ndarray


@dataclass(frozen=True)
class ForecastData:
    """An opened data set with its mask and the starts of each configured split. Built by `open_forecast_data`."""

    config: DataConfig
    source: FieldSource
    mask: np.ndarray
    """bool [H, W]: the cells that count."""
    splits: dict[str, StartIndex]
    """By name, those of train, validation and test that the config gives ranges for."""
    with_wind: bool

    @property
    def grid(self) -> Grid:
        """The grid of the source."""
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
    def mask_fingerprint(self) -> str:
        """Hex SHA-256 of which cells count."""
        return hashlib.sha256(np.packbits(self.mask).tobytes()).hexdigest()

    def build_normalization(self, on_progress: Callable[[], None] = lambda: None) -> Normalization:
        """From the constants of data.normalization, or computed over the training split.

        That takes one pass over the data, unless they are packed or the constants are in the cache. on_progress is
        called from time to time.
        """
        names = tuple(dict.fromkeys((*self.input_names, *self.target_names)))
        if self.config.normalization != "train":
            return configured_normalization(self.config.normalization, names)
        times = split_times(self.source.times, self.config.train, key="data.train")
        cache = NormalizationCache(self.config.cache, self.source, names, times)
        if (known := cache.read()) is not None:
            return known
        computed = compute_normalization(self.source, names, times, on_progress)
        cache.write(computed)
        return computed

    def dataset(self, split: str, normalization: Normalization) -> ForecastDataset:
        """The samples of a split that the config gives ranges for."""
        return ForecastDataset(
            self.source, normalization, self.splits[split].starts, self.config, self.mask, self.with_wind
        )

    def summary(self) -> list[str]:
        """Return lines for the log: extent, grid, and splits with the starts that were lost to gaps."""
        times, (rows, columns) = self.source.times, self.grid.shape
        order = "north" if self.grid.north_first else "south"
        lines = [
            f"data: {self.config.path}, {len(times)} hours from {times[0]} to {times[-1]}, "
            f"{len(self.source.dynamic)} variables in {self.source.size_bytes / 1e9:.2f} GB, {self.source.where}",
            f"grid: {rows} x {columns} cells, {order} first, {int(self.mask.sum())} of them in the mask",
        ]
        for split, index in self.splits.items():
            n_samples = len(index.starts) * len(self.config.lead_times_hours)
            line = f"{split}: {len(index.starts)} start times, {n_samples} samples"
            if index.dropped_for_gaps:
                line += f"; {index.dropped_for_gaps} starts skipped because their windows cross a gap in time"
            lines.append(line)
        return lines


def needed_variables(config: DataConfig, with_wind: bool, with_terrain: bool) -> tuple[str, ...]:
    """All variables that inputs, targets and the physical priors need, each once."""
    wind = ("u", "v") if with_wind else ()
    terrain = ("elevation",) if with_terrain else ()
    return tuple(dict.fromkeys((*config.variables, *config.targets, *wind, *terrain)))


def open_forecast_data(
    config: DataConfig, with_wind: bool, with_terrain: bool, only: Sequence[str] = SPLITS
) -> ForecastData:
    """`index_forecast_data` and `open_indexed_data` in one process."""
    return open_indexed_data(config, with_wind, index_forecast_data(config, with_wind, with_terrain), only)


def index_forecast_data(config: DataConfig, with_wind: bool, with_terrain: bool) -> DataIndex:
    """Open and check all files that the config names.

    with_wind, with_terrain: whether the model uses the wind field and the terrain height. Raises ConfigError, DataError
    and MissingPath.
    """
    check_names(config.variables, config.targets)
    check_disjoint(**{split: getattr(config, split) for split in SPLITS})
    source = index_source(config.path, needed_variables(config, with_wind, with_terrain))
    packed_mask = source.mask if isinstance(source, PackedIndex) and config.mask is None else None
    return DataIndex(source, load_mask(config.mask, source.grid) if packed_mask is None else packed_mask)


def open_indexed_data(
    config: DataConfig, with_wind: bool, index: DataIndex, only: Sequence[str] = SPLITS
) -> ForecastData:
    """Return the data of an index that this or another process made.

    only: the splits to find starts for. Raises DataError.
    """
    source = open_indexed(index.source, config.in_memory)
    ranges = {split: getattr(config, split) for split in SPLITS}
    splits = {
        split: split_starts(source.times, ranges[split], config.lead_times_hours, key=f"data.{split}")
        for split in only
        if ranges[split]
    }
    return ForecastData(config, source, index.mask, splits, with_wind)
