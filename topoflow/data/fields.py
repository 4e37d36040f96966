"""Physical fields by name and hour: the common interface of all data sets, whatever their files."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from topoflow.data.grid import Grid
from topoflow.data.moments import Moments
from topoflow.data.variables import VARIABLES

BLOCK_BYTES = 32 * 2**20
"""Approximate size of one read when much is read in sequence."""
_SERIAL_ELEMENTS = 2**15 - 1
"""torch divides more elements among threads (ATen/TensorIterator.h, GRAIN_SIZE)."""


class FieldSource(ABC):
    """A gridded data set as one series of hours. Built by `topoflow.data.source.open_source` and `open_indexed`.

    times: datetime64[h] [T], strictly increasing. grid: with the static fields that were asked for. dynamic: names of
    the fields that change in time. fingerprint: hex SHA-256 of what the data are, wherever they lie. In memory or not,
    the same values come out. Several threads may read at a time.
    """

    def __init__(self, times: np.ndarray, grid: Grid, dynamic: tuple[str, ...], fingerprint: str):
        self.times, self.grid, self.dynamic, self.fingerprint = times, grid, dynamic, fingerprint
        self._fields: np.ndarray | None = None  # [T, D, H, W] once loaded
        self._columns: dict[tuple[str, ...], slice | list[int]] = {}

    @property
    @abstractmethod
    def where(self) -> str:
        """Where the fields are read, in words."""

    @abstractmethod
    def close(self) -> None:
        """Close what this process has open; the next read opens it again."""

    @abstractmethod
    def _read(self, name: str, indices: np.ndarray) -> np.ndarray:
        """float32 [n, H, W] of `name` at `indices` [n] of `times`, not in memory."""

    @abstractmethod
    def _read_hour(self, names: tuple[str, ...], index: int) -> np.ndarray:
        """float32 [len(names), H, W] at hour `index`, not in memory; may be a view that must not be changed."""

    @abstractmethod
    def file_states(self, first: int, stop: int) -> list[str]:
        """Return strings that change when any file that holds the hours [first, stop) changes."""

    def moments_of_day(self, name: str, piece: np.ndarray) -> Moments | None:
        """Return the moments of `name` over `piece`, all hours of a day, if the data come with them."""
        return None

    def guard(self) -> list[str]:
        """Return strings that change when the data files change, as far as that is cheap to find out."""
        return []

    @property
    def in_memory(self) -> bool:
        """Whether the fields are held in memory."""
        return self._fields is not None

    @property
    def size_bytes(self) -> int:
        """Size of all dynamic fields as float32."""
        return 4 * len(self.times) * len(self.dynamic) * self.grid.lat2d.size

    def read(self, name: str, indices: np.ndarray | Sequence[int] | slice) -> np.ndarray:
        """float32 [n, H, W] of dynamic variable `name` at `indices` of `times`, physical units, NaN where missing."""
        indices = np.arange(len(self.times))[indices]
        if self._fields is not None:
            return self._fields[indices, self.dynamic.index(name)]
        return self._read(name, indices)

    def hour(self, names: tuple[str, ...], index: int) -> np.ndarray:
        """float32 [len(names), H, W]: the dynamic variables `names` at hour `index` of `times`.

        It may be a view of the data, so it must not be changed. Names in the order of `dynamic` are read fastest.
        """
        if self._fields is not None:
            return self._fields[index, select(names, self.dynamic, self._columns)]
        return self._read_hour(names, index)

    def snapshot(self, names: Sequence[str], index: int) -> np.ndarray:
        """Return the same as `hour`, as a copy that the caller may change."""
        fields = self.hour(tuple(names), index)
        return fields if fields.flags.owndata else fields.copy()

    def static(self, name: str) -> np.ndarray:
        """float32 [H, W]: `elevation` (m), `population`, `lat2d` or `lon2d` (degrees)."""
        field = {
            "elevation": self.grid.elevation_m,
            "population": self.grid.population,
            "lat2d": self.grid.lat2d,
            "lon2d": self.grid.lon2d,
        }[name]
        assert field is not None, f"the source was opened without {name}"
        return field.astype(np.float32)

    def load(self) -> None:
        """Read all dynamic fields into memory."""
        fields = np.empty((len(self.times), len(self.dynamic), *self.grid.shape), np.float32)
        hours = max(1, BLOCK_BYTES // (4 * self.grid.lat2d.size))
        for start in range(0, len(self.times), hours):
            block = slice(start, start + hours)
            for column, name in enumerate(self.dynamic):
                fields[block, column] = self.read(name, block)
        self._fields = fields
        self.close()

    def compute_fingerprint(self) -> str:
        """SHA-256 over names, units, shape, times, coordinates, static fields and three hours of every field.

        This process reads these hours itself, even if another one made the index.
        """
        digest = hashlib.sha256()

        def add(label: str, values: np.ndarray, dtype: str) -> None:
            # one NaN for all: files may hold any of the many bit patterns
            values = np.where(np.isnan(values), np.nan, values) if dtype == "<f4" else values
            digest.update(f"{label} {values.shape} {dtype};".encode())
            digest.update(np.ascontiguousarray(values, dtype).tobytes())

        add("times", self.times.astype(np.int64), "<i8")
        # rounded to the float32 grid of about 1e-5 degrees in which many files store their coordinates
        add("lat2d", self.grid.lat2d, "<f4")
        add("lon2d", self.grid.lon2d, "<f4")
        if self.grid.elevation_m is not None:
            add("elevation m", self.grid.elevation_m, "<f4")
        if self.grid.population is not None:
            add("population 1", self.grid.population, "<f4")
        hours = [0, len(self.times) // 2, len(self.times) - 1]
        for name in sorted(self.dynamic):
            add(f"{name} {VARIABLES[name].unit}", self.read(name, hours), "<f4")
        self.close()
        return digest.hexdigest()


def select(
    names: tuple[str, ...], held: tuple[str, ...], known: dict[tuple[str, ...], slice | list[int]]
) -> slice | list[int]:
    """Positions of `names` in `held`: a slice if they are consecutive, so that it selects a view. `known`: a cache."""
    if names not in known:
        places = [held.index(name) for name in names]
        in_a_row = bool(places) and places == list(range(places[0], places[0] + len(places)))
        known[names] = slice(places[0], places[-1] + 1) if in_a_row else places
    return known[names]


def serial_pieces(values: np.ndarray) -> tuple[torch.Tensor, ...]:
    """Return a contiguous array of any shape as flat views that torch works on with the calling thread alone.

    Otherwise torch would start OpenMP threads for each loader thread, which take the processors of the training step.
    """
    return torch.from_numpy(values).view(-1).split(_SERIAL_ELEMENTS)
