"""Weather forecasts by time of issue: a variable at each step after it is a variable of its own, as `u+6h`."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from topoflow.data.channels import Channel
from topoflow.errors import ConfigError
from topoflow.tools.prepare.findings import Findings
from topoflow.tools.prepare.recipe import Recipe
from topoflow.tools.prepare.writing import Fields


def require_steps(recipe: Recipe) -> tuple[int, ...]:
    """Return the steps of a recipe that has them.

    Raises:
        ConfigError: they are not increasing hours from 0 on, or the recipe has a key that does not go with them.
    """
    steps = recipe.steps or ()
    if not steps or steps[0] < 0 or list(steps) != sorted(set(steps)):
        raise ConfigError(f"steps: {list(steps)}: expected increasing hours after the issue, such as [0, 6, 12]")
    for key in ("advect", "frequency"):
        if getattr(recipe, key) is not None:
            raise ConfigError(f"steps: with {key}: expected one of them (forecasts are written as they were issued)")
    return steps


class ByStep:
    """The fields of several sources, each of one step, at the issues that all of them have; see `writing.Fields`."""

    def __init__(self, steps: Sequence[int], sources: Sequence[Fields], findings: Findings):
        self._sources = sources
        self.times = sources[0].times
        for source in sources[1:]:
            self.times = np.intersect1d(self.times, source.times)
        issued = np.unique(np.concatenate([source.times for source in sources]))
        if len(self.times) < len(issued):
            found = f"{len(issued) - len(self.times)} of {len(issued)} issues lack a step: left out"
            severity = "note" if len(self.times) else "error"
            findings.add(severity, "recipe", "", found, "" if len(self.times) else "issues that have all of `steps`")
        self.step_hours = int(np.gcd.reduce([24, *np.diff(self.times).astype(int)]))
        self.shape = sources[0].shape
        self.units: Mapping[str, str] = {
            Channel(name, step).name: unit
            for step, source in zip(steps, sources, strict=True)
            for name, unit in source.units.items()
        }
        self._places = [np.searchsorted(source.times, self.times) for source in sources]

    @property
    def is_decided(self) -> bool:
        """Whether everything read so far may be written."""
        return all(source.is_decided for source in self._sources)

    def fields(self, positions: np.ndarray) -> np.ndarray:
        """Return float32 [n, V, H, W] at increasing positions [n] of `times`."""
        pairs = zip(self._sources, self._places, strict=True)
        return np.concatenate([source.fields(places[positions]) for source, places in pairs], axis=1)

    def days(self, pieces: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, int]]]:
        """Yield (positions, fields, values dropped by reason) of each day."""
        pairs = zip(self._sources, self._places, strict=True)
        of_sources = [source.days([places[piece] for piece in pieces]) for source, places in pairs]
        for piece, *found in zip(pieces, *of_sources, strict=True):
            dropped: Counter[str] = Counter()
            for _, _, counts in found:
                dropped.update(counts)
            yield piece, np.concatenate([fields for _, fields, _ in found], axis=1), dict(dropped)

    def file_states(self, first: int, stop: int) -> list[str]:
        """Return what changes with the files that hold the times [first, stop)."""
        pairs = zip(self._sources, self._places, strict=True)
        states = [source.file_states(int(places[first]), int(places[stop - 1]) + 1) for source, places in pairs]
        return [*self.units, *(state for of_source in states for state in of_source)]

    def seen(self) -> list[Any]:
        """See `writing.Fields`."""
        return [source.seen() for source in self._sources]

    def recall(self, seen: list[Any]) -> None:
        """See `writing.Fields`."""
        for source, of_source in zip(self._sources, seen, strict=True):
            source.recall(of_source)

    def finish(self) -> None:
        """See `writing.Fields`."""
        for source in self._sources:
            source.finish()
