"""Mean and standard deviation of each variable, and the step between physical and normalized values."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from topoflow.data.source import GriddedSource
from topoflow.data.variables import UNNORMALIZED, VARIABLES
from topoflow.errors import ConfigError, DataError


@dataclass(frozen=True)
class Normalization:
    """normalized = (physical - mean) / std, by variable name, in the units of the data files."""

    mean: dict[str, float]
    std: dict[str, float]

    def normalize(self, name: str, values):
        """Physical `values` of variable `name` (array or tensor of any shape) -> normalized, in the same precision."""
        return (values - self.mean[name]) / self.std[name]

    def denormalize(self, name: str, values):
        """Normalized `values` of variable `name` (array or tensor of any shape) -> physical, in the same precision."""
        return values * self.std[name] + self.mean[name]

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of all constants, to the bit."""
        exact = {name: (self.mean[name].hex(), self.std[name].hex()) for name in self.mean}
        return hashlib.sha256(json.dumps(exact, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, list[float]]:
        """{variable: [mean, standard deviation]}: plain values, in the form of data.normalization."""
        return {name: [self.mean[name], self.std[name]] for name in self.mean}

    @classmethod
    def from_dict(cls, constants: dict[str, Sequence[float]]) -> "Normalization":
        """What `to_dict` gave, exactly."""
        mean = {name: float(pair[0]) for name, pair in constants.items()}
        return cls(mean, {name: float(pair[1]) for name, pair in constants.items()})


class _Moments:
    """Count, mean and sum of squared deviations of a stream of float32 values, in float64.

    Blocks are merged by Chan, Golub and LeVeque (1979), which does not lose digits where the mean is large.
    """

    def __init__(self):
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, values: np.ndarray) -> None:
        present = values[~np.isnan(values)].astype(np.float64)
        if present.size == 0:
            return
        mean = float(present.mean())
        step, total = mean - self.mean, self.count + present.size
        self.squares += float(np.square(present - mean).sum()) + step**2 * self.count * present.size / total
        self.mean += step * present.size / total
        self.count = total

    def result(self, name: str) -> tuple[float, float]:
        if self.count == 0:
            raise DataError(f"data.train: variable {name!r} has no value in the whole training split")
        if self.squares == 0:  # exactly so where all are equal: the sum of a block of equal float32 values is exact
            raise DataError(
                f"data.train: variable {name!r} is {self.mean:g} throughout the training split: expected values that "
                "vary, or its constants in data.normalization"
            )
        return self.mean, float(np.sqrt(self.squares / self.count))


def compute_normalization(
    source: GriddedSource,
    names: Sequence[str],
    time_indices: np.ndarray,
    on_progress: Callable[[], None] = lambda: None,
) -> Normalization:
    """Mean and (population) standard deviation of the variables `names` over all cells that have a value.

    Dynamic variables over the hours `time_indices` (positions in source.times, the training split), in one pass over
    the files; static ones and coordinates over the grid. Those that are of order 1 as they are get 0 and 1. In memory
    or not, the bits are the same. on_progress is called between blocks. DataError, naming the variable, if it is
    constant or has no value.
    """
    moments = {name: _Moments() for name in names if name not in UNNORMALIZED}
    dynamic = [name for name in moments if VARIABLES[name].kind == "dynamic"]
    for block in source.blocks(time_indices):
        on_progress()
        for name in dynamic:
            moments[name].add(source.read(name, block))
    for name in moments:
        if name not in dynamic:
            moments[name].add(source.static(name))
    return _complete({name: moments[name].result(name) for name in moments}, names)


def configured_normalization(constants: dict[str, tuple[float, float]], names: Sequence[str]) -> Normalization:
    """The constants of data.normalization for the variables `names`; ConfigError for one unknown or not covered."""
    unknown = [name for name in constants if name not in VARIABLES or name in UNNORMALIZED]
    if unknown:
        raise ConfigError(f"data.normalization: {', '.join(unknown)}: expected names of variables that are normalized")
    missing = [name for name in names if name not in constants and name not in UNNORMALIZED]
    if missing:
        raise ConfigError(
            f"data.normalization: no constants for {', '.join(missing)}: expected [mean, deviation] of each"
        )
    return _complete({name: constants[name] for name in names if name not in UNNORMALIZED}, names)


def _complete(constants: dict[str, tuple[float, float]], names: Sequence[str]) -> Normalization:
    return Normalization.from_dict({name: constants.get(name, (0.0, 1.0)) for name in names})
