"""Values that are possible, and still look like marks of missing values: -1, 999 or 9999 where no others are near."""

import re
from dataclasses import dataclass

import numpy as np

_COUNT = 10
"""A mark occurs at least so often."""
_DISTANCE, _NINES_DISTANCE = 4.0, 1.2
"""How many times the next value a mark is at least."""


@dataclass
class Extreme:
    """The largest value of a variable over all files of one unit; of the smallest, the negative.

    top: that value, which occurred `count` times, first in the file `path`. rest: the next one.
    """

    top: float = -np.inf
    count: int = 0
    rest: float = -np.inf
    path: str = ""

    def add(self, high: float, values: np.ndarray, sign: int, path: str) -> None:
        """Take up values [...] (NaN: missing); the largest of sign * values is `high`, and finite."""
        if high < self.top:
            self.rest = max(self.rest, high)
            return
        is_top = values == sign * high
        others = sign * values[~is_top & np.isfinite(values)]
        if high > self.top:
            self.rest = max(self.rest, self.top)
            self.top, self.count, self.path = high, 0, path
        self.count += int(np.count_nonzero(is_top))
        self.rest = max(self.rest, float(others.max()) if others.size else -np.inf)

    def merge(self, top: float, count: int, rest: float, path: str) -> None:
        """Take up what an earlier process found."""
        rests = [self.rest, rest, *(value for value in (self.top, top) if value < max(self.top, top))]
        if top > self.top:
            self.top, self.count, self.path = top, count, path
        elif top == self.top:
            self.count = max(self.count, count)
        self.rest = max(rests)

    def find_mark(self, sign: int, of_raw: tuple[float, float], is_concentration: bool) -> tuple[float, float] | None:
        """Return (value, next value), as they are in the file, if it looks like a mark of missing values.

        Nines such as 999 or 99.9 need less distance from the next value; of other numbers, whole ones are suspect as
        concentrations. of_raw: what a number in the file becomes, as factor and offset.
        """
        factor, offset = of_raw
        value, rest = (float(f"{(sign * found - offset) / factor:.6g}") for found in (self.top, self.rest))
        top, following = sign * value, sign * rest
        is_nines = re.fullmatch(r"99+(\.9+)?", f"{top:.6g}") is not None
        is_suspect = is_nines or (is_concentration and top == round(top))
        is_far = top > (_NINES_DISTANCE if is_nines else _DISTANCE) * max(following, 0.0)
        is_mark = self.count >= _COUNT and np.isfinite(self.rest) and top > 0 and is_suspect and is_far
        return (value, rest) if is_mark else None
