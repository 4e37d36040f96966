"""days_YYYY.json: hashes, moments and cost in precision of each day of a prepared year."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from topoflow.data.moments import Moments
from topoflow.errors import DataError


@dataclass(frozen=True)
class DayRecord:
    """One day (UTC) of the year's array.

    sha256: by name, that of the variable's bytes (see `hash_variables`). moments: by name, of the values as they are
    read back. errors: by name, the largest difference from the values that were read and the sum of its squares; empty
    where the array holds those values themselves. dropped: number of values that were left out, by reason.
    """

    day: str
    hours: int
    sha256: dict[str, str]
    moments: dict[str, Moments]
    errors: dict[str, tuple[float, float]]
    dropped: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; floats come back from JSON to the bit."""
        moments = {name: [m.count, m.mean, m.squares] for name, m in self.moments.items()}
        return {
            "day": self.day,
            "hours": self.hours,
            "sha256": self.sha256,
            "moments": moments,
            "errors": self.errors,
            "dropped": self.dropped,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "DayRecord":
        """What `to_dict` gave. KeyError, TypeError, ValueError or AttributeError for anything else."""
        hashes = {str(name): str(sha256) for name, sha256 in content["sha256"].items()}
        moments = {name: Moments(int(n), float(mean), float(sq)) for name, (n, mean, sq) in content["moments"].items()}
        errors = {name: (float(largest), float(squares)) for name, (largest, squares) in content["errors"].items()}
        dropped = {str(reason): int(count) for reason, count in content["dropped"].items()}
        return cls(str(content["day"]), int(content["hours"]), hashes, moments, errors, dropped)


def hash_field(values: np.ndarray) -> str:
    """Return the hex SHA-256 of a variable's hours [n, H, W], as they lie in the array."""
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


def hash_variables(names: list[str], values: np.ndarray) -> dict[str, str]:
    """Return `hash_field` of each variable of a day, [hours, variable, row, column] in the type of the array."""
    return {name: hash_field(values[:, column]) for column, name in enumerate(names)}


def days_text(days: list[DayRecord]) -> str:
    """The record of a year, a line for each day."""
    return "[\n" + ",\n".join(json.dumps(day.to_dict()) for day in days) + "\n]\n"


def read_days(path: Path, sha256: str) -> list[DayRecord]:
    """The days of a year; raises as `read_plain_days` does."""
    return [DayRecord.from_dict(day) for day in read_plain_days(path, sha256)]


def read_plain_days(path: Path, sha256: str) -> list[dict[str, Any]]:
    """The days of a year as `DayRecord.to_dict` gave them, which is several times as fast to read.

    DataError if the file cannot be read or has another SHA-256.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"{path}: is damaged: it does not match its hash in the manifest")
    return json.loads(data)
