"""Mean and standard deviation of each variable, and the step between physical and normalized values."""

import functools
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from topoflow.data.moments import Moments, day_pieces, moments_of
from topoflow.data.prepared.reader import PreparedData
from topoflow.data.variables import UNNORMALIZED, VARIABLES
from topoflow.errors import ConfigError, DataError

_BLOCK_BYTES = 32 * 2**20
"""Approximate size of one read when much is read in sequence."""


class StartForecasts(Protocol):
    """Forecasts of a base from given starts."""

    def forecast(self, start: int, lead: int, anomaly: np.ndarray) -> np.ndarray:
        """Return the forecast [T, H, W] from position `start` for the lead with index `lead`; anomaly: at the start."""
        ...


class Base(Protocol):
    """A forecast in closed form, from which the network learns the difference; see `topoflow.physics`.

    deviation: of the anomalies of each target, [T], in the units of the data. known: bool [H, W], cells where a target
    was observed in training, whatever the mask. lead_times_hours: [leads], those that it forecasts.
    """

    @property
    def lead_times_hours(self) -> np.ndarray: ...

    @property
    def deviation(self) -> np.ndarray: ...

    @property
    def known(self) -> np.ndarray: ...

    def usual(self, time: np.datetime64) -> np.ndarray:
        """Return the values [T, H, W] about which there are anomalies at a time, as a new array."""
        ...

    def usual_at_places(self, times: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return only some of them, [n, len(places)] at `times` [n]; places: positions in the T * H * W values."""
        ...

    def forecasts_from(
        self,
        source: PreparedData,
        targets: Sequence[str],
        starts: np.ndarray,
        in_training: bool,
        on_progress: Callable[[], None],
    ) -> StartForecasts:
        """Return the forecasts from `starts`, increasing positions in source.times.

        in_training: the base was fitted to them, so they may need other forecasts. on_progress is called now and then.
        """
        ...

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all that was fitted, by name."""
        ...


@dataclass(frozen=True)
class Normalization:
    """normalized = (physical - mean) / std, by variable name, in the units of the data.

    base: if there is one, targets are normalized by it instead: (physical - forecast of the base) / its deviation.
    """

    mean: dict[str, float]
    std: dict[str, float]
    base: Base | None = None

    def normalize(self, name: str, values):
        """Physical `values` of variable `name` (array or tensor of any shape) -> normalized, in the same precision."""
        return (values - self.mean[name]) / self.std[name]

    def denormalize(self, name: str, values):
        """Normalized `values` of variable `name` (array or tensor of any shape) -> physical, in the same precision."""
        return values * self.std[name] + self.mean[name]

    def constants(self, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(mean, std) of the variables `names`, each float32 [len(names), 1, 1]."""
        pairs = [(self.mean[name], self.std[name]) for name in names]
        mean, std = np.array(pairs, np.float32).reshape(-1, 2).T[..., None, None]
        return mean, std

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of all constants and of the base, to the bit."""
        exact = {name: (self.mean[name].hex(), self.std[name].hex()) for name in self.mean}
        digest = hashlib.sha256(json.dumps(exact, sort_keys=True).encode())
        for name, array in sorted(self.base.arrays().items() if self.base else ()):
            digest.update(name.encode() + array.tobytes())
        return digest.hexdigest()

    def to_dict(self) -> dict[str, list[float]]:
        """{variable: [mean, standard deviation]}: plain values, in the form of data.normalization; not the base."""
        return {name: [self.mean[name], self.std[name]] for name in self.mean}

    @classmethod
    def from_dict(cls, constants: Mapping[str, Sequence[float]]) -> "Normalization":
        """Return the constants from `to_dict`, exactly."""
        mean = {name: float(pair[0]) for name, pair in constants.items()}
        return cls(mean, {name: float(pair[1]) for name, pair in constants.items()})


def compute_normalization(
    source: PreparedData,
    names: Sequence[str],
    time_indices: np.ndarray,
    on_progress: Callable[[], None] = lambda: None,
) -> Normalization:
    """Mean and (population) standard deviation of the variables `names` over all cells that have a value.

    Dynamic variables over the hours `time_indices` (positions in source.times, the training split); static ones and
    coordinates over the grid. Those that are of order 1 as they are get 0 and 1. The moments of each day are merged in
    the order of time: those of whole days are known, the rest is read, once. on_progress is called now and then.
    DataError, naming the variable, if it is constant or has no value.
    """
    moments = {name: Moments() for name in names if name not in UNNORMALIZED}
    dynamic = [name for name in moments if name in source.dynamic]
    hours = max(1, _BLOCK_BYTES // (4 * source.grid.lat2d.size))
    for pieces in _consecutive(day_pieces(source.times, time_indices), hours):
        on_progress()
        for name in dynamic:
            for piece in _moments_of_pieces(source, name, pieces):
                moments[name] = moments[name].merge(piece)
    for name in moments:
        if name not in dynamic:
            moments[name] = moments_of(source.static(name))
    return _complete({name: _constants(name, found) for name, found in moments.items()}, names)


def _consecutive(pieces: list[np.ndarray], hours: int) -> Iterator[list[np.ndarray]]:
    """Pieces that follow each other without a gap, put together to about so many hours."""
    group: list[np.ndarray] = []
    for piece in pieces:
        if group and (piece[0] != group[-1][-1] + 1 or piece[-1] - group[0][0] >= hours):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _moments_of_pieces(source: PreparedData, name: str, pieces: list[np.ndarray]) -> list[Moments]:
    found = (source.moments_of_day(name, piece) for piece in pieces)
    known = [moments for moments in found if moments is not None]
    if len(known) == len(pieces):
        return known
    ends = np.cumsum([len(piece) for piece in pieces])
    return [moments_of(values) for values in np.split(source.read(name, np.concatenate(pieces)), ends[:-1])]


def _constants(name: str, moments: Moments) -> tuple[float, float]:
    if moments.count == 0:
        raise DataError(f"data.train: variable {name!r} has no values in the training split")
    if moments.squares == 0:  # exactly so where all are equal: the sum of a day of equal float32 values is exact
        raise DataError(
            f"data.train: variable {name!r} is {moments.mean:g} throughout the training split: expected values that "
            "vary, or its constants in data.normalization"
        )
    return moments.mean, moments.std


def configured_normalization(
    constants: dict[str, tuple[float, float]], names: Sequence[str], held: Collection[str] = ()
) -> Normalization:
    """The constants of data.normalization for the variables `names`; ConfigError for one unknown or not covered.

    held: names of the data's variables.
    """
    constants = {name: pair for name, pair in constants.items() if name not in UNNORMALIZED or tuple(pair) != (0, 1)}
    unknown = [name for name in constants if name not in {*VARIABLES, *held} or name in UNNORMALIZED]
    if unknown:
        raise ConfigError(f"data.normalization: {', '.join(unknown)}: expected names of normalized variables")
    missing = [name for name in names if name not in constants and name not in UNNORMALIZED]
    if missing:
        raise ConfigError(
            f"data.normalization: no constants for {', '.join(missing)}: expected [mean, deviation] of each"
        )
    return _complete({name: constants[name] for name in names if name not in UNNORMALIZED}, names)


def _complete(constants: dict[str, tuple[float, float]], names: Sequence[str]) -> Normalization:
    return Normalization.from_dict({name: constants.get(name, (0.0, 1.0)) for name in names})
