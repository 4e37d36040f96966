"""rules.drop: which values the recipe calls missing."""

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from topoflow.data.variables import VARIABLES
from topoflow.tools.prepare.findings import Findings

_COMPARISONS: dict[str, Callable] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq,
}  # fmt: skip
_RULE = re.compile(r"\s*(?P<name>\w+)\s*(?P<comparison><=|>=|==|<|>)\s*(?P<number>[-+.\deE]+)\s*")


@dataclass(frozen=True)
class Drop:
    """Values of a variable (or `any`) that compare so with a number, in our unit."""

    name: str
    comparison: str
    number: float

    def __str__(self) -> str:
        return f"{self.name} {self.comparison} {self.number:g}"

    def concerns(self, name: str) -> bool:
        """Return whether the rule is about variable `name`."""
        return self.name in (name, "any")

    def finds(self, values: np.ndarray, of_raw: tuple[float, float] | None = None) -> np.ndarray:
        """Return bool of the shape of `values`: those to drop. Numbers are equal within float32's precision.

        of_raw: factor and offset from the file's unit to ours; `==` is then about the number in the file too.
        """
        with np.errstate(invalid="ignore"):
            if self.comparison != "==":
                return _COMPARISONS[self.comparison](values, self.number)
            found = _is_close(values, self.number)
            return found if of_raw is None else found | _is_close(values, self.number * of_raw[0] + of_raw[1])


def _is_close(values: np.ndarray, number: float) -> np.ndarray:
    return np.abs(values - number) <= 1e-5 * max(abs(number), 1e-30)


def parse_drops(texts: Sequence[str], names: Sequence[str], findings: Findings, key: str = "drop") -> tuple[Drop, ...]:
    """Return the rules of rules.drop or rules.keep; a finding for each that cannot be read, or is about no variable."""
    names = tuple(dict.fromkeys([*names, *(n for n, variable in VARIABLES.items() if variable.kind == "static")]))
    drops = []
    for text in texts:
        match = _RULE.fullmatch(text)
        try:
            drop = Drop(match["name"], match["comparison"], float(match["number"])) if match else None
        except ValueError:
            drop = None
        if drop is None:
            findings.add("error", "recipe", "", f"rules.{key}: {text!r}", "a comparison like 'pm25 < -50'")
        elif drop.name != "any" and drop.name not in names:
            findings.add("error", "recipe", "", f"rules.{key}: {text!r}", f"any, or one of {', '.join(names)}")
        else:
            drops.append(drop)
    return tuple(drops)
